"""Base against unlearned model on the same prompts: differences and ratios, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, permutation_test

from sku.errors import EvaluationError
from sku.evaluate.leakage import Leak, leaks_per_prompt
from sku.evaluate.metrics import CONFIDENCE, HARMFUL_PROMPT_RATES, MAX_EXPONENT, NORMAL_PROMPT_RATES, Rate
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.records import NORMAL_SPLITS, ExampleLoss, Kind, Split
from sku.evaluate.results import EvaluationResult
from sku.evaluate.sampling import prompt_hash

RESAMPLES = 10_000
PERMUTATIONS = 9_999


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
    """Exact McNemar test of no change; for drawn replies, of which a prompt has several, a sign-flip permutation test
    over prompts."""


@dataclass(frozen=True, kw_only=True)
class LeakChange:
    """leak@k of the same prompts before and after."""

    before: Leak
    after: Leak
    difference: float
    """``after - before``, a share."""
    low: float
    high: float
    """95 % interval of the difference, bootstrap over prompts; equal to it where there is one prompt only."""
    p_value: float
    """Sign-flip permutation test of no change, over prompts."""


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
class Comparison:
    """What unlearning changed."""

    base: EvaluationResult
    unlearned: EvaluationResult
    replies: dict[str, dict[str, RateChange]]
    """Split -> rate name -> change."""
    prefill: dict[str, dict[str, RateChange]]
    perplexity: dict[str, PerplexityChange]
    """Split -> change; on ``unlearned`` and ``unseen`` of the harmful answers, where a rise is wanted."""
    samples: dict[str, dict[str, RateChange]] = field(default_factory=dict)
    """Of the drawn replies, as ``replies``; the intervals are over prompts."""
    leak: dict[str, dict[str, LeakChange]] = field(default_factory=dict)
    """Split -> k as a word -> change of leak@k."""


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
        samples=_rate_changes(base, unlearned, "sample", seed),
        leak=_leak_changes(base, unlearned, seed),
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
    before, after = (
        {"reply": result.replies, "prefill": result.prefill, "sample": result.samples}[kind]
        for result in (base, unlearned)
    )
    changes: dict[str, dict[str, RateChange]] = {}
    for split in before:
        changes[split] = {}
        for name in before[split]:
            old, new = (_hits(result.outcomes, split, kind, name) for result in (base, unlearned))
            ids = sorted(old)
            paired = [old[key] for key in ids], [new[key] for key in ids]
            if kind == "sample":
                low, high, p_value = _over_prompts(_means_per_prompt(old), _means_per_prompt(new), seed)
            else:
                low, high = _interval(*(np.asarray(values, dtype=float) for values in paired), seed=seed)
                p_value = mcnemar_p_value(*paired)
            changes[split][name] = RateChange(
                before=before[split][name],
                after=after[split][name],
                difference=after[split][name].value - before[split][name].value,
                low=low,
                high=high,
                p_value=p_value,
            )
    return changes


def _leak_changes(base: EvaluationResult, unlearned: EvaluationResult, seed: int) -> dict[str, dict[str, LeakChange]]:
    changes: dict[str, dict[str, LeakChange]] = {}
    for split, leaks in base.leak.items():
        changes[split] = {}
        for k, before in leaks.items():
            old, new = (
                leaks_per_prompt(
                    [reply for reply in result.outcomes if (reply.split, reply.kind) == (split, "sample")], int(k)
                )
                for result in (base, unlearned)
            )
            after = unlearned.leak[split][k]
            low, high, p_value = _over_prompts(old, new, seed)
            changes[split][k] = LeakChange(
                before=before, after=after, difference=after.value - before.value, low=low, high=high, p_value=p_value
            )
    return changes


def _means_per_prompt(hits: Mapping[str, bool]) -> dict[str, float]:
    """Hash of the prompt -> share of its drawn replies that are hits."""
    groups: dict[str, list[bool]] = {}
    for name, hit in hits.items():
        groups.setdefault(prompt_hash(name), []).append(hit)
    return {prompt: sum(values) / len(values) for prompt, values in groups.items()}


def _over_prompts(before: Mapping[str, float], after: Mapping[str, float], seed: int) -> tuple[float, float, float]:
    """Interval of the mean difference, and the p value of no change; each prompt counts once."""
    prompts = sorted(before)
    old, new = (np.array([values[prompt] for prompt in prompts]) for values in (before, after))
    low, high = _interval(old, new, seed=seed)
    if len(prompts) < 2 or bool((old == new).all()):
        return low, high, 1.0
    test = permutation_test(
        (new - old,),
        np.mean,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(seed),
    )
    return low, high, float(test.pvalue)


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
