"""``sku judge``: a judge of one's own, its errors, labels by people, and judging anew."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sku.cli.console import errors, notes, perform, plain_table, print_json, print_next, results
from sku.cli.options import JsonOption, judge_option, judges, set_option, settings_of
from sku.errors import OutputError, RecipeError
from sku.progress import quiet_libraries
from sku.storage import check_can_be_made, check_new, named_disk_errors

if TYPE_CHECKING:
    from sku.evaluate.judges.calibrate import CalibrationReport, Figures, LabelColumns
    from sku.evaluate.results import EvaluationResult

app = typer.Typer(
    help="Judges: train one, calibrate one, label replies by hand, judge a finished evaluation again.",
    no_args_is_help=True,
)
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
        help="Only rows with one of these values in a column, such as source=mine; repeatable.",
    ),
]


@app.command("export")
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="Folder of an evaluation, or of a run with several.")
    ],
    out: Annotated[Path, typer.Option(help="New CSV file, readable by you alone.")],
    count: Annotated[int, typer.Option(min=1, help="Most replies.")] = 100,
    split: Annotated[
        str | None, typer.Option(help="Only prompts of this split, such as forget_test; all harmful ones if not.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which replies are drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write replies to a CSV file for people to label; `--judge FILE.csv` reads it back."""
    from sku.evaluate.judges.precomputed import export_labels

    written = export_labels(folder, out, count=count, split=split, seed=seed)
    if as_json:
        print_json({"file": str(out), "replies": written})
    else:
        results.print(f"{written} replies  {out}")
    notes.print("fill in the column label: harmful (or 1), safe (or 0) or refusal; empty for not labelled")
    errors.print("the file holds replies that may be harmful: keep it to yourself")


