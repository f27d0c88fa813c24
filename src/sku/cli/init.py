"""``sku init``, ``sku doctor``: what ships with the package, a recipe of one's own from it, and what a machine has."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import shlex
from collections.abc import Iterable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
import yaml
from packaging.requirements import Requirement
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from sku._version import __version__
from sku.cli import options
from sku.cli.console import plain_table, print_json, print_next, results
from sku.config import apply_override, load_recipe, recipe_from_dict, recipe_names
from sku.config.recipe import read_yaml, recipe_text
from sku.errors import OutputError, RecipeError, did_you_mean
from sku.from_file import SUFFIX
from sku.progress import quiet_imports, quiet_libraries
from sku.storage import check_can_be_made, free_bytes, named_disk_errors, write_text

if TYPE_CHECKING:
    from sku.methods.base import AnyMethod


def _launchers() -> dict[str, str]:
    """Name of a configuration of ``accelerate launch`` -> where it lies."""
    folder = resources.files("sku") / "recipes" / "accelerate"
    return {entry.name.removesuffix(".yaml"): str(entry) for entry in folder.iterdir()}


def _shown() -> list[str]:
    return [*recipe_names(), *options.method_names(), *sorted(_launchers())]


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME_OR_PROMPTS",
            help="A recipe, method or launcher to show; with --model the harmful prompts: file, folder or hub id, "
            "whose answers are not read. Without it all names are listed.",
            autocompletion=_shown,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the model to unlearn.")] = None,
    retain: Annotated[str | None, typer.Option(help="Normal prompts, in place of those that ship with SKU.")] = None,
    judge: options.JudgeOption = None,
    overrides: options.SetOption = None,
    out: Annotated[Path, typer.Option(help="New YAML file.")] = Path("recipe.yaml"),
    as_json: options.JsonOption = False,
) -> None:
    """List recipes, methods and launchers, show one, or write the recipe that `sku run MODEL --forget PROMPTS` uses.

    A recipe is shown with every default spelled out, a method with its settings, a configuration for `accelerate
    launch --config_file` by its path.
    """
    if name is not None and model is not None:
        _write(name, model, retain, judge, overrides or [], out, as_json=as_json)
        return
    if any(option is not None for option in (model, retain, judge, overrides)):
        raise RecipeError("--model, --retain, --judge and --set write a recipe: sku init PROMPTS --model MODEL")
    if name is None:
        _list(as_json=as_json)
    else:
        _show(name, as_json=as_json)


def _list(*, as_json: bool) -> None:
    found = {
        "recipes": [{"name": name, "description": load_recipe(name).description} for name in recipe_names()],
        "methods": options.listed_methods(),
        "launchers": [{"name": name, "path": path} for name, path in sorted(_launchers().items())],
    }
    if as_json:
        print_json(found)
        return
    for recipe in found["recipes"]:
        results.print(f"{recipe['name']:<26}{recipe['description']}")
    table = plain_table(("method", "title", "paper"))
    for method in found["methods"]:
        table.add_row(method["name"], method["title"], method["paper"])
    results.print()
    results.print(table)
    results.print(f"\nlaunchers {', '.join(sorted(_launchers()))}")


def _show(name: str, *, as_json: bool) -> None:
    launchers, methods = _launchers(), {method["name"]: method for method in options.listed_methods()}
    if name.endswith(SUFFIX):  # A user's method is run, and so needs torch.
        quiet_libraries()
        from sku.methods import method_named

        methods[name] = described([method_named(name)])[0]
    if name in launchers:
        text = launchers[name]
        content: dict[str, Any] = {"name": name, "path": text}
    elif name in methods:
        content = methods[name]
        path = f"methods.{content['name']}.settings"
        told = {"method": name} if name.endswith(SUFFIX) else {}
        told |= {f"{path}.{key}": value for key, value in content["settings"].items()}
        text = f"# {content['title']}: {content['paper']}\n"
        text += "\n".join(f"{key}={json.dumps(value)}" for key, value in told.items()) or "# see acquire and negate"
    else:
        if name not in recipe_names() and Path(name).suffix not in (".yaml", ".yml"):
            raise RecipeError(f"nothing that ships is named {name}.{did_you_mean(name, _shown())}")
        content = load_recipe(name).to_dict()
        text = yaml.safe_dump(content, sort_keys=False)
    if as_json:
        print_json(content)
    else:
        results.print(text.rstrip())


def described(methods: Iterable[AnyMethod]) -> list[dict[str, Any]]:
    """What ``listed_methods`` says, of methods themselves: ``scripts/method_list.py`` writes it, a test compares."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper_url,
            "negates": method.negates,
            # Those of SKU are acquire and negate of the recipe.
            "settings": {} if method.name == "sku" else dataclasses.asdict(method.settings()),
        }
        for method in methods
    ]


