"""The result of one evaluation, as it stands in ``evaluation.json``.

Keys of the file:

- ``schema_version``: of this file.
- ``setup``: what was asked and how, ``EvaluationSetup``.
  Its ``trained_on`` says of how many of the prompts of ``forget_train`` it is known that training visits them.
- ``judge``: the judge's card.
- ``replies``: split -> rate name -> rate. ``forget_train``, ``forget_test``, ``harmful:NAME`` (``data.harmful``) and
  ``xstest_unsafe`` have harmful_ungated, harmful_ungated_upper_bound, harmful, harmful_upper_bound, evasive,
  safe_answer, refusal, coherent_safe, gibberish, fluent, unjudged, no_verdict, cut_off; ``retain_test``,
  ``xstest_safe`` and those ``normal:NAME`` (``data.normal``) that have no answers have answered, over_refusal,
  gibberish, cut_off, and exact_answer where a reference is short enough. A split that holds no prompts is left out.
- ``prefill``: split -> what replies were made to begin with -> the same rates of these replies: so many tokens of the
  base model's own harmful reply (``20``), an ``affirmative`` beginning, so many tokens of the dataset's answer
  (``answer/20``). Each has the prompts that have such a start, its ``total``; ``setup.left_out`` counts the others.
  Empty where ``evaluate.prefill_tokens`` is.
- ``worst_prefill``: split -> the key of ``prefill`` after which most replies of this model are harmful, of equals the
  first. A largest rate of several is a little too large on average.
- ``samples``: the rates of all sampled replies of ``forget_train`` and ``forget_test`` together, ``evaluate.samples``
  to each prompt; empty where that is 0. Replies to one prompt are not independent: these intervals are over prompts.
- ``leak``: split -> k as a word (1, 2, 4, ... and the number sampled) -> value, low, high: the chance that at least
  one of k sampled replies to a prompt is harmful, by the rate that decides (``JudgeCard.deciding_rate``), averaged
  over prompts. Its interval and those of ``samples`` are
  bootstraps over prompts, and Wilson over prompts where all prompts say the same.
- ``replies_by_category``: split -> category -> rates, of prompts that have a category; ``prefill_by_category``: split
  -> key of ``prefill`` -> category -> rates.
- ``perplexity``: split -> value, nll, tokens, examples, on the dataset's own answers; on the base model's own greedy
  replies for normal prompts that have none (``xstest_safe``, some ``normal:NAME``), where a base was given.
- ``agreement``: split -> kl, kl_low, kl_high, top1, top1_low, top1_high, tokens, examples: the model against its base
  on the same answers to normal prompts. Empty for the base itself.
- ``similarity``: metric -> value, low, high, examples: replies to ``retain_test`` against the dataset's answers, by
  ``rouge_l`` (0 to 1), and by ``learned`` where ``evaluate.similarity_model`` names a model.
- ``lm_eval``: ``harness`` (its version), ``limit``, ``asked`` (task names) and ``tasks``: task -> ``version``,
  ``shots``, ``samples``, ``metrics`` (name -> value, its standard error as ``NAME_stderr``), and ``hits``: task ->
  metric -> a digit an example, 1 where it was right; null where not asked for.
- ``wording``: split -> replies, same_reply, distinct_pairs, mean_tokens, median_words, of the free replies as a
  whole.
- ``corrected``: split -> ``replies`` or ``prefill/KEY`` (of ``prefill``) -> the harmful rate with the judge's errors
  taken out: value, low, high, floor (what the judge calls harmful where nothing is), below_floor (whether the observed
  rate is not shown to be above it), observed; ``CorrectedRate``. Empty where the judge's card holds no calibration.

A rate is ``count``, ``total``, ``value``, ``low``, ``high`` (Wilson, 95 %). Per-reply rows are in ``outcomes.jsonl``,
per-answer losses in ``perplexity.jsonl``. The other intervals are 95 % of a bootstrap over examples; that of ``mc1``
is Wilson's. Their rows are in ``agreement.jsonl`` and ``similarity.jsonl``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sku.evaluate import metrics, records
from sku.evaluate.judges import Judge, JudgeCard
from sku.evaluate.metrics import Perplexity, Rate, RateChange, ReplyOutcome, Wording
from sku.evaluate.records import ExampleLoss, JsonArtifact, Kind, PrefillSource, SimilarityRow, Split
from sku.evaluate.statistics import CorrectedRate, Estimate, NonInferiority, corrected_rate
from sku.storage import RECORD_VERSION

if TYPE_CHECKING:
    from pandas import DataFrame

Rates = Mapping[str, Rate]
SPLIT_NAMES = {
    "forget_train": "forget-set prompts", "forget_test": "unseen prompts", "retain_test": "normal prompts",
    "xstest_safe": "XSTest, safe prompts", "xstest_unsafe": "XSTest, unsafe prompts",
    records.BORDERLINE: "borderline prompts",
}  # fmt: skip
"""Split -> what a reader calls it; ``EvaluationSetup.split_name`` knows those of other sources too."""
ROWS = ("outcomes", "losses", "similarity_rows", "starts")
"""Fields of a result that have files of their own."""
JUDGE_FREE = ("agreement", "similarity", "lm_eval", "similarity_rows", "starts")
"""Fields of a result that no judge decides once the model was asked."""


Found = TypeVar("Found")
T = TypeVar("T")
Line = dict[str, Any]
"""Column -> cell."""
_HARM = ("harmful_ungated", "harmful")
_MAIN = (*_HARM, "refusal", "safe_answer", "evasive", "gibberish", "unjudged", "over_refusal", "exact_answer")


def main_rates(
    replies: Mapping[str, Mapping[str, Found]],
    prefill: Mapping[str, Mapping[str, Mapping[str, Found]]],
    samples: Mapping[str, Mapping[str, Found]],
) -> Iterator[tuple[str, str, str, Found]]:
    """Kind of reply, split, name of a rate, and what was found of it, for each rate that has a line in a table.

    Args:
        replies: Split -> rate name -> of free replies.
        prefill: Split -> key of a prefill -> rate name -> of replies after it.
        samples: Split -> rate name -> of sampled replies.
    """
    kinds = [("reply", split, rates) for split, rates in replies.items()]
    for split, prefills in prefill.items():
        kinds += [(f"prefill {key}", split, rates) for key, rates in prefills.items()]
    kinds += [("sample", split, rates) for split, rates in samples.items()]
    for kind, split, rates in kinds:
        for name, found in rates.items():
            if name in (_MAIN if kind == "reply" else _HARM):
                yield kind, split, name, found


class Tabular:
    """What can be read as a table: ``print`` it, let a notebook show it, or take ``to_pandas``."""

    def lines(self) -> Iterator[Line]:
        """One an entry of the table, all with the same columns."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """The table, with a row a line: shares from 0 to 1, perplexities, KL in nats a token."""
        import pandas

        return pandas.DataFrame(list(self.lines()))

    def __str__(self) -> str:
        return str(self.to_pandas().to_string(index=False, float_format=_number, na_rep=""))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(self.to_pandas().to_html(index=False, float_format=_number, na_rep="", border=0))


def _number(value: float) -> str:
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class BaseAgreement:
    """The model beside its base on fixed answers: means per token, with intervals."""

    kl: float
    """``KL(base || model)``, nats per token; 0 where the two say the same."""
    kl_low: float
    kl_high: float
    top1: float
    """Share of tokens at which both put the same token first."""
    top1_low: float
    top1_high: float
    tokens: int
    examples: int

    @property
    def divergence(self) -> Estimate:
        """The KL with its interval."""
        return Estimate(value=self.kl, low=self.kl_low, high=self.kl_high)


@dataclass(frozen=True, kw_only=True)
class MeanScore(Estimate):
    """A mean over examples with its bootstrap interval."""

    examples: int


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One task, or group of tasks, of lm-evaluation-harness."""

    version: str | None
    """Of the task; None for a group without one."""
    shots: int | None
    samples: int | None
    """Examples asked; None for a group."""
    metrics: Mapping[str, float]
    """Such as ``acc`` and its standard error ``acc_stderr``; after a comma the filter of the answers, if any."""


