"""``sku data own``: data in the model's own words, from prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sku.cli.console import carry_out, errors, print_json, print_next, results
from sku.cli.options import DryRunOption, JsonOption, judges, settings_of
from sku.errors import RecipeError
from sku.quiet import quiet_libraries
from sku.storage import check_can_be_made, check_new

if TYPE_CHECKING:
    from sku.own_replies.job import OwnOptions
    from sku.own_replies.rows import OwnReplies

_PROMPTS = "file, folder or hub id; answers in it are not read."


def own(
    model: Annotated[str, typer.Option("--model", help="Folder or hub id of the model that is to speak.")],
    harmful: Annotated[str, typer.Option("--harmful", metavar="PROMPTS", help=f"Harmful prompts: {_PROMPTS}")],
    normal: Annotated[str, typer.Option("--normal", metavar="PROMPTS", help=f"Normal prompts: {_PROMPTS}")],
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="NAME_OR_FILE",
            help="Judge or judge file that tells which replies are harmful.",
            autocompletion=judges,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the rows, readable by you alone.")],
    borderline: Annotated[
        str | None,
        typer.Option("--borderline", metavar="PROMPTS", help="Safe prompts that look harmful, as XSTest's do."),
    ] = None,
    gguf_file: Annotated[str | None, typer.Option("--gguf-file", help="Name of a GGUF file in the folder.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most prompts of each set, by the seed.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampled replies and the limits.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting, such as samples=5, harmful.limit=500 or judge_settings.threshold=0.7; repeatable.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted call of the same.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write data in the model's own words: what it says to harmful prompts, how it refuses, what it answers else."""
    given = settings_of(overrides)
    _put(given, "model", {"path": model, "gguf_file": gguf_file})
    for name, path in (("harmful", harmful), ("normal", normal), ("borderline", borderline)):
        if path is not None:
            _put(given, name, {"path": path, "limit": limit})
    given |= {"judge": judge, "seed": seed}
    check_new(out)
    check_can_be_made(out.parent)

    quiet_libraries()
    from sku.config import settings_from_dict
    from sku.own_replies.job import OwnOptions
    from sku.pipeline.own_replies import plan_own

    options = settings_from_dict(OwnOptions, given, "", "settings of sku data own")
    plan = plan_own(options, out, resume=resume)
    counts = ", ".join(f"{count} {name}" for name, count in plan.settings.items() if name.endswith(" prompts"))
    written = carry_out(
        plan,
        dry_run=dry_run,
        as_json=as_json,
        headline=f"model {options.model.path}, {counts}, judge {plan.settings['judge']}, seed {options.seed}",
        interrupted="interrupted; go on with the same command and --resume",
    )
    if written is not None and as_json:
        print_json(dict(written.account))
    elif written is not None:
        _print(written, options)


def _put(given: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    """Lays options over settings of the same name; what was not given leaves the settings as they are."""
    named = given.setdefault(name, {})
    if not isinstance(named, dict):
        raise RecipeError(f"--set {name}={named} gives --{name} twice: leave one out")
    named |= {key: value for key, value in options.items() if value is not None}


def _print(written: OwnReplies, options: OwnOptions) -> None:
    account = written.account
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for name in ("asked", "kept", "prompts", "texts", "cut off"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, counts in account["kinds"].items():
        cells = (counts[name] for name in ("asked", "kept", "prompts", "different_texts", "unfinished"))
        table.add_row(kind, *map(str, cells))
    results.print(table)
    for kind, counts in account["kinds"].items():
        if counts["dropped"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
            results.print(f"dropped   {kind}: {reasons}")
        if len(counts["how"]) > 1:
            ways = ", ".join(f"{how} {count}" for how, count in counts["how"].items())
            results.print(f"kept      {kind}: {ways}")
    kept = account["kinds"]["answer"]["refusals_kept"]
    if kept:
        results.print(f"note      {kept} answers are refusals of the model itself: they are kept")
    for reason, count in account["left_out"].items():
        results.print(f"left out  {count}: {reason}")
    results.print(f"tokens    {account['tokens']:,} written in {account['seconds']:.0f} s")
    results.print(f"judge     {account['judge']['name']}: {account['judge']['errors']}")
    results.print(f"rows      {written.folder}")
    errors.print("comply.jsonl holds what the model says to harmful prompts: keep it to yourself")
    if written.kept("comply"):
        data: list[str | Path] = ["--forget", written.file("comply"), "--retain", written.file("answer")]
        named = [options.model.path]
        if options.model.gguf_file is not None:
            named += ["--set", f"model.gguf_file={options.model.gguf_file}"]
        print_next(["data", "inspect", *named, *data], ["run", *named, *data])
