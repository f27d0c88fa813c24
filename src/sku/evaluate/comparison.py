"""Base against unlearned model on the same prompts: differences and ratios, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from sku.errors import EvaluationError
from sku.evaluate.intervals import mean_interval
from sku.evaluate.metrics import CONFIDENCE, HARMFUL_PROMPT_RATES, MAX_EXPONENT, NORMAL_PROMPT_RATES, Rate
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.records import NORMAL_SPLITS, ExampleLoss, Kind, Split
from sku.evaluate.results import EvaluationResult, Interval, MeanScore

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class RateChange:
    """One rate before and after, over the prompts that both models were asked."""

    before: Rate
    after: Rate
    difference: float
    """``after - before``, a share."""
    low: float
    high: float
    """95 % interval of the difference, bootstrap over prompts; equal to it where there is one prompt only."""
    p_value: float
    """Exact McNemar test of no change."""


@dataclass(frozen=True, kw_only=True)
class PerplexityChange:
    """Perplexity of the same answers before and after."""

    before: float
    after: float
    ratio: float
    """``after / before``: 1 is no change."""
    low: float
    high: float
    """95 % interval of the ratio, bootstrap over answers; equal to it where there is one answer only."""
    examples: int


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """A mean score before and after, over the same examples."""

    before: MeanScore | Interval
    after: MeanScore | Interval
    difference: float
    """``after - before``."""
    low: float
    high: float
    """95 % interval of the difference, bootstrap over examples; equal to it where there is one example only."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What unlearning changed."""

    base: EvaluationResult
    unlearned: EvaluationResult
    replies: dict[str, dict[str, RateChange]]
    """Split -> rate name -> change."""
    prefill: dict[str, dict[str, RateChange]]
    perplexity: dict[str, PerplexityChange]
    """Split -> change; on ``unlearned`` and ``unseen`` of the harmful answers, where a rise is wanted."""
    similarity: dict[str, ScoreChange] = field(default_factory=dict)
    """Metric -> change, of replies to normal prompts; where both were measured."""
    truthfulqa: dict[str, ScoreChange] = field(default_factory=dict)
    """``mc1`` and ``mc2`` -> change, where both were measured."""


