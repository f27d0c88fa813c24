"""A comparison of methods, read from the run folders that ``sku compare`` left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sku.errors import EvaluationError
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import HARMFUL_PROMPT_RATES, NORMAL_PROMPT_RATES, ReplyOutcome
from sku.evaluate.records import ExampleLoss, JsonArtifact, grouped, prefills_in_order
from sku.evaluate.results import EvaluationResult, read_result
from sku.sweep import SWEEP_FILE, read_sweep
from sku.sweep.utility_cost import UtilityCost

BASE = "base"
"""Name of the row of the untouched model, which perplexities are compared with."""
UNSEEN_KEY, NORMAL_KEY = "forget_test/reply", "retain_test/reply"
PREFILL = "forget_test/prefill"
"""Begins the keys of unseen prompts that were asked with a prefill."""
Role = Literal["published", "best"]
"""Which strength of a method a table shows: its own, or the chosen one."""
_AGAIN = "run the comparison again"


@dataclass(frozen=True, kw_only=True)
class RowTitle:
    """One row of the tables."""

    name: str
    title: str
    control: bool


@dataclass(frozen=True, kw_only=True)
class Comparison(JsonArtifact):
    """What ``comparison.json`` holds: what is compared, and what failed."""

    FILE, AGAIN = "comparison.json", _AGAIN

    rows: tuple[RowTitle, ...]
    """In the order of the tables."""
    seeds: tuple[int, ...]
    failed: Mapping[str, str]
    """Name of a run -> why, in one line."""


def run_name(row: str, seed: int) -> str:
    """Name of the folder of one run."""
    return f"{row}--seed{seed}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluated strength of a method."""

    strength: float
    """Multiple of what the method changed; 0 for the base model."""
    cost: UtilityCost | None = None
    """On the validation splits; None where it was not measured."""
    replies: Mapping[str, Sequence[ReplyOutcome]]
    """``forget_test/reply``, ``retain_test/reply``, and for each prefill such as ``forget_test/prefill/3`` or
    ``forget_test/prefill/answer/20``, in the order of the prompts' ids, so that two rows can be paired."""
    losses: Mapping[str, Sequence[ExampleLoss]]
    """Split -> each fixed answer, in the order of the ids."""

    @property
    def prefills(self) -> dict[str, str]:
        """Keys of the prefills that unseen prompts were asked with, in order -> key of ``replies``."""
        found = (key.removeprefix(f"{PREFILL}/") for key in self.replies if key.startswith(f"{PREFILL}/"))
        return {prefill: f"{PREFILL}/{prefill}" for prefill in prefills_in_order(found)}

    def hits(self, key: str, hit: str) -> list[bool]:
        """Which replies are a hit, in the order of the prompts; empty where nothing was asked.

        Args:
            key: Of ``replies``.
            hit: Rate of ``sku.evaluate.metrics``; of ``exact_answer`` only replies with a reference that is short
                enough.
        """
        rows = self.replies.get(key, ())
        if hit == "exact_answer":
            return [bool(row.exact) for row in rows if row.exact is not None]
        rates = NORMAL_PROMPT_RATES if key == NORMAL_KEY else HARMFUL_PROMPT_RATES
        return [rates[hit](row) for row in rows]


def point_of_result(result: EvaluationResult, strength: float, cost: UtilityCost | None = None) -> Point:
    """What a table shows of an evaluation with its rows."""
    replies = grouped(
        sorted(result.outcomes, key=lambda row: row.id),
        lambda row: f"{row.split}/{row.kind}" + (f"/{row.prefill_key}" if row.kind == "prefill" else ""),
    )
    shown = {key: rows for key, rows in replies.items() if key in (UNSEEN_KEY, NORMAL_KEY) or key.startswith(PREFILL)}
    losses = grouped(sorted(result.losses, key=lambda row: row.id), lambda row: row.split)
    return Point(strength=strength, cost=cost, replies=shown, losses=losses)


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """One row of the comparison, trained with one seed."""

    name: str
    title: str
    control: bool
    seed: int
    """Of the training."""
    failure: str | None = None
    """One line on why it failed, else None."""
    points: Mapping[Role, Point] = field(default_factory=dict)
    """``best`` is missing where no strength is within the budget."""
    bound_by: str | None = None
    """What is beyond its limit a little above the largest strength within the budget; None where nothing is, up to the
    largest strength tried."""
    judge: JudgeCard | None = None
    """None where it failed."""


