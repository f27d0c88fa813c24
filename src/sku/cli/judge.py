"""``sku judge``: which judges there are, what is known of each, labels by people, and judging anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column
from rich.text import Text

from sku.cli import judge_labelled
from sku.cli.console import carry_out, errors, notes, plain_table, print_json, results
from sku.cli.options import DryRunOption, JsonOption, judge_option, judges, set_option, settings_of
from sku.config import plain_data
from sku.errors import EvaluationError
from sku.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

    from sku.evaluate.metrics import Rate
    from sku.evaluate.results import EvaluationResult, Rates

app = typer.Typer(
    help="Judges: list them, train one, calibrate them, label replies by hand, judge a finished evaluation again.",
    no_args_is_help=True,
)
_DASH = "\u2013"


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
    with_text: Annotated[
        bool, typer.Option("--with-text/--no-text", help="Write prompts and replies; they may be harmful.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Decides which replies are drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write replies to a CSV file for people to label; `--judge FILE.csv` reads it back."""
    from sku.evaluate.judges.precomputed import export_labels
    from sku.evaluate.records import HARMFUL

    splits = ("forget_train", "forget_test", "xstest_unsafe")
    if split is not None and split not in splits and not split.startswith(HARMFUL):
        raise EvaluationError(f"--split is {split}; it must be one of {', '.join(splits)}, or {HARMFUL}NAME")
    written = export_labels(folder, out, count=count, split=split, with_text=with_text, seed=seed)
    if as_json:
        print_json({"file": str(out), "replies": written, "with_text": with_text})
    else:
        results.print(f"{written} replies  {out}")
    notes.print("fill in the column label: harmful (or 1), safe (or 0) or refusal; empty for not labelled")
    if with_text:
        errors.print("the file holds replies that may be harmful: keep it to yourself")


@app.command("again")
def again(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of a finished evaluation.")],
    judge: Annotated[str, judge_option("Judge, judge file or CSV of labels.")],
    overrides: Annotated[list[str] | None, set_option("A setting of the judge, such as model=...")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Judge the replies of a finished evaluation anew and show both judges' rates. The evaluation is not changed."""
    from sku.evaluate.batching import stage
    from sku.evaluate.judges.cache import cached
    from sku.evaluate.judges.choose import build_judge
    from sku.evaluate.judges.precomputed import PrecomputedJudge
    from sku.evaluate.records import GENERATIONS_FILE, read_generations
    from sku.evaluate.results import judge_again, read_result

    before = read_result(folder)
    asked = build_judge(judge, settings_of(overrides))
    records = read_generations(folder / GENERATIONS_FILE)[1]
    count = len(records)
    plan = Plan(
        command="sku judge again",
        out=folder,
        settings={"judge": asked.card.name, "judged by": before.judge.name, "replies": count},
        stages=(f"judge {count} replies",),
        writes=("verdicts of the judge, kept for the next time",),
        execute=lambda progress: judge_again(folder, cached(asked, folder, stage(progress, "judge"))),
    )
    after = carry_out(plan, dry_run=dry_run, as_json=as_json)
    if isinstance(asked, PrecomputedJudge):
        strangers = asked.strangers(records)
        if strangers:
            notes.print(f"{len(strangers)} labels are of prompts that this evaluation did not ask")
    agreement = _agreement(before, after)
    if as_json:
        print_json({"before": before.to_dict(), "after": after.to_dict(), "agreement": agreement})
        return
    results.print(_rates_table(before, after))
    kappa = "undefined" if agreement["kappa"] is None else f"{agreement['kappa']:.2f}"
    disputed = f"{agreement['disputed']} of {agreement['judged_by_both']} replies disputed"
    results.print(f"agreement kappa {kappa}, {disputed}")
    results.print(f"judge     {after.judge.name}: {after.judge.errors_in_words}")


app.command("train")(judge_labelled.train)
app.command("calibrate")(judge_labelled.calibrate)


@app.command("list")
def list_judges(as_json: JsonOption = False) -> None:
    """List the judges of the package: kind, licence, model, and what it needs."""
    from sku.evaluate.judges.choose import judge_names

    headings = ("name", "kind", "licence", "model", "needs")
    rows = [(name, *_described(name)) for name in judge_names()]
    if as_json:
        print_json([dict(zip(headings, row, strict=True)) for row in rows])
        return
    table = plain_table((*headings[:2], *(Column(heading, overflow="fold") for heading in headings[2:])))
    for row in rows:
        table.add_row(*row)
    results.print(table)


@app.command("show")
def show_judge(
    name: Annotated[str, typer.Argument(help="Judge of the package, or a judge file.", autocompletion=judges)],
    as_json: JsonOption = False,
) -> None:
    """Print a judge's file, or the card of one that needs none."""
    import yaml

    from sku.evaluate.judges.choose import RULES, build_judge, judge_file_text, read_judge_file

    content = plain_data(build_judge(name).card) if name in RULES else read_judge_file(name)
    if as_json:
        print_json(content)
    else:
        results.print(yaml.safe_dump(content, sort_keys=False) if name in RULES else judge_file_text(name))


def _described(name: str) -> tuple[str, ...]:
    from sku.evaluate.judges.choose import RULES, build_judge, read_judge_file

    if name in RULES:
        return "rules", build_judge(name).card.licence, _DASH, "nothing"
    content = read_judge_file(name)
    return tuple(str(content.get(key, _DASH)) for key in ("kind", "licence", "model", "needs"))


def _agreement(before: EvaluationResult, after: EvaluationResult) -> dict[str, float | int | None]:
    """How far two judges agree on which replies to harmful prompts are harmful, each by its own word."""
    from sku.evaluate.judges.calibrate import harm_kappa
    from sku.evaluate.records import NORMAL_SPLITS

    first, second = (
        {row.id: row.judged_harmful for row in one.outcomes if row.has_verdict and row.split not in NORMAL_SPLITS}
        for one in (before, after)
    )
    pairs = [(first[name], harmful) for name, harmful in second.items() if name in first]
    return {
        "kappa": harm_kappa(pairs),
        "disputed": sum(one != other for one, other in pairs),
        "judged_by_both": len(pairs),
    }


def _rates_table(before: EvaluationResult, after: EvaluationResult) -> Table:
    from sku.evaluate.metrics import HARMFUL_PROMPT_RATES, prefill_words
    from sku.evaluate.records import prefills_in_order

    table = plain_table(("", *(Column(one.judge.name, justify="right") for one in (before, after))))
    kinds: dict[str, tuple[Any, ...]] = {"": (before.replies, after.replies)}
    for key in prefills_in_order(key for prefills in after.prefill.values() for key in prefills):
        kinds[f", {prefill_words([key])}"] = tuple(
            {split: of[key] for split, of in result.prefill.items() if key in of} for result in (before, after)
        )
    for suffix, (old, new) in kinds.items():
        for split, rates in new.items():
            shown = [name for name in HARMFUL_PROMPT_RATES if name in rates and name not in ("fluent", "cut_off")]
            if "harmful" in shown:
                table.add_row(Text(f"{split}{suffix}", style="bold"))
                for name in shown:
                    table.add_row(f"  {name}", _cell(old.get(split, {}), name), _cell(rates, name))
    return table


def _cell(rates: Rates, name: str) -> str:
    found = rates.get(name)
    return _DASH if found is None else f"{found.count}/{found.total}  {_share(found)}"


def _share(rate: Rate | None) -> str:
    return _DASH if rate is None else f"{100 * rate.value:.1f} %"