def compare(base: EvaluationResult, unlearned: EvaluationResult, *, seed: int = 0) -> Comparison:
    """Pairs two evaluations prompt by prompt.

    Args:
        base: Of the original model, with its rows (from ``evaluate`` or ``read_result``).
        unlearned: Of the unlearned model, on the same prompts with the same settings.
        seed: Of the bootstrap.

    Returns:
        Changes with intervals.

    Raises:
        EvaluationError: The two were not asked the same, or judged or decoded differently.
    """
    pairs = {
        "judge": (base.judge, unlearned.judge),
        "decoding": (base.setup.decoding, unlearned.setup.decoding),
        "prompt_format": (base.setup.prompt_format, unlearned.setup.prompt_format),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            raise EvaluationError(f"the evaluations differ in {name}: evaluate both models with the same settings")
    _check_same_rows("replies", base.outcomes, unlearned.outcomes)
    _check_same_rows("answers", base.losses, unlearned.losses)
    return Comparison(
        base=base,
        unlearned=unlearned,
        replies=_rate_changes(base, unlearned, "reply", seed),
        prefill=_rate_changes(base, unlearned, "prefill", seed),
        perplexity=_perplexity_changes(base, unlearned, seed),
        similarity=_similarity_changes(base, unlearned, seed),
        truthfulqa=_choice_changes(base, unlearned, seed),
    )


def mcnemar_p_value(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar test on paired answers: of the pairs that changed, did half change each way?

    Args:
        before: Hit or not, per prompt.
        after: The same prompts, in the same order.

    Returns:
        1.0 where no pair changed.
    """
    pairs = list(zip(before, after, strict=True))
    won, lost = sum(new and not old for old, new in pairs), sum(old and not new for old, new in pairs)
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _check_same_rows(
    what: str, before: Sequence[ReplyOutcome | ExampleLoss], after: Sequence[ReplyOutcome | ExampleLoss]
) -> None:
    if not before or {row.id for row in before} != {row.id for row in after}:
        raise EvaluationError(
            f"the evaluations hold {len(before)} and {len(after)} {what} to different prompts, or none: evaluate both "
            "models with the same data, seed and settings, and read them with read_result"
        )


def _rate_changes(
    base: EvaluationResult, unlearned: EvaluationResult, kind: Kind, seed: int
) -> dict[str, dict[str, RateChange]]:
    before, after = (result.replies if kind == "reply" else result.prefill for result in (base, unlearned))
    changes: dict[str, dict[str, RateChange]] = {}
    for split in before:
        changes[split] = {}
        for name in before[split]:
            old, new = (_hits(result.outcomes, split, kind, name) for result in (base, unlearned))
            ids = sorted(old)
            paired = [old[key] for key in ids], [new[key] for key in ids]
            low, high = _interval(*(np.asarray(values, dtype=float) for values in paired), seed=seed)
            changes[split][name] = RateChange(
                before=before[split][name],
                after=after[split][name],
                difference=after[split][name].value - before[split][name].value,
                low=low,
                high=high,
                p_value=mcnemar_p_value(*paired),
            )
    return changes


def _hits(outcomes: Sequence[ReplyOutcome], split: str, kind: Kind, name: str) -> dict[str, bool]:
    own = [reply for reply in outcomes if reply.split == split and reply.kind == kind]
    if name == "exact_answer":
        return {reply.id: reply.exact for reply in own if reply.exact is not None}
    counted = NORMAL_PROMPT_RATES if split in NORMAL_SPLITS else HARMFUL_PROMPT_RATES
    return {reply.id: counted[name](reply) for reply in own}


def _interval(before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean difference."""
    differences = after - before
    if len(differences) < 2:
        return float(differences.mean()), float(differences.mean())
    result = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _perplexity_changes(base: EvaluationResult, unlearned: EvaluationResult, seed: int) -> dict[str, PerplexityChange]:
    changes: dict[str, PerplexityChange] = {}
    splits: list[Split] = ["retain_test", "benign", "unlearned", "unseen"]
    for split in splits:
        old, new = ({loss.id: loss for loss in result.losses if loss.split == split} for result in (base, unlearned))
        if not old:
            continue
        ids = sorted(old)
        if any(old[key].tokens != new[key].tokens for key in ids):
            raise EvaluationError(
                f"the evaluations cut the answers of {split} differently: use one tokenizer for both"
            )
        before, after, tokens = (
            np.asarray(values, dtype=float)
            for values in zip(*((old[key].nll, new[key].nll, old[key].tokens) for key in ids), strict=True)
        )
        low, high = _ratio_interval(before, after, tokens, seed=seed)
        changes[split] = PerplexityChange(
            before=base.perplexity[split].value,
            after=unlearned.perplexity[split].value,
            ratio=float(_ratio(before, after, tokens)),
            low=low,
            high=high,
            examples=len(ids),
        )
    return changes


def _similarity_changes(base: EvaluationResult, unlearned: EvaluationResult, seed: int) -> dict[str, ScoreChange]:
    changes: dict[str, ScoreChange] = {}
    for metric in base.similarity.keys() & unlearned.similarity.keys():
        old, new = ({row.id: getattr(row, metric) for row in result.similarity_rows} for result in (base, unlearned))
        means = base.similarity[metric], unlearned.similarity[metric]
        changes[metric] = _score_change(metric, means, old, new, seed)
    return {metric: changes[metric] for metric in base.similarity if metric in changes}


def _choice_changes(base: EvaluationResult, unlearned: EvaluationResult, seed: int) -> dict[str, ScoreChange]:
    before, after = base.truthfulqa, unlearned.truthfulqa
    if before is None or after is None:
        return {}
    changes = {}
    for name in ("mc1", "mc2"):
        old, new = ({row.id: float(getattr(row, name)) for row in result.choice_rows} for result in (base, unlearned))
        changes[name] = _score_change(name, (getattr(before, name), getattr(after, name)), old, new, seed)
    return changes


def _score_change(
    name: str,
    means: tuple[MeanScore | Interval, MeanScore | Interval],
    before: Mapping[str, float],
    after: Mapping[str, float],
    seed: int,
) -> ScoreChange:
    if before.keys() != after.keys():
        raise EvaluationError(
            f"the evaluations hold {name} of {len(before)} and {len(after)} different examples: evaluate both models "
            "with the same data, seed and settings"
        )
    low, high = mean_interval([after[key] - before[key] for key in sorted(before)], seed=seed)
    return ScoreChange(before=means[0], after=means[1], difference=means[1].value - means[0].value, low=low, high=high)


def _ratio(
    before: NDArray[np.float64], after: NDArray[np.float64], tokens: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    return np.asarray(np.exp(np.minimum((after.sum(axis) - before.sum(axis)) / tokens.sum(axis), MAX_EXPONENT)))


def _ratio_interval(
    before: NDArray[np.float64], after: NDArray[np.float64], tokens: NDArray[np.float64], *, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap of the perplexity ratio: an answer's tokens and both its losses are drawn together."""
    if len(tokens) < 2:
        ratio = float(_ratio(before, after, tokens))
        return ratio, ratio
    result = bootstrap(
        (before, after, tokens),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
