"""``sku data``: look at what a run would train on, and have the model write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from sku.cli import options
from sku.cli.console import errors, perform, plain_table, print_json, print_next, print_notes, printable, results
from sku.config import EMBEDDED
from sku.errors import RecipeError
from sku.progress import quiet_libraries
from sku.storage import check_new

if TYPE_CHECKING:
    from sku.own_replies import OwnOptions, OwnReplies

LEARNED = "green underline"
"""Style of the tokens that are trained on."""
_PROMPTS = "file, folder or hub id; answers in it are not read."

app = typer.Typer(help="Look at the data of a recipe, or have the model write it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at the data of a recipe, or have the model write it."""


@app.command("own")
def own(
    model: Annotated[str, typer.Option(help="Folder or hub id of the model that is to speak.")],
    harmful: Annotated[str, typer.Option(metavar="PROMPTS", help=f"Harmful prompts: {_PROMPTS}")],
    normal: Annotated[str, typer.Option(metavar="PROMPTS", help=f"Normal prompts: {_PROMPTS}")],
    judge: Annotated[str, options.judge_option("Judge or judge file that tells which replies are harmful.")],
    out: Annotated[Path, typer.Option(help="New folder for the rows, readable by you alone.")],
    borderline: Annotated[
        str | None, typer.Option(metavar="PROMPTS", help="Safe prompts that look harmful, as XSTest's do.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of a GGUF file in the folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts of each set, by the seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled replies and the limits.")] = 0,
    overrides: Annotated[
        list[str] | None,
        options.set_option("A setting, such as samples=5, harmful.limit=500 or judge_settings.threshold=0.7"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted call of the same.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write data in the model's own words: what it says to harmful prompts, how it refuses, what it answers else."""
    given = options.settings_of(overrides)
    _put(given, "model", {"path": model, "gguf_file": gguf_file})
    for name, path in (("harmful", harmful), ("normal", normal), ("borderline", borderline)):
        if path is not None:
            _put(given, name, {"path": path, "limit": limit})
    given |= {"judge": judge, "seed": seed}
    check_new(out)

    quiet_libraries()
    from sku.config import settings_from_dict
    from sku.model_files import with_gguf_file
    from sku.own_replies import OwnOptions
    from sku.pipeline.stages import run_own

    asked = settings_from_dict(OwnOptions, given, "", "settings of sku data own")
    asked = dataclasses.replace(asked, model=with_gguf_file(asked.model))
    written = perform(
        lambda show: run_own(asked, out, resume=resume, progress=show),
        headline=f"model {asked.model.path}, judge {judge}, seed {asked.seed}",
        interrupted="interrupted; go on with the same command and --resume",
    )
    if as_json:
        print_json(dict(written.account))
    else:
        _print_written(written, asked)


def _put(given: dict[str, Any], name: str, chosen: dict[str, Any]) -> None:
    """Lays options over settings of the same name; what was not given leaves the settings as they are."""
    named = given.setdefault(name, {})
    if not isinstance(named, dict):
        raise RecipeError(f"--set {name}={named} gives --{name} twice: leave one out")
    named |= {key: value for key, value in chosen.items() if value is not None}


def _print_written(written: OwnReplies, asked: OwnOptions) -> None:
    account = written.account
    table = plain_table(("kind",), ("asked", "kept", "prompts", "texts", "cut off"))
    for kind, counts in account["kinds"].items():
        cells = (counts[name] for name in ("asked", "kept", "prompts", "different_texts", "unfinished"))
        table.add_row(kind, *map(str, cells))
    results.print(table)
    for kind, counts in account["kinds"].items():
        if counts["dropped"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
            results.print(f"dropped   {kind}: {reasons}")
    for reason, count in account["left_out"].items():
        results.print(f"left out  {count}: {reason}")
    results.print(f"tokens    {account['tokens']:,} written in {account['seconds']:.0f} s")
    results.print(f"judge     {account['judge']['name']}: {account['judge']['errors']}")
    results.print(f"rows      {written.folder}")
    errors.print("comply.jsonl holds what the model says to harmful prompts: keep it to yourself")
    if written.kept("comply"):
        data: list[str | Path] = ["--forget", written.file("comply"), "--retain", written.file("answer")]
        named = [asked.model.path]
        if asked.model.gguf_file is not None:
            named += ["--set", f"model.gguf_file={asked.model.gguf_file}"]
        print_next(["data", "inspect", *named, *data], ["run", *named, *data])


@app.command("inspect")
def inspect(
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    show_harmful: Annotated[
        bool, typer.Option("--show-harmful", help="Print harmful answers; hidden behind length and hash otherwise.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show what was loaded, how it is split, and which tokens are trained on."""
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides
    )

    quiet_libraries()
    from sku.data.inspect import describe_data
    from sku.data.load import load_data
    from sku.data.tokens import Encoder, resolve_prompt_format
    from sku.models import load_tokenizer

    tokenizer = load_tokenizer(settings.model)
    written = resolve_prompt_format(settings.model.prompt_format, tokenizer)
    description = describe_data(
        load_data(settings.data, settings.seed, forget_validation=settings.forget_validation),
        Encoder(tokenizer, written, settings.data.max_length, settings.data.max_answer_tokens),
        show_harmful=show_harmful,
    )
    if as_json:
        print_json(description)
    else:
        _print(description)


def _print(description: Mapping[str, Any]) -> None:
    for source in description["provenance"]:
        results.print(f"{source['source']}: {source['location']}")
        facts = {"rows read": source["rows_read"], **source["rows_left_out"], "revision": source["revision"]}
        facts |= {"licence": source["licence"] or "unknown", "sha256": source["sha256"][:16]}
        results.print("  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value))
    results.print(f"prompt format {description['prompt_format']}, at most {description['max_length']} tokens")
    figures = ("examples", "prompts", "left out", "shortened", "tokens", "learned")
    table = plain_table(("split",), figures, padding=(0, 1, 0, 0))
    for name, split in description["splits"].items():
        report = split["tokenization"]
        shortened = report["prompts_shortened"] + report["answers_shortened"]
        counts = (split["examples"], split["groups"], sum(report["left_out"].values()), shortened)
        lengths = ("/".join(str(split[f"{what}_percentiles"][rank]) for rank in (50, 90, 100))
                   for what in ("length", "learned"))  # fmt: skip
        table.add_row(name, *map(str, counts), *lengths)
    results.print(table)
    results.print("tokens, learned: median / 90th percentile / most of an example")
    cut = [f"{name} {split['unfinished']}" for name, split in description["splits"].items() if split["unfinished"]]
    if cut:
        results.print(f"answers that were cut off and teach no end: {', '.join(cut)}")
    print_notes(description["notes"])
    results.print(Text.assemble("\nTokens that are trained on stand in ", ("green", LEARNED), "."))
    for view in description["views"]:
        results.print(_tokens(view))


def _tokens(view: Mapping[str, Any]) -> Text:
    category = f" ({view['category']})" if view["category"] else ""
    line = Text(printable(f"{view['split']}{category}: "), style="bold")
    for token in view["tokens"]:
        line.append(printable(token["text"]), style=LEARNED if token["learned"] else "dim")
    return line