def _write(
    forget: str, model: str, retain: str | None, judge: str | None, overrides: list[str], out: Path, *, as_json: bool
) -> None:
    if out.exists():
        raise OutputError(f"{out} is there already: name another file with --out")
    made = options.recipe_made_for(model)
    source = made or options.GENERAL
    commented = YAML()  # Keeps comments.
    commented.width = 1000
    content = commented.load(recipe_text(source)[0])
    described = content["description"]
    if made is None:
        content.update(options.called_by(model, source))
        content["model"] = {"path": model}
    _replace(content["data"], "forget", {"path": forget})
    if retain is not None:
        _replace(content["data"], "retain", {"path": retain})
    if judge is not None:
        _replace(content["evaluate"], "judge", judge)
    for override in overrides:
        _set(content, override)
    text = io.StringIO()
    commented.dump(content, text)
    body = text.getvalue()
    body = body[body.index("name:") :]  # The comment in front is about another file.
    recipe = recipe_from_dict(read_yaml(body), "with these options")  # Before a file stands that can't be run.
    run = shlex.join(["sku", "run", str(out), "--out", f"runs/{recipe.name}"])
    with named_disk_errors(out):
        write_text(out, f"# {run}\n#\n# Settings of recipe {source}: {described}\n{body}")
    if as_json:
        print_json({"recipe": str(out), "settings": recipe.to_dict()})
        return
    results.print(f"recipe    {out}, with the settings of {source}")
    print_next(["run", out, "--dry-run"], ["run", out, "--out", f"runs/{recipe.name}"])


def _set(content: Any, override: str) -> None:
    """Puts a value of ``--set`` in, at a key as ``sku run --set`` takes it."""
    apply_override(content, override)
    *parents, last = override.partition("=")[0].split(".")
    section = content
    for parent in parents:
        section = section[parent]
    if isinstance(section, CommentedMap):
        section.ca.items.pop(last, None)  # It spoke of the value that stood there.


def _replace(section: Any, key: str, value: Any) -> None:
    """Puts a value in, and leaves the comment of the old one out, which spoke of that."""
    section[key] = value
    section.ca.items.pop(key, None)


_LITTLE_SPACE, _TOO_LITTLE_SPACE = 20 * 2**30, 2**30


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str


def doctor(
    out: Annotated[Path, typer.Option(help="Where runs will go.")] = Path("runs"),
    offline: Annotated[bool, typer.Option("--offline", help="Don't ask the hub for a sign of life.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Look at versions, devices, disk and hub. Exit code 1 where a run would fail."""
    quiet_imports()
    checks = [*_packages(), _device(), _disk(out), *([] if offline else [_hub()])]
    ready = all(check.status != "problem" for check in checks)
    if as_json:
        print_json({"ready": ready, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            results.print(f"{check.status:<9}{check.name:<19}{check.found}")
        results.print(f"\n{'ready' if ready else 'not ready: see the problems above'}")
    if not ready:
        raise typer.Exit(1)


def _packages() -> Iterator[Check]:
    """Python, and what the package requires, that of its extras where it is installed."""
    yield Check("python", "ok", f"{platform.python_version()}, {platform.platform()}, sku {__version__}")
    required = {wanted.name: wanted for wanted in map(Requirement, metadata.requires("sku-unlearning") or ())}
    for wanted in required.values():
        if any(f'"{extra}"' in str(wanted.marker) for extra in ("dev", "docs")):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if wanted.marker is None:
                yield Check(wanted.name, "problem", f"missing: pip install '{wanted}'")
            continue
        if wanted.specifier.contains(version, prereleases=True):
            yield Check(wanted.name, "ok", version)
        else:
            status: Literal["warning", "problem"] = "problem" if wanted.marker is None else "warning"
            yield Check(wanted.name, status, f"{version}: pip install '{wanted.name}{wanted.specifier}'")


def _device() -> Check:
    try:
        import torch

        if not torch.cuda.is_available():
            return Check("device", "ok", "MPS" if torch.backends.mps.is_available() else "CPU only")
        sizes = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            torch.zeros(1, device=f"cuda:{index}").add_(1).item()
            sizes.append(f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    except (ImportError, OSError, RuntimeError) as error:
        return Check("device", "problem", f"torch can't use it: {' '.join(str(error).split())[:200]}")
    return Check("device", "ok", "; ".join(sizes))


def _disk(folder: Path) -> Check:
    try:
        check_can_be_made(folder)
    except OutputError as error:
        return Check("disk", "problem", f"{error}: choose another --out")
    free = free_bytes(folder)
    status: Literal["ok", "warning", "problem"] = "ok" if free >= _LITTLE_SPACE else "warning"
    return Check("disk", "problem" if free < _TOO_LITTLE_SPACE else status, f"{free / 2**30:.1f} GiB free at {folder}")


def _hub() -> Check:
    from sku.model_files import out_of_reach

    why = out_of_reach()
    return Check("hub", "ok" if why is None else "warning", "answers" if why is None else why)
