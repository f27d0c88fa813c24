"""``sku init``: a recipe of one's own, with every setting that a run would use and a comment for each."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from sku.cli import options
from sku.cli.console import print_json, print_next, results
from sku.config import load_recipe
from sku.config.read import recipe_text
from sku.errors import OutputError
from sku.storage import named_disk_errors, write_text


def init(
    forget: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="Harmful prompts: file, folder or hub id; answers are not read.")
    ],
    model: Annotated[str, typer.Option("--model", help="Folder or hub id of the model to unlearn.")],
    retain: Annotated[
        str | None, typer.Option("--retain", help="Normal prompts, in place of those that ship with SKU.")
    ] = None,
    judge: options.JudgeOption = None,
    out: Annotated[Path, typer.Option("--out", help="New YAML file.")] = Path("recipe.yaml"),
    as_json: options.JsonOption = False,
) -> None:
    """Write the recipe that `sku run MODEL --forget PROMPTS` uses, to read, change and run."""
    if out.exists():
        raise OutputError(f"{out} is there already: name another file with --out")
    made = options.recipe_made_for(model)
    source = made or options.GENERAL
    yaml = YAML()  # Keeps comments.
    yaml.width = 1000
    content = yaml.load(recipe_text(source)[0])
    described = content["description"]
    if made is None:
        content.update(options.called_by(model, source))
        content["model"] = {"path": model}
    _replace(content["data"], "forget", {"path": forget})
    if retain is not None:
        _replace(content["data"], "retain", {"path": retain})
    if judge is not None:
        _replace(content["evaluate"], "judge", judge)
    text = io.StringIO()
    yaml.dump(content, text)
    body = text.getvalue()
    body = body[body.index("name:") :]  # The comment in front is about another file.
    run = shlex.join(["sku", "run", str(out), "--out", f"runs/{content['name']}"])
    with named_disk_errors(out):
        write_text(out, f"# {run}\n#\n# Settings of recipe {source}: {described}\n{body}")
    recipe = load_recipe(out)
    if as_json:
        print_json({"recipe": str(out), "settings": recipe.to_dict()})
        return
    results.print(f"recipe    {out}, with the settings of {source}")
    print_next(["run", out, "--dry-run"], ["plan", out], ["run", out, "--out", f"runs/{recipe.name}"])


def _replace(section: Any, key: str, value: Any) -> None:
    """Puts a value in, and leaves the comment of the old one out, which spoke of that."""
    section[key] = value
    section.ca.items.pop(key, None)