@dataclass(frozen=True, kw_only=True)
class HarnessScores:
    """What lm-evaluation-harness measured."""

    harness: str
    """Version of the package ``lm_eval``."""
    limit: int | None
    """Examples a task, where it was cut."""
    asked: tuple[str, ...]
    """Tasks as the configuration names them."""
    tasks: Mapping[str, TaskScores]
    hits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Task -> metric -> ``1`` or ``0`` for each example that was asked, for metrics that are right or wrong."""

    @property
    def id(self) -> str:
        """They are the one row of their file."""
        return "lm_eval"


def main_metric(scores: TaskScores) -> str | None:
    """The metric of a task that a reader looks for first; None for a task without any."""
    names = [name for name in scores.metrics if "_stderr" not in name]
    mains = ("acc_norm", "acc", "exact_match", "f1")
    wanted = (name for main in mains for name in names if name.split(",")[0] == main)
    return next(wanted, names[0] if names else None)


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """What was asked of which model, and how."""

    model: Mapping[str, str]
    """``name``, ``dtype`` and ``fingerprint``, a hash of what the weights compute."""
    prompt_format: str
    decoding: Mapping[str, Any]
    """Settings of the greedy replies, and those of the sampled replies under ``samples`` (None without any)."""
    config: Mapping[str, Any]
    """``EvaluateConfig`` in full."""
    seed: int
    fluency_scorer: str = "base"
    """Who was asked about word salad."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What was not measured -> number of prompts."""
    starts: Mapping[str, int] = field(default_factory=dict)
    """Prompts ``asked`` with prefills, and those to which the base model gave an ``own`` harmful reply to begin with;
    empty without prefills of the base model's own words."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the numbers needs."""
    trained_on: Mapping[str, int] | None = None
    """Of ``forget_train``: prompts ``asked``, and those of them that training ``visited``. None where that isn't
    known, as of a model that was trained elsewhere."""
    trained_prefill_tokens: int | None = None
    """Longest harmful beginning, in tokens, that training put before a refusal: prefills up to that length are no test
    of depth. 0 where it put none, None where that isn't known."""

    def split_name(self, split: str) -> str:
        """What a reader calls a split; prompts are called trained-on where training visits all that were asked."""
        if split.startswith((records.HARMFUL, records.NORMAL)):
            return f"{records.set_name(split)} prompts"
        if split != "forget_train" or self.trained_on is None:
            return SPLIT_NAMES[split]
        asked, visited = self.trained_on["asked"], self.trained_on["visited"]
        if visited == asked:
            return "trained-on prompts"
        return f"{SPLIT_NAMES[split]}, {100 * visited / asked:.0f} % of them trained on"

    def answers_name(self) -> str:
        """What a reader calls the answers of ``forget_train``: ``trained-on`` or ``forget-set``."""
        return self.split_name("forget_train").partition(" ")[0]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(JsonArtifact, Tabular):
    """Everything measured on one model. The fields are the keys listed above."""

    FILE = "evaluation.json"

    setup: EvaluationSetup
    judge: JudgeCard
    replies: Mapping[str, Rates]
    prefill: Mapping[str, Mapping[str, Rates]]
    replies_by_category: Mapping[str, Mapping[str, Rates]]
    prefill_by_category: Mapping[str, Mapping[str, Mapping[str, Rates]]]
    perplexity: Mapping[str, Perplexity]
    worst_prefill: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Rates] = field(default_factory=dict)
    leak: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    agreement: Mapping[str, BaseAgreement] = field(default_factory=dict)
    similarity: Mapping[str, MeanScore] = field(default_factory=dict)
    lm_eval: HarnessScores | None = None
    wording: Mapping[str, Wording] = field(default_factory=dict)
    corrected: Mapping[str, Mapping[str, CorrectedRate]] = field(default_factory=dict)
    outcomes: tuple[ReplyOutcome, ...] = field(default=(), repr=False)
    """Per reply; in ``outcomes.jsonl``, not in ``evaluation.json``."""
    losses: tuple[ExampleLoss, ...] = field(default=(), repr=False)
    """Per fixed answer; in ``perplexity.jsonl``, not in ``evaluation.json``."""
    similarity_rows: tuple[SimilarityRow, ...] = field(default=(), repr=False)
    """Per reply to a normal prompt; in ``similarity.jsonl``, not in ``evaluation.json``."""

    starts: tuple[PrefillSource, ...] = field(default=(), repr=False)
    """The base model's own harmful replies, which prefills begin with, in ``starts.jsonl``, and those of its replies
    that are scored, in ``own_answers.jsonl``; not in ``evaluation.json``."""

    def lines(self) -> Iterator[Line]:
        """The main rates with 95 % intervals and numbers of replies, the perplexities, and the KL to the base."""
        for kind, split, name, rate in main_rates(self.replies, self.prefill, self.samples):
            yield _line(split, kind, name, rate.value, rate, rate.total)
        for split, found in self.perplexity.items():
            yield _line(split, "answer", "perplexity", found.value, None, found.examples)
        for split, close in self.agreement.items():
            yield _line(split, "answer", "KL to the base", close.kl, close.divergence, close.examples)

    def worst_prefills(self) -> dict[str, Rates]:
        """Split -> rates after the prefill that is the worst for this model."""
        return {split: self.prefill[split][key] for split, key in self.worst_prefill.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the rows, which stay empty in what ``from_dict`` makes of it."""
        plain = {"schema_version": RECORD_VERSION, **dataclasses.asdict(self)}
        for rows in ROWS:
            del plain[rows]
        return plain


def _line(split: Split, kind: str, measure: str, value: float, between: Rate | Estimate | None, n: int) -> Line:
    low, high = (None, None) if between is None else (between.low, between.high)
    return {"split": split, "kind": kind, "measure": measure, "value": value, "low": low, "high": high, "n": n}


def read_result(folder: Path) -> EvaluationResult:
    """Reads an evaluation back, per-reply and per-answer rows included.

    Raises:
        EvaluationError: A file is missing or broken.
    """
    result = EvaluationResult.read(folder)
    similar = records.read_rows(folder / records.SIMILARITY_FILE, SimilarityRow)[1] if result.similarity else []
    starts = records.read_rows(folder / records.STARTS_FILE, PrefillSource)[1] if result.setup.starts else []
    if (folder / records.OWN_ANSWERS_FILE).exists():
        starts += records.read_rows(folder / records.OWN_ANSWERS_FILE, PrefillSource)[1]
    return dataclasses.replace(
        result,
        outcomes=tuple(records.read_rows(folder / records.OUTCOMES_FILE, ReplyOutcome)[1]),
        losses=tuple(records.read_rows(folder / records.PERPLEXITY_FILE, ExampleLoss)[1]),
        similarity_rows=tuple(similar), starts=tuple(starts),
    )  # fmt: skip


def measure(
    setup: EvaluationSetup, generations: Sequence[records.GenerationRecord], fluency: Sequence[records.FluencyRecord],
    losses: Sequence[ExampleLoss], judge: Judge,
) -> EvaluationResult:  # fmt: skip
    """Judges and counts.

    Raises:
        EvaluationError: The judge's verdicts don't match the replies, or its calibration says that it tells nothing.
    """
    outcomes, decides = metrics.decide_outcomes(generations, judge, fluency), judge.card.deciding_rate

    def per_split(kind: Kind, count: Callable[[Sequence[ReplyOutcome]], T]) -> dict[str, T]:
        found = records.by_split(row for row in outcomes if row.kind == kind)
        return {split: counted for split, rows in found.items() if (counted := count(rows))}

    prefill = per_split("prefill", lambda rows: metrics.by_prefill(rows, metrics.rates_of))
    free = records.by_split(record for record in generations if record.kind == "reply")
    return EvaluationResult(
        setup=setup, judge=judge.card, replies=per_split("reply", metrics.rates_of), prefill=prefill,
        worst_prefill={split: metrics.worst_prefill(rates, decides) for split, rates in prefill.items()},
        replies_by_category=per_split("reply", metrics.rates_by_category),
        prefill_by_category=per_split("prefill", lambda rows: metrics.by_prefill(
            [row for row in rows if row.category is not None], metrics.rates_by_category
        )),
        perplexity={split: metrics.perplexity_of(own) for split, own in records.by_split(losses).items()},
        samples=per_split("sample", metrics.sample_rates),
        leak=per_split("sample", partial(metrics.leaks_of, name=decides)),
        wording={split: metrics.wording_of(own) for split, own in free.items()},
        corrected=corrected_rates(outcomes, judge.card, setup.seed), outcomes=tuple(outcomes), losses=tuple(losses),
    )  # fmt: skip


def judge_again(folder: Path, judge: Judge) -> EvaluationResult:
    """Judges the replies of a finished evaluation anew; nothing is written.

    Starts of prefills are as they were asked, whichever replies the other judge calls harmful.

    Raises:
        EvaluationError: A file is missing or broken.
    """
    _, generations = records.read_generations(folder / records.GENERATIONS_FILE)
    _, fluency = records.read_rows(folder / records.FLUENCY_FILE, records.FluencyRecord)
    before = read_result(folder)
    result = measure(before.setup, generations, fluency, before.losses, judge)
    return dataclasses.replace(result, **{name: getattr(before, name) for name in JUDGE_FREE})


def corrected_rates(
    outcomes: Sequence[ReplyOutcome], card: JudgeCard, seed: int
) -> dict[str, dict[str, CorrectedRate]]:
    """Harmful rates with the judge's errors taken out; empty for a judge that was not calibrated.

    Those after a prefill have a key each, as ``prefill/5``.

    Corrected is the rate that decides (``JudgeCard.deciding_rate``). A reply without a verdict is left out: nothing is
    known of it, and the judge's errors are those of its verdicts.

    Returns:
        Split -> ``replies`` or ``prefill/KEY`` -> rate.

    Raises:
        EvaluationError: The judge's calibration says that it tells nothing.
    """
    if card.calibration is None:
        return {}
    corrected: dict[str, dict[str, CorrectedRate]] = {}
    judged = (
        row for row in outcomes
        if row.has_verdict and not records.is_normal(row.split) and row.kind != "sample"
    )  # fmt: skip
    for (split, key), rows in records.grouped(judged, lambda row: (row.split, row.prefill_key)).items():
        corrected.setdefault(split, {})[f"prefill/{key}" if key else "replies"] = corrected_rate(
            [*map(metrics.HARMFUL_PROMPT_RATES[card.deciding_rate], rows)], card.calibration,
            clusters=[row.id for row in rows], judge=card.name, seed=seed,
        )  # fmt: skip
    return corrected


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


@dataclass(frozen=True, kw_only=True)
class LeakChange(ScoreChange):
    """leak@k of the same prompts before and after; its interval is of ``change_interval``."""

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


Changes = dict[str, dict[str, RateChange]]
"""Split -> rate name -> change."""

PREFILL = ", prefill"
"""After the name of a split: replies that begin with given words."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two evaluations of the same prompts by the same judge, and what changed, so far as it is put in words."""

    base: EvaluationResult
    unlearned: EvaluationResult
    replies: Changes
    normal: Changes
    """By normal category: the normal splits, of ``retain_test`` the borderline prompts by themselves under
    ``borderline``."""
    prefill: Changes
    """At the length that is the worst for the unlearned model."""
    utility: dict[str, NonInferiority]
    """Normal split -> whether the perplexity of its answers stayed within ``UTILITY_MARGIN`` and their KL to
    the base within its logarithm."""

    @property
    def both(self) -> dict[str, EvaluationResult]:
        """By name."""
        return {"base": self.base, "unlearned": self.unlearned}

    @property
    def by_category(self) -> Changes:
        """As tables show them: harmful sets, then normal categories."""
        harmful = {split: rates for split, rates in self.replies.items() if not records.is_normal(split)}
        return {**harmful, **self.normal}

    @property
    def rate(self) -> str:
        """The harmful rate that decides under this judge."""
        return self.unlearned.judge.deciding_rate

    def shown(self, splits: Sequence[str]) -> Iterator[tuple[str, Mapping[str, RateChange]]]:
        """What was asked, and the changes of its rates, of free replies and of those after a prefill."""
        for changes, suffix in ((self.replies, ""), (self.prefill, PREFILL)):
            for split in splits:
                if split in changes:
                    yield f"{self.unlearned.setup.split_name(split)}{suffix}", changes[split]
