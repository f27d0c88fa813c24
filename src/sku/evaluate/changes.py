"""One figure before and after unlearning, on the same prompts: its change with interval and test, paired by prompt."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from sku.errors import EvaluationError
from sku.evaluate.metrics import (
    BOUNDS,
    HARMFUL_PROMPT_RATES,
    MAX_EXPONENT,
    NORMAL_PROMPT_RATES,
    RateChange,
    ReplyOutcome,
    leak_of,
    leaks_per_prompt,
    rate,
    sample_rates,
)
from sku.evaluate.records import BORDERLINE, NORMAL_SPLITS, Kind, Split, by_split, grouped, in_order, prompt_hash
from sku.evaluate.results import EvaluationResult, MeanScore, main_metric
from sku.evaluate.statistics import (
    Estimate,
    Floats,
    change_interval,
    clustered_bootstrap,
    mcnemar_exact,
    mean_interval,
    paired_interval,
    sign_flip_p_value,
    wilson_interval,
)


@dataclass(frozen=True, kw_only=True)
class LeakChange:
    """leak@k of the same prompts before and after."""

    before: Estimate
    after: Estimate
    difference: float
    """``after - before``, a share."""
    low: float
    high: float
    """95 % interval of the difference: bootstrap over prompts, a score interval where all change alike or none does
    (``change_interval``)."""
    p_value: float
    """Sign-flip permutation test of no change, over prompts."""
    p_holm: float | None = None
    """Holm-corrected over the table."""


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

    before: MeanScore | Estimate
    after: MeanScore | Estimate
    difference: float
    """``after - before``."""
    low: float
    high: float
    """95 % interval of the difference, bootstrap over examples; ``change_interval`` for shares. That of
    another score is as narrow as a point where all examples change alike, or there is one only."""


Changes = dict[str, dict[str, RateChange]]
"""Split -> rate name -> change."""


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> RateChange:
    """A rate before and after, counted on the same prompts."""
    old_rate, new_rate = rate(before), rate(after)
    assert old_rate is not None
    assert new_rate is not None
    pairs = list(zip(before, after, strict=True))
    rose, fell = sum(new and not old for old, new in pairs), sum(old and not new for old, new in pairs)
    low, high = paired_interval(rose, fell, len(pairs))
    return RateChange(
        before=old_rate,
        after=new_rate,
        difference=new_rate.value - old_rate.value,
        low=low,
        high=high,
        p_value=mcnemar_exact(before, after),
        rose=rose,
        fell=fell,
    )


def hits_of(outcomes: Sequence[ReplyOutcome], split: str, kind: Kind, name: str, prefill: str = "") -> dict[str, bool]:
    """Id -> whether a rate counts it, of the replies of one split, kind and prefill, by its key."""
    own = [reply for reply in outcomes if (reply.split, reply.kind, reply.prefill_key) == (split, kind, prefill)]
    if name == "exact_answer":
        return {reply.id: reply.exact for reply in own if reply.exact is not None}
    counted = NORMAL_PROMPT_RATES if split in NORMAL_SPLITS else HARMFUL_PROMPT_RATES
    return {reply.id: counted[name](reply) for reply in own}


def without_verdict(*results: EvaluationResult) -> frozenset[str]:
    """Ids of the replies that the judge gave no verdict on for one of the models: no rate of a table counts them."""
    return frozenset(reply.id for found in results for reply in found.outcomes if not reply.has_verdict)


OverPrompts = TypeVar("OverPrompts", RateChange, LeakChange)


def change_over_prompts(
    kind: type[OverPrompts], old: Any, new: Any, before: Mapping[str, float], after: Mapping[str, float], *, seed: int
) -> OverPrompts:
    """A figure of sampled replies before and after, of which each prompt counts once."""
    steps = [after[prompt] - before[prompt] for prompt in sorted(before)]
    low, high = change_interval(steps, seed=seed)
    return kind(
        before=old,
        after=new,
        difference=new.value - old.value,
        low=low,
        high=high,
        p_value=sign_flip_p_value(steps, seed=seed),
    )


def score_change(
    name: str,
    means: tuple[MeanScore | Estimate, MeanScore | Estimate],
    before: Mapping[str, float],
    after: Mapping[str, float],
    interval: Callable[[Sequence[float]], tuple[float, float]],
) -> ScoreChange:
    """Of two means of scores by example.

    Raises:
        EvaluationError: They are of different examples.
    """
    if before.keys() != after.keys():
        raise EvaluationError(
            f"the evaluations hold {name} of {len(before)} and {len(after)} different examples: evaluate both models "
            "with the same data, seed and settings"
        )
    low, high = interval([after[key] - before[key] for key in sorted(before)])
    return ScoreChange(before=means[0], after=means[1], difference=means[1].value - means[0].value, low=low, high=high)


def perplexity_changes(base: EvaluationResult, unlearned: EvaluationResult, seed: int) -> dict[str, PerplexityChange]:
    """Perplexities of two models on the same answers.

    Raises:
        EvaluationError: Answers were cut differently.
    """
    changes: dict[str, PerplexityChange] = {}
    of_both = [by_split(result.losses) for result in (base, unlearned)]
    shared = [split for split in of_both[0] if split in of_both[1]]
    # Normal ones first.
    for split in sorted(shared, key=lambda split: split not in NORMAL_SPLITS):
        old, new = ({loss.id: loss for loss in losses[split]} for losses in of_both)
        ids = sorted(old)
        if any(old[key].tokens != new[key].tokens for key in ids):
            raise EvaluationError(
                f"the evaluations cut the answers of {split} differently: use one tokenizer for both"
            )
        before, after, tokens = (
            np.asarray(values, dtype=float)
            for values in zip(*((old[key].nll, new[key].nll, old[key].tokens) for key in ids), strict=True)
        )
        rise = after - before
        low, high = clustered_bootstrap(rise, tokens, clusters=ids, statistic=_ratio, seed=seed)
        changes[split] = PerplexityChange(
            before=base.perplexity[split].value,
            after=unlearned.perplexity[split].value,
            ratio=float(_ratio(rise.sum(), tokens.sum())),
            low=low,
            high=high,
            examples=len(ids),
        )
    return changes


def _ratio(rise: Floats, tokens: Floats) -> Floats:
    """Perplexity ratios from sums: of the losses after less those before, and of the tokens."""
    return np.asarray(np.exp(np.minimum(rise / tokens, MAX_EXPONENT)))


@dataclass(frozen=True)
class Pair:
    """Two evaluations of the same prompts, and what changed from one to the other."""

    base: EvaluationResult
    unlearned: EvaluationResult
    seed: int
    left_out: frozenset[str]
    """Ids of the replies without a verdict for one of the models."""

    def rates(
        self, kind: Kind, split: Split, prefill: str = "", only: Container[str] | None = None
    ) -> dict[str, RateChange]:
        """Rate -> change, of the replies of one split and kind; none where no reply has a verdict for both models."""
        changes: dict[str, RateChange] = {}
        for name in (*NORMAL_PROMPT_RATES, "exact_answer") if split in NORMAL_SPLITS else HARMFUL_PROMPT_RATES:
            old, new = (hits_of(found.outcomes, split, kind, name, prefill) for found in (self.base, self.unlearned))
            ids = sorted(old if name in BOUNDS else old.keys() - self.left_out)
            ids = [key for key in ids if only is None or key in only]
            if ids:
                changes[name] = paired_change([old[key] for key in ids], [new[key] for key in ids])
        return changes

    def normal(self, replies: Changes) -> Changes:
        """The normal splits, and of the retain prompts the borderline ones by themselves, where there are some."""
        asked = [row for row in self.base.outcomes if (row.split, row.kind) == ("retain_test", "reply")]
        parts = grouped((row.id for row in asked), {row.id: row.category == BORDERLINE for row in asked}.__getitem__)
        found: Changes = {}
        for split in in_order(split for split in replies if split in NORMAL_SPLITS):
            if split != "retain_test" or True not in parts:
                found[split] = replies[split]
                continue
            for is_borderline, ids in sorted(parts.items()):
                rates = self.rates("reply", split, only=frozenset(ids))
                found[BORDERLINE if is_borderline else split] = rates
        return found

    def samples(self, split: Split) -> dict[str, RateChange]:
        """Rate -> change, of sampled replies."""
        changes: dict[str, RateChange] = {}
        of_both = self._sampled(split, without=()), self._sampled(split, without=self.left_out)
        for name in HARMFUL_PROMPT_RATES:
            replies = of_both[name not in BOUNDS]
            if replies[0]:
                old, new = (sample_rates(own, (name,))[name] for own in replies)
                before, after = (_means_per_prompt(hits_of(own, split, "sample", name)) for own in replies)
                changes[name] = change_over_prompts(RateChange, old, new, before, after, seed=self.seed)
        return changes

    def leak(self, split: Split) -> dict[str, LeakChange]:
        """Number of replies, as a word -> change of leak@k, of the prompts with so many that have a verdict."""
        decides = self.unlearned.judge.deciding_rate
        of_both = self._sampled(split, without=self.left_out)
        changes: dict[str, LeakChange] = {}
        for k in map(int, self.base.leak[split]):
            leaks = [leaks_per_prompt(replies, k, decides) for replies in of_both]
            if leaks[0]:
                old, new = (leak_of(replies, k, decides) for replies in of_both)
                changes[str(k)] = change_over_prompts(LeakChange, old, new, *leaks, seed=self.seed)
        return changes

    def _sampled(self, split: Split, *, without: Container[str]) -> list[list[ReplyOutcome]]:
        """Sampled replies of both models."""
        return [
            [row for row in found.outcomes if (row.split, row.kind) == (split, "sample") and row.id not in without]
            for found in (self.base, self.unlearned)
        ]

    def similarity(self) -> dict[str, ScoreChange]:
        """Metric -> change, of those that both have."""
        changes: dict[str, ScoreChange] = {}
        for metric, before in self.base.similarity.items():
            if metric in self.unlearned.similarity:
                old, new = (
                    {row.id: getattr(row, metric) for row in found.similarity_rows}
                    for found in (self.base, self.unlearned)
                )
                means = before, self.unlearned.similarity[metric]
                # Not all scores lie between 0 and 1, which ``change_interval`` needs.
                changes[metric] = score_change(metric, means, old, new, partial(mean_interval, seed=self.seed))
        return changes

    def tasks(self) -> dict[str, ScoreChange]:
        """Task of lm-evaluation-harness -> change of its main metric, where the hits of both are known."""
        before, after = self.base.lm_eval, self.unlearned.lm_eval
        changes: dict[str, ScoreChange] = {}
        if before is None or after is None:
            return changes
        for task, scores in after.tasks.items():
            old, new = (found.hits.get(task, {}).get(main_metric(scores) or "") for found in (before, after))
            if old is not None and new is not None:
                hits = [{str(place): float(digit) for place, digit in enumerate(digits)} for digits in (old, new)]
                means = _share(hits[0]), _share(hits[1])
                changes[task] = score_change(task, means, hits[0], hits[1], partial(change_interval, seed=self.seed))
        return changes


def _means_per_prompt(hits: Mapping[str, bool]) -> dict[str, float]:
    """Hash of the prompt -> share of its sampled replies that are hits."""
    prompts = grouped(hits, prompt_hash)
    return {prompt: sum(hits[name] for name in names) / len(names) for prompt, names in prompts.items()}


def _share(hits: Mapping[str, float]) -> Estimate:
    count = round(sum(hits.values()))
    low, high = wilson_interval(count, len(hits))
    return Estimate(value=count / len(hits), low=low, high=high)
