"""``sku init``, ``sku doctor``: what ships with the package, a recipe of one's own from it, and what a machine has."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import operator
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
    return {path.name.removesuffix(".yaml"): str(path) for path in sorted(folder.iterdir(), key=str)}


def _shown() -> list[str]:
    return [*recipe_names(), *options.method_names(), *_launchers()]


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
        source, model, named = options.recipe_for(model)
        named += options.overrides_of(model=model, forget=name, retain=retain, judge=judge, overrides=overrides)
        _write(source, named, out, as_json=as_json)
        return
    if any(option is not None for option in (model, retain, judge, overrides)):
        raise RecipeError("--model, --retain, --judge and --set write a recipe: sku init PROMPTS --model MODEL")
    if name is None:
        _list(as_json=as_json)
    else:
        _show(name, as_json=as_json)


def _list(*, as_json: bool) -> None:
    recipes = [{"name": name, "description": load_recipe(name).description} for name in recipe_names()]
    methods, launchers = options.listed_methods(), _launchers()
    if as_json:
        listed = [{"name": name, "path": path} for name, path in launchers.items()]
        print_json({"recipes": recipes, "methods": methods, "launchers": listed})
        return
    for recipe in recipes:
        results.print(f"{recipe['name']:<26}{recipe['description']}")
    table = plain_table(("method", "title", "paper"))
    for method in methods:
        table.add_row(method["name"], method["title"], method["paper"])
    results.print()
    results.print(table)
    results.print(f"\nlaunchers {', '.join(launchers)}")


def _show(name: str, *, as_json: bool) -> None:
    launchers, methods = _launchers(), {method["name"]: method for method in options.listed_methods()}
    content: dict[str, Any]
    if name in launchers:
        text = launchers[name]
        content = {"name": name, "path": text}
    elif name in methods:
        content = methods[name]
        text = _method_text(content)
    elif name.endswith(SUFFIX):  # A user's method is run, and so needs torch.
        quiet_libraries()
        from sku.methods import method_named

        [content] = described([method_named(name)])
        text = _method_text(content, f"method={json.dumps(name)}")
    else:
        if name not in recipe_names() and Path(name).suffix not in (".yaml", ".yml"):
            raise RecipeError(f"nothing that ships is named {name}.{did_you_mean(name, _shown())}")
        content = load_recipe(name).to_dict()
        text = yaml.safe_dump(content, sort_keys=False)
    if as_json:
        print_json(content)
    else:
        results.print(text.rstrip())


def _method_text(method: dict[str, Any], *keys: str) -> str:
    """Keys of a recipe that choose it and set it, as ``--set`` takes them."""
    settings = (f"methods.{method['name']}.settings.{key}={json.dumps(value)}"
                for key, value in method["settings"].items())  # fmt: skip
    return "\n".join([f"# {method['title']}: {method['paper']}", *keys, *settings])


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


def _write(name: str, overrides: list[str], out: Path, *, as_json: bool) -> None:
    if out.exists():
        raise OutputError(f"{out} is there already: name another file with --out")
    commented = YAML()  # Keeps comments.
    commented.width = 1000
    content = commented.load(recipe_text(name)[0])
    for override in overrides:
        apply_override(content, override)
        *parents, last = override.partition("=")[0].split(".")
        section = functools.reduce(operator.getitem, parents, content)
        if isinstance(section, CommentedMap):
            section.ca.items.pop(last, None)  # It spoke of the value that stood there.
    text = io.StringIO()
    commented.dump(content, text)
    body = text.getvalue()
    body = body[body.index("name:") :]  # The comment in front is about another file.
    recipe = recipe_from_dict(read_yaml(body), "with these options")  # Before a file stands that can't be run.
    run: list[str | Path] = ["run", out, "--out", f"runs/{recipe.name}"]
    with named_disk_errors(out):
        write_text(out, f"# {shlex.join(['sku', *map(str, run)])}\n#\n# Settings of recipe {name}.\n{body}")
    if as_json:
        print_json({"recipe": str(out), "settings": recipe.to_dict()})
        return
    results.print(f"recipe    {out}, with the settings of {name}")
    print_next(["run", out, "--dry-run"], run)


Status = Literal["ok", "warning", "problem"]


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    status: Status
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
    for name, wanted in required.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if any(f'"{extra}"' in str(wanted.marker) for extra in ("dev", "docs")) or (wanted.marker and not version):
            continue
        if version and wanted.specifier.contains(version, prereleases=True):
            yield Check(name, "ok", version)
        else:
            found = f"{version or 'missing'}: pip install '{name}{wanted.specifier}'"
            yield Check(name, "warning" if wanted.marker else "problem", found)


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
    free = free_bytes(folder) / 2**30
    status: Status = "ok" if free >= 20 else "warning" if free >= 1 else "problem"
    return Check("disk", status, f"{free:.1f} GiB free at {folder}")


def _hub() -> Check:
    from sku.model_files import out_of_reach

    why = out_of_reach()
    return Check("hub", "ok" if why is None else "warning", "answers" if why is None else why)