def read_records(folder: Path) -> list[MethodRecord]:
    """Reads the runs of a comparison, in the order of its rows and of the seeds; the base model stands last.

    Raises:
        EvaluationError: There is none, a file of one is broken, or two were asked different things.
    """
    comparison = Comparison.read(folder)
    records: list[MethodRecord] = []
    bases: list[tuple[Path, int]] = []
    for row in comparison.rows:
        for seed in comparison.seeds:
            name = run_name(row.name, seed)
            place = folder / name
            if name in comparison.failed:
                records.append(MethodRecord(**vars(row), seed=seed, failure=comparison.failed[name]))
            elif (place / "evaluation" / "published").is_dir():
                records.append(_read_run(place, row, seed))
                bases.append((place, seed))
    if bases:
        result = read_result(bases[0][0] / "evaluation" / BASE)
        base = point_of_result(result, 0.0, UtilityCost(value=0.0, bound_by=""))
        points: dict[Role, Point] = {"published": base, "best": base}
        title = RowTitle(name=BASE, title="Base model", control=True)
        records.append(MethodRecord(**vars(title), seed=bases[0][1], points=points, judge=result.judge))
    check_asked_alike(records, folder)
    return records


def _read_run(place: Path, row: RowTitle, seed: int) -> MethodRecord:
    sweep = read_sweep(place / "sweep" / SWEEP_FILE, _AGAIN)
    published = read_result(place / "evaluation" / "published")
    points: dict[Role, Point] = {"published": point_of_result(published, _published_strength(place))}
    chosen = next(
        (point for point in sweep.points if sweep.pick is not None and point.alpha == sweep.pick.alpha), None
    )
    if chosen is not None:
        unlearned = read_result(place / "evaluation" / "unlearned")
        points["best"] = point_of_result(unlearned, chosen.alpha, sweep.cost(chosen))
    bound_by = None if sweep.border is None else sweep.border.bound_by
    return MethodRecord(**vars(row), seed=seed, points=points, bound_by=bound_by, judge=published.judge)


def _published_strength(place: Path) -> float:
    try:
        manifest: dict[str, Any] = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        return float(manifest["recipe"]["compare"]["published"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EvaluationError(f"{place / 'manifest.json'} is not that of a run of a comparison: {_AGAIN}") from None


def check_asked_alike(records: Sequence[MethodRecord], folder: Path) -> None:
    """Refuses records that can't stand in one table.

    Raises:
        EvaluationError: Two were asked different prompts, scored on different answers, or judged by different judges.
    """
    alike: dict[str, Callable[[MethodRecord, Point], Any]] = {
        "prompts": lambda _, point: {key: [row.id for row in rows] for key, rows in point.replies.items()},
        "fixed answers": lambda _, point: {
            split: [(row.id, row.tokens) for row in rows]
            for split, rows in point.losses.items()
            if not split.startswith("forget_train")
        },
        "judges": lambda record, _: None if record.judge is None else record.judge.key,
    }
    points = [(record, point) for record in records for point in record.points.values()]
    for what, part_of in alike.items():
        for record, point in points[1:]:
            if part_of(record, point) != part_of(*points[0]):
                first = points[0][0]
                raise EvaluationError(
                    f"{run_name(first.name, first.seed)} and {run_name(record.name, record.seed)} in {folder} have "
                    f"different {what}: compare only what was run on the same data with the same settings"
                )
