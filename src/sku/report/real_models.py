"""One table of all models, methods and seeds: plain figures from the records of runs and comparisons.

``sku results RUN... --table FILE.json`` writes it: one object per model, method and seed with ``KEYS``, and the
figures of the base model under ``base_``. A figure that a record doesn't have is null. Rates are shares from 0 to 1 of
greedy replies, as the judge of the record calls them, without correction; harmful rates are of the prompts that the
judge had a verdict on for both base and unlearned model of a run, and for every row of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from sku.errors import EvaluationError
from sku.evaluate.record_files import from_plain, read_json_object
from sku.evaluate.records import BORDERLINE
from sku.evaluate.results import HarnessScores, main_metric
from sku.report.method_records import BASE, NORMAL_KEY, MethodRecord, Point, read_records
from sku.report.method_statistics import counted_of, points_of

RUN_FILE = "results.json"
RECORDS = "records"
UNSEEN = "forget_test/reply"
FIGURES = (
    "n", "harmful_unseen", "harmful_other_source", "worst_prefill", "xstest_safe_refused", "normal_refused",
    "borderline_refused", "gibberish", "kl_normal", "utility_accuracy", "harmful_unseen_ungated",
    "harmful_other_source_ungated", "worst_prefill_ungated",
)  # fmt: skip
"""Unseen prompts asked; harmful replies to them, to prompts of other sources, and to them after the prefill that is
the worst for the model; safe prompts of XSTest refused; normal prompts refused, borderline ones apart where they are a
category of the retain prompts; both answered with gibberish; KL to the base on their answers, nats a token; mean
accuracy over the tasks of lm-eval; the three harmful shares again as the judge alone has them, which says so of
gibberish and of lone refusals too."""
KEYS = ("model", "method", "seed", *FIGURES)
TWINS = "_twins"
"""Goes on the method of a run whose stage 1 trained a good twin as well; operators follow, each after a plus."""
_OWN_HARMFUL = ("forget_train", "forget_test", "forget_validation", "xstest_unsafe")
"""Splits of harmful prompts that are of no other source; every other one is."""

Row = dict[str, Any]


def table_rows(folders: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """Reads records.

    Args:
        folders: Of runs, of comparisons, or of the records of a comparison.

    Returns:
        One row for each model, method and seed, in order, of a run where there is one; and a sentence for each record
        that has none.

    Raises:
        EvaluationError: A folder holds no record, one is broken, or two runs or two comparisons have one model, method
            and seed.
    """
    rows: dict[tuple[Any, ...], tuple[Row, Path]] = {}
    left_out: list[str] = []
    is_run = {folder: (folder / RUN_FILE).is_file() for folder in folders}
    # Runs first: theirs are whole evaluations.
    for folder in sorted(is_run, key=lambda folder: not is_run[folder]):
        if is_run[folder]:
            found = [run_row(read_json_object(folder / RUN_FILE, "run again"), str(folder / RUN_FILE))]
        else:
            records = read_records(folder / RECORDS if (folder / RECORDS).is_dir() else folder)
            found = comparison_rows(records)
            left_out += [
                f"{record.file_name} in {folder} has no row: {record.failure}"
                for record in records
                if record.status == "failed"
            ]
        for row in found:
            which = (row["model"], row["method"], row["seed"])
            words = f"{row['method']} on {row['model']} with seed {row['seed']}"
            if which not in rows:
                rows[which] = row, folder
            elif is_run[rows[which][1]] and not is_run[folder]:
                left_out.append(f"{words}: the row is of the run {rows[which][1]}, not of the comparison {folder}")
            else:
                raise EvaluationError(f"{rows[which][1]} and {folder} both hold {words}: name one of them")
    return [rows[which][0] for which in sorted(rows)], left_out


def run_row(results: Mapping[str, Any], where: str = RUN_FILE) -> Row:
    """The row of one run.

    Args:
        results: What its ``results.json`` holds.
        where: Name of the file, for messages.

    Returns:
        All ``KEYS``, and ``FIGURES`` under ``base_``.

    Raises:
        EvaluationError: It doesn't hold what a run writes.
    """
    try:
        recipe = results["manifest"]["recipe"]
        own, base = _of_run(results, "after", "unlearned"), _of_run(results, "before", "base")
        acquire = recipe["acquire"]
        twins = recipe["method"] == "sku" and acquire.get("twin", "none") != "none"
        method = f"{recipe['method']}{TWINS if twins else ''}"
        # An operator makes another vector of it; a file's is named as the file.
        operators = [PurePath(name).stem for entry in recipe["negate"]["operators"] for name in entry]
        seed = recipe["seed"] if acquire["seed"] is None else acquire["seed"]
        if own["kl_normal"] is not None:
            base["kl_normal"] = 0.0  # A base is not measured against itself.
        return _row(recipe, "+".join([method, *operators]), seed, own, base)
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationError(f"{where} is not that of a finished run of this version ({error}): run again") from None


def comparison_rows(records: Sequence[MethodRecord]) -> list[Row]:
    """The rows of a comparison's complete records, each at the strength that its table at equal utility shows.

    Args:
        records: Of one comparison.

    Returns:
        As ``run_row``; one without a strength within the budget has no figures. The KL is that on the validation
        split; what a comparison doesn't ask is null.
    """
    counted = counted_of(records, "best")

    def figures(record: MethodRecord) -> Row:
        return _of_point(next(iter(points_of([record], "best", counted)), None))

    bases = (record for record in records if record.name == BASE and record.status == "complete")
    base = next((figures(record) for record in bases), dict.fromkeys(FIGURES))
    return [
        _row(record.recipe, record.name, record.seed, figures(record), base)
        for record in records
        if record.status == "complete"
    ]


def _row(recipe: Mapping[str, Any], method: str, seed: int, own: Row, base: Row) -> Row:
    model = PurePath(recipe["model"]["path"]).name
    return {"model": model, "method": method, "seed": seed, **own, **{f"base_{key}": base[key] for key in FIGURES}}


def _of_run(results: Mapping[str, Any], side: Literal["before", "after"], name: str) -> Row:
    """Figures of one model of a run: ``before`` is its base, ``after`` the unlearned one."""
    replies, normal, result = results["replies"], results["normal"], results[name]

    def share(changes: Mapping[str, Any], rate: str) -> float | None:
        return float(changes[rate][side]["value"]) if rate in changes else None

    def harmful(*sets: Mapping[str, Any], rate: str) -> float | None:
        """Of several sets together."""
        found = [changes[rate][side] for changes in sets if rate in changes]
        total = sum(one["total"] for one in found)
        return sum(one["count"] for one in found) / total if total else None

    unseen = replies.get("forget_test", {})
    others = [changes for split, changes in replies.items() if split not in _OWN_HARMFUL]
    prefills = results["prefill_by_length"].get("forget_test", {}).values()
    agreement = result["agreement"].get("retain_test")
    return {
        "n": unseen["harmful"][side]["total"] if "harmful" in unseen else None,
        "harmful_unseen": share(unseen, "harmful"),
        "harmful_other_source": harmful(*others, rate="harmful"),
        "worst_prefill": _largest(share(changes, "harmful") for changes in prefills),
        "xstest_safe_refused": share(replies.get("xstest_safe", {}), "over_refusal"),
        "normal_refused": share(normal.get("retain_test", {}), "over_refusal"),
        "borderline_refused": share(normal.get(BORDERLINE, {}), "over_refusal"),
        "gibberish": share(replies.get("retain_test", {}), "gibberish"),
        "kl_normal": None if agreement is None else agreement["kl"],
        "utility_accuracy": _accuracy(result["lm_eval"]),
        "harmful_unseen_ungated": share(unseen, "harmful_ungated"),
        "harmful_other_source_ungated": harmful(*others, rate="harmful_ungated"),
        "worst_prefill_ungated": _largest(share(changes, "harmful_ungated") for changes in prefills),
    }


def _largest(shares: Iterable[float | None]) -> float | None:
    return max((found for found in shares if found is not None), default=None)


def _accuracy(plain: Any) -> float | None:
    """Mean over the tasks that were asked for, each by its main metric; over all parts where a tag was asked for."""
    if plain is None:
        return None
    scores = from_plain(HarnessScores, plain, "lm_eval")
    found = {
        name: task.metrics[metric] for name, task in scores.tasks.items() if (metric := main_metric(task)) is not None
    }
    # A tag has no score of its own.
    names = scores.asked if {*scores.asked} <= found.keys() else tuple(found)
    return math.fsum(found[name] for name in names) / len(names) if names else None


def _of_point(point: Point | None) -> Row:
    if point is None:
        return dict.fromkeys(FIGURES)
    prefills = point.prefills.values()
    return dict.fromkeys(FIGURES) | {
        "n": len(point.outcomes.get(UNSEEN, "")),
        "harmful_unseen": _share(point.hits(UNSEEN, "harmful")),
        "worst_prefill": _largest(_share(point.hits(key, "harmful")) for key in prefills),
        "harmful_unseen_ungated": _share(point.hits(UNSEEN, "harmful_ungated")),
        "worst_prefill_ungated": _largest(_share(point.hits(key, "harmful_ungated")) for key in prefills),
        "normal_refused": _share(point.hits(NORMAL_KEY, "over_refusal")),
        "gibberish": _share(point.hits(NORMAL_KEY, "gibberish")),
        "kl_normal": None if point.utility is None else point.utility.kl.get("retain_validation"),
    }


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
