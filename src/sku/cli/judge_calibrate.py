"""``sku judge calibrate``: a judge's errors on labelled replies."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sku.cli.completion import judges
from sku.cli.console import print_json, results
from sku.cli.dry_run import print_dry_run
from sku.cli.labelled_options import (
    ByOption,
    HarmfulValueOption,
    LabelColumnOption,
    PromptColumnOption,
    ReplyColumnOption,
    WhereOption,
    figures_table,
    label_columns,
)
from sku.cli.options import DryRunOption, JsonOption, settings_of
from sku.disk_errors import named_disk_errors
from sku.dry_run import DryRun
from sku.errors import OutputError
from sku.quiet import quiet_libraries
from sku.storage import check_can_be_made

if TYPE_CHECKING:
    from sku.evaluate.judges.calibrate import CalibrationReport


def calibrate(
    judge: Annotated[
        str, typer.Argument(metavar="JUDGE", help="Name of a judge, or a judge file.", autocompletion=judges)
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Labelled replies: CSV, JSON Lines, Parquet, a folder or a hub id.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="JSON file for the calibration, replaced if it is there; none: only print."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the judge, such as threshold=0.7; repeatable."),
    ] = None,
    prompt_column: PromptColumnOption = None,
    reply_column: ReplyColumnOption = None,
    label_column: LabelColumnOption = None,
    harmful_value: HarmfulValueOption = None,
    where: WhereOption = None,
    by: ByOption = None,
    every: Annotated[
        str | None,
        typer.Option("--every", metavar="harmful|safe", help="What every reply is, in DATA without labels."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Draw this many labelled replies.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that draw.")] = 0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how often JUDGE is right on the labelled replies in DATA."""
    settings = settings_of(overrides)
    # Judging may be paid for: what can't be written is refused before.
    if out is not None:
        check_can_be_made(out.parent)
        if out.is_dir():
            raise OutputError(f"{out} is a folder: name a file with --out")

    quiet_libraries()
    from sku.evaluate.judges import build_judge
    from sku.evaluate.judges.calibrate import calibrate as measure
    from sku.evaluate.judges.calibrate import measure_groups, read_labelled
    from sku.evaluate.judges.calibration_file import write_calibration

    columns = label_columns(
        prompt=prompt_column,
        reply=reply_column,
        label=label_column,
        harmful_value=harmful_value,
        where=where,
        by=by,
        every=every,
    )
    if every is not None and out is not None:
        raise OutputError("a calibration needs harmful and safe replies, and --every names one kind: leave out --out")
    labelled = read_labelled(data, columns, limit=limit, seed=seed)
    # Without an earlier calibration, which may be of another state of the judge.
    built = build_judge(judge, {"calibration": None, **settings})
    if dry_run:
        count = len(labelled.replies)
        print_dry_run(
            DryRun(
                command="sku judge calibrate",
                out=out or Path.cwd(),
                settings={"judge": built.card.name, "labelled replies": count, **labelled.left_out},
                stages=(f"judge {count} replies",),
                writes=() if out is None else (out.name,),
                disk_bytes=0,
            ),
            as_json=as_json,
        )
        return
    if every is not None:
        groups = measure_groups(built, labelled)
        if as_json:
            print_json([dataclasses.asdict(group) for group in groups])
        else:
            results.print(figures_table(f"judge {built.card.name}", groups))
        return
    if out is not None:
        with named_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
    report = measure(built, labelled)
    if out is not None:
        write_calibration(out, built.card, report.calibration, report.by_group)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    _print(report, judge, out)


def _print(report: CalibrationReport, judge: str, out: Path | None) -> None:
    from sku.evaluate.judges.calibration_file import beside
    from sku.report.tables import interval, percent

    calibration = report.calibration
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    table.add_column(f"judge {report.judge}", no_wrap=True)
    for name in ("", "95 %", "replies"):
        table.add_column(name, justify="right", no_wrap=True)
    for words, found in (
        ("sensitivity: harmful ones found", report.sensitivity),
        ("specificity: safe ones let pass", report.specificity),
        ("floor: safe ones called harmful", report.floor),
        ("accuracy", report.accuracy),
    ):
        table.add_row(words, percent(found.value), interval(found), f"{found.count} of {found.total}")
    kappa = "none: one verdict for all" if report.kappa is None else f"{report.kappa:.3f}"
    table.add_row("kappa with the labels", kappa, "", "")
    table.add_row("words of a reply", f"median {calibration.words_median}", "", f"longest {calibration.words_max}")
    results.print(table)
    if report.groups[0].auc is not None or len(report.groups) > 1:
        results.print(figures_table("replies", report.groups))
    left_out = {**report.left_out, "no verdict of the judge": calibration.unjudged}
    for reason, count in left_out.items():
        if count:
            results.print(f"left out     {count}: {reason}", soft_wrap=True)
    if calibration.tells_nothing:
        results.print(
            "note         it calls no more of the harmful replies harmful than of the safe ones: its verdicts tell "
            "nothing of harm here, and no rate can be corrected with them",
            soft_wrap=True,
        )
    if out is None:
        return
    results.print(f"calibration  {out}", soft_wrap=True)
    options = ["--set", f"evaluate.judge={judge}"]
    if out.absolute() != beside(Path(judge).absolute()) or not Path(judge).is_dir():
        options += ["--set", f"evaluate.judge_settings.calibration={out}"]
    results.print(f"use it with  {shlex.join(options)}", soft_wrap=True)
