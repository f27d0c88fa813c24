"""Commands that read labelled replies: ``sku judge train`` and ``sku judge calibrate``."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from sku.cli.console import carry_out, plain_table, print_json, print_next, results
from sku.cli.options import DryRunOption, JsonOption, judges, set_option, settings_of
from sku.errors import OutputError, RecipeError
from sku.plan import Plan
from sku.quiet import quiet_libraries
from sku.storage import check_can_be_made, check_new, named_disk_errors

if TYPE_CHECKING:
    from sku.evaluate.judges import Judge
    from sku.evaluate.judges.calibrate import CalibrationReport, GroupFigures, LabelColumns, LabelledSet
    from sku.evaluate.judges.train import TrainedJudge
    from sku.evaluate.metrics import Rate

DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="Labelled replies: CSV, JSON Lines, Parquet, a folder or a hub id.")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="prompt|reply|label=NAME",
        help="What a column of the table is called, such as reply=answer; repeatable.",
    ),
]
HarmfulValueOption = Annotated[
    str | None, typer.Option("--harmful-value", help="The label of harmful replies; all others are then safe.")
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="COLUMN=VALUE[,VALUE]",
        help="Only rows with one of these values in a column, such as split_hint=train; repeatable.",
    ),
]
ByOption = Annotated[
    str | None,
    typer.Option("--by", metavar="COLUMN", help="Figures for each value of a column too, such as source."),
]


def train(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="New folder for the judge.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id to start from; all-MiniLM-L6-v2 if not given.")
    ] = None,
    where: WhereOption = None,
    by: ByOption = None,
    columns: ColumnOption = None,
    harmful_value: HarmfulValueOption = None,
    overrides: Annotated[list[str] | None, set_option("A setting of training, such as epochs=3")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the new head and the order of rows.")] = 0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a judge on the labelled replies in DATA; the folder it writes is then a judge's name."""
    given = {**({} if model is None else {"model": model}), **settings_of(overrides), "seed": seed}
    read_as = label_columns(columns, harmful_value=harmful_value, where=where, by=by)
    check_new(out)
    check_can_be_made(out.parent)

    quiet_libraries()
    from sku.config import settings_from_dict
    from sku.evaluate.judges.calibrate import read_labelled
    from sku.evaluate.judges.train import JudgeTraining, split_by_prompt, train_judge

    settings = settings_from_dict(JudgeTraining, given, "sku judge train", "settings of training")
    labelled = read_labelled(data, read_as)
    parts = split_by_prompt(labelled.replies, settings.validation_fraction, settings.seed)
    plan = Plan(
        command="sku judge train",
        out=out,
        settings={
            "model": settings.model,
            "replies to train on": len(parts[0]),
            "replies held out": len(parts[1]),
            **labelled.left_out,
        },
        stages=(f"train on {len(parts[0])} replies, at most {settings.epochs} epochs",),
        writes=(out.name,),
        execute=lambda progress: train_judge(labelled, settings, out, progress=progress),
    )
    trained = carry_out(plan, dry_run=dry_run, as_json=as_json)
    if as_json:
        print_json({**dataclasses.asdict(trained), "folder": str(out)})
        return
    _print_trained(trained, labelled, out)