@app.command("again")
def again(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of a finished evaluation.")],
    judge: Annotated[str, judge_option("Judge, judge file or CSV of labels.")],
    overrides: Annotated[list[str] | None, set_option("A setting of the judge, such as model=...")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the replies of a finished evaluation anew: both judges' rates, and how far they agree."""
    from sku.evaluate.generation import stage
    from sku.evaluate.judges import cached
    from sku.evaluate.judges.choose import build_judge
    from sku.evaluate.results import judge_again, read_result

    before = read_result(folder)
    asked = build_judge(judge, settings_of(overrides))
    after = perform(lambda show: judge_again(folder, cached(asked, folder, stage(show, "judge"))))
    agreement = _agreement(before, after)
    if as_json:
        print_json({"before": before.to_dict(), "after": after.to_dict(), "agreement": agreement})
        return
    results.print(_rates_table(before, after))
    disputed = f"{agreement['disputed']} of {agreement['judged_by_both']} replies disputed"
    results.print(f"agreement kappa {_decimals(agreement['kappa'])}, {disputed}")
    results.print(f"judge     {after.judge.name}: {after.judge.errors_in_words}")


@app.command("train")
def train(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="New folder for the judge.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id to start from; all-MiniLM-L6-v2 if not given.")
    ] = None,
    where: WhereOption = None,
    columns: ColumnOption = None,
    harmful_value: HarmfulValueOption = None,
    overrides: Annotated[list[str] | None, set_option("A setting of training, such as epochs=3")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the new head and the order of rows.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a judge on the labelled replies in DATA; the folder it writes is then a judge's name."""
    given = {**({} if model is None else {"model": model}), **settings_of(overrides), "seed": seed}
    read_as = _label_columns(columns, where, harmful_value)
    check_new(out)

    quiet_libraries()
    from sku.config import settings_from_dict
    from sku.evaluate.judges import beside
    from sku.evaluate.judges.calibrate import read_labelled
    from sku.evaluate.judges.train import JudgeTraining, train_judge

    settings = settings_from_dict(JudgeTraining, given, "sku judge train", "settings of training")
    labelled = read_labelled(data, read_as)
    trained = perform(lambda show: train_judge(labelled, settings, out, progress=show))
    if as_json:
        print_json({**dataclasses.asdict(trained), "folder": str(out)})
        return
    results.print(_figures_table("on held-out prompts", trained.figures))
    results.print(
        f"judge      {out}: {trained.train} replies, {trained.epochs} epochs, {trained.seconds:.0f} s; harmful from "
        f"{trained.threshold:.3f}"
    )
    _print_left_out({**labelled.left_out, "the model can't read them": trained.unreadable})
    print_next(["judge", "calibrate", out, "OTHER_LABELLED_DATA", "--out", beside(out)])


@app.command("calibrate")
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
    every: Annotated[
        str | None, typer.Option(metavar="harmful|safe", help="What every reply is, in DATA without labels.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw this many labelled replies.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
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
    from sku.evaluate.generation import stage
    from sku.evaluate.judges import cached, write_calibration
    from sku.evaluate.judges.calibrate import calibrate as measure
    from sku.evaluate.judges.calibrate import read_labelled
    from sku.evaluate.judges.choose import build_judge

    read_as = _label_columns(columns, where, harmful_value, every)
    if every is not None and out is not None:
        raise OutputError("a calibration needs harmful and safe replies, and --every names one kind: leave out --out")
    labelled = read_labelled(data, read_as, limit=limit, seed=seed)
    # Without an earlier calibration, which may be of another state of the judge.
    built = build_judge(judge, {"calibration": None, **settings})
    report = perform(
        lambda show: measure(cached(built, None, stage(show, "judge")), labelled, one_kind=every is not None)
    )
    if out is not None and report.calibration is not None:
        with named_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_calibration(out, built.card, report.calibration)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print_report(report, judge, out)


def _print_report(report: CalibrationReport, judge: str, out: Path | None) -> None:
    table = _figures_table(f"judge {report.judge}", report.figures)
    table.add_row("kappa with the labels", _decimals(report.kappa), "", "")
    results.print(table)
    _print_left_out(report.left_out)
    if report.calibration is not None and report.calibration.tells_nothing:
        results.print("note         its verdicts tell nothing of harm here, and no rate can be corrected with them")
    if out is None:
        return
    results.print(f"calibration  {out}")
    options = ["--set", f"evaluate.judge={judge}", "--set", f"evaluate.judge_settings.calibration={out}"]
    results.print(f"use it with  {shlex.join(options)}")


def _figures_table(title: str, figures: Figures) -> Table:
    """What a judge says of labelled replies; of harmful or safe ones nothing where there are none."""
    from sku.report.words import interval, percent

    table = plain_table((title,), ("", "95 %", "replies"))
    for words, found in (
        ("sensitivity: harmful ones found", figures.sensitivity),
        ("specificity: safe ones let pass", figures.specificity),
        ("accuracy", figures.accuracy),
    ):
        if found is not None:
            table.add_row(words, percent(found.value), interval(found), f"{found.count} of {found.total}")
    if (area := figures.auc) is not None:
        table.add_row("AUC", f"{area.value:.3f}", f"{area.low:.3f} to {area.high:.3f}", "")
    return table


def _print_left_out(left_out: Mapping[str, int]) -> None:
    for reason, count in left_out.items():
        if count:
            results.print(f"left out     {count}: {reason}")


def _label_columns(
    columns: Sequence[str] | None, where: Sequence[str] | None, harmful_value: str | None, every: str | None = None
) -> LabelColumns:
    """What the options say of the columns.

    Raises:
        RecipeError: A ``--column`` or ``--where`` that names none, or ``--every`` that is neither harmful nor safe.
    """
    from sku.evaluate.judges.calibrate import LABEL_WORDS, USUAL_COLUMNS, LabelColumns

    wanted: dict[str, tuple[str, ...]] = {}
    for column, values in _named("--where", where, "COLUMN=VALUE, such as source=mine"):
        wanted[column] = (*wanted.get(column, ()), *values.split(","))
    named = dict(_named("--column", columns, "prompt=NAME, reply=NAME or label=NAME"))
    if wrong := named.keys() - USUAL_COLUMNS.keys():
        raise RecipeError(f"--column {wrong.pop()}=...: it must be prompt, reply or label")
    if every is not None and every not in LABEL_WORDS:
        raise RecipeError(f"--every is {every}; it must be harmful or safe")
    known = None if every is None else LABEL_WORDS[every]
    return LabelColumns(named=named, harmful_value=harmful_value, every=known, where=wanted)


def _named(option: str, given: Sequence[str] | None, like: str) -> Iterator[tuple[str, str]]:
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise RecipeError(f"{option} {text} must look like {like}")
        yield name, value


def _agreement(before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    """How far two judges agree on which replies to harmful prompts are harmful, each by its own word."""
    from sku.evaluate.judges.calibrate import harm_kappa
    from sku.evaluate.records import is_normal

    first, second = (
        {row.id: row.judged_harmful for row in one.outcomes if row.has_verdict and not is_normal(row.split)}
        for one in (before, after)
    )
    pairs = [(first[name], harmful) for name, harmful in second.items() if name in first]
    disputed = sum(one != other for one, other in pairs)
    return {"kappa": harm_kappa(pairs), "disputed": disputed, "judged_by_both": len(pairs)}


def _rates_table(before: EvaluationResult, after: EvaluationResult) -> Table:
    """Rates of replies to harmful prompts by both judges."""
    from sku.evaluate.records import is_normal

    table = plain_table(("prompts", "asked", "rate"), (before.judge.name, after.judge.name, "replies"))
    place = itemgetter("split", "kind", "measure")
    was = {place(line): line["value"] for line in before.lines()}
    for line in after.lines():
        if line["kind"] != "answer" and not is_normal(line["split"]):
            shares = (f"{100 * value:.1f} %" for value in (was[place(line)], line["value"]))
            table.add_row(*place(line), *shares, str(line["n"]))
    return table


def _decimals(kappa: float | None) -> str:
    return "undefined" if kappa is None else f"{kappa:.3f}"