def calibrate(
    judge: Annotated[
        str, typer.Argument(metavar="JUDGE", help="Name of a judge, or a judge file.", autocompletion=judges)
    ],
    data: DataArgument,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the calibration, replaced if it is there; none: only print.")
    ] = None,
    overrides: Annotated[list[str] | None, set_option("A setting of the judge, such as threshold=0.7")] = None,
    columns: ColumnOption = None,
    harmful_value: HarmfulValueOption = None,
    where: WhereOption = None,
    by: ByOption = None,
    every: Annotated[
        str | None, typer.Option(metavar="harmful|safe", help="What every reply is, in DATA without labels.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw this many labelled replies.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
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
    from sku.evaluate.batching import stage
    from sku.evaluate.judges.cache import cached
    from sku.evaluate.judges.calibrate import read_labelled
    from sku.evaluate.judges.choose import build_judge

    read_as = label_columns(columns, harmful_value=harmful_value, where=where, by=by, every=every)
    if every is not None and out is not None:
        raise OutputError("a calibration needs harmful and safe replies, and --every names one kind: leave out --out")
    labelled = read_labelled(data, read_as, limit=limit, seed=seed)
    # Without an earlier calibration, which may be of another state of the judge.
    built = build_judge(judge, {"calibration": None, **settings})
    count = len(labelled.replies)
    plan = Plan(
        command="sku judge calibrate",
        out=out or Path.cwd(),
        settings={"judge": built.card.name, "labelled replies": count, **labelled.left_out},
        stages=(f"judge {count} replies",),
        writes=() if out is None else (out.name,),
        execute=lambda progress: _measured(
            cached(built, None, stage(progress, "judge")), labelled, out, one_kind=every is not None
        ),
    )
    found = carry_out(plan, dry_run=dry_run, as_json=as_json)
    if as_json:
        print_json(
            [dataclasses.asdict(one) for one in found] if isinstance(found, tuple) else dataclasses.asdict(found)
        )
    elif isinstance(found, tuple):
        results.print(figures_table(f"judge {built.card.name}", found))
    else:
        _print(found, judge, out)


def _measured(
    built: Judge, labelled: LabelledSet, out: Path | None, *, one_kind: bool
) -> CalibrationReport | tuple[GroupFigures, ...]:
    from sku.evaluate.judges import write_calibration
    from sku.evaluate.judges.calibrate import calibrate as measure
    from sku.evaluate.judges.calibrate import measure_groups

    if one_kind:
        return measure_groups(built, labelled)
    if out is not None:
        with named_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
    report = measure(built, labelled)
    if out is not None:
        write_calibration(out, built.card, report.calibration)
    return report


def _print(report: CalibrationReport, judge: str, out: Path | None) -> None:
    from sku.evaluate.judges import beside
    from sku.report.words import interval, percent

    calibration = report.calibration
    table = plain_table((f"judge {report.judge}",), ("", "95 %", "replies"))
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
            results.print(f"left out     {count}: {reason}")
    if calibration.tells_nothing:
        results.print(
            "note         it calls no more of the harmful replies harmful than of the safe ones: its verdicts tell "
            "nothing of harm here, and no rate can be corrected with them"
        )
    if out is None:
        return
    results.print(f"calibration  {out}")
    options = ["--set", f"evaluate.judge={judge}"]
    if out.absolute() != beside(Path(judge).absolute()) or not Path(judge).is_dir():
        options += ["--set", f"evaluate.judge_settings.calibration={out}"]
    results.print(f"use it with  {shlex.join(options)}")


def _print_trained(trained: TrainedJudge, labelled: LabelledSet, out: Path) -> None:
    from sku.evaluate.judges import beside

    results.print(figures_table("held-out prompts", trained.figures))
    results.print(
        f"judge      {out}: {trained.train} replies, {trained.epochs} epochs, {trained.seconds:.0f} s; harmful from "
        f"{trained.threshold:.3f}"
    )
    for why, count in {**labelled.left_out, "the model can't read them": trained.unreadable}.items():
        if count:
            results.print(f"left out   {count}: {why}")
    print_next(["judge", "calibrate", out, "OTHER_LABELLED_DATA", "--by", "source", "--out", beside(out)])


def label_columns(
    columns: Sequence[str] | None,
    *,
    harmful_value: str | None,
    where: Sequence[str] | None,
    by: str | None,
    every: str | None = None,
) -> LabelColumns:
    """What the options say of the columns.

    Raises:
        RecipeError: A ``--column`` or ``--where`` that names none, or ``--every`` that is neither harmful nor safe.
    """
    from sku.evaluate.judges.calibrate import LABEL_WORDS, LabelColumns

    wanted: dict[str, tuple[str, ...]] = {}
    for column, values in _named("--where", where, "COLUMN=VALUE, such as split_hint=train"):
        wanted[column] = (*wanted.get(column, ()), *values.split(","))
    called = dict(_named("--column", columns, "prompt=NAME, reply=NAME or label=NAME"))
    if wrong := called.keys() - {"prompt", "reply", "label"}:
        raise RecipeError(f"--column {wrong.pop()}=...: it must be prompt, reply or label")
    if every is not None and every not in LABEL_WORDS:
        raise RecipeError(f"--every is {every}; it must be harmful or safe")
    return LabelColumns(
        **called,
        harmful_value=harmful_value,
        every=None if every is None else LABEL_WORDS[every],
        group=by,
        where=wanted,
    )


def _named(option: str, given: Sequence[str] | None, like: str) -> Iterator[tuple[str, str]]:
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise RecipeError(f"{option} {text} must look like {like}")
        yield name, value


def figures_table(title: str, figures: Sequence[GroupFigures]) -> Table:
    """Sensitivity, specificity and AUC of a judge, a line a group."""
    first = Column(title, overflow="fold", min_width=8)
    figures_of = ("harmful", "safe", "sensitivity, %", "specificity, %", "AUC")
    table = plain_table((first,), figures_of, padding=(0, 1, 0, 0))
    for found in figures:
        area = "\u2013" if found.auc is None else f"{found.auc:.2f} ({found.auc_low:.2f} to {found.auc_high:.2f})"
        shares = (_share(found.sensitivity), _share(found.specificity))
        table.add_row(found.group, str(found.harmful), str(found.safe), *shares, area)
    return table


def _share(found: Rate | None) -> str:
    """In per cent; so short that a line of 80 columns leaves room for the name of the group."""
    if found is None:
        return "\u2013"
    return f"{100 * found.value:.1f} ({100 * found.low:.0f} to {100 * found.high:.0f})"
