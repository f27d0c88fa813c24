"""The result of one evaluation, as it stands in ``evaluation.json``.

Keys of the file:

- ``schema_version``: of this file.
- ``setup``: what was asked and how, ``EvaluationSetup``.
- ``judge``: the judge's card.
- ``replies``: split -> rate name -> rate. ``unlearned``, ``unseen`` and ``xstest_unsafe`` have harmful,
  harmful_at_most, harmful_ungated, evasive, safe_answer, refusal, coherent_safe, degenerate, fluent, unjudged,
  cut_off; ``retain_test`` and ``xstest_safe`` have answered, over_refusal, degenerate, cut_off, and exact_answer where
  a reference is short enough. A split that holds no prompts is left out.
- ``prefill``: the same for continuations of forced starts; empty where ``evaluate.prefill_tokens`` is 0.
- ``samples``: the rates of all drawn replies of ``unlearned`` and ``unseen`` together, ``evaluate.samples`` to each
  prompt; empty where that is 0. Replies to one prompt are not independent: these intervals are over prompts.
- ``leak``: split -> k as a word (1, 2, 4, ... and the number drawn) -> value, low, high: the chance that at least one
  of k drawn replies to a prompt is ``harmful``, averaged over prompts. Its interval and those of ``samples`` are
  bootstraps over prompts, and Wilson over prompts where all prompts say the same.
- ``replies_by_category``, ``prefill_by_category``: split -> category -> rates, of prompts that have a category.
- ``perplexity``: split -> value, nll, tokens, examples, on the dataset's own answers; ``benign`` is there too where
  the data has such a set.

A rate is ``count``, ``total``, ``value``, ``low``, ``high`` (Wilson, 95 %). Per-reply rows are in ``outcomes.jsonl``,
per-answer losses in ``perplexity.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.judges import JudgeCard, card_from_dict
from sku.evaluate.leakage import Leak
from sku.evaluate.metrics import Perplexity, Rate
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.record_files import OUTCOMES_FILE, PERPLEXITY_FILE, SCHEMA_VERSION, read_rows, write_private_text
from sku.evaluate.records import ExampleLoss

RESULT_FILE = "evaluation.json"

Rates = Mapping[str, Rate]


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """What was asked of which model, and how."""

    model: Mapping[str, str]
    """``name``, ``dtype`` and ``fingerprint``, a hash of what the weights compute."""
    prompt_format: str
    decoding: Mapping[str, Any]
    """Settings of the greedy replies, the ``backend``, and those of the drawn replies under ``samples`` (None without
    any)."""
    config: Mapping[str, Any]
    """``EvaluateConfig`` in full."""
    seed: int
    fluency_scorer: str
    """Who was asked about word salad: ``base``, or ``self`` where no base model was given."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What was not measured -> number of prompts."""
    backend_check: Mapping[str, int] | None = None
    """Of a backend other than ``generate``: ``prompts`` answered by both, greedily, and how many replies are
    ``equal``."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the numbers needs."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Everything measured on one model. The fields are the keys listed above."""

    setup: EvaluationSetup
    judge: JudgeCard
    replies: Mapping[str, Rates]
    prefill: Mapping[str, Rates]
    replies_by_category: Mapping[str, Mapping[str, Rates]]
    prefill_by_category: Mapping[str, Mapping[str, Rates]]
    perplexity: Mapping[str, Perplexity]
    samples: Mapping[str, Rates] = field(default_factory=dict)
    leak: Mapping[str, Mapping[str, Leak]] = field(default_factory=dict)
    outcomes: tuple[ReplyOutcome, ...] = field(default=(), repr=False)
    """Per reply; in ``outcomes.jsonl``, not in ``evaluation.json``."""
    losses: tuple[ExampleLoss, ...] = field(default=(), repr=False)
    """Per fixed answer; in ``perplexity.jsonl``, not in ``evaluation.json``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data without ``outcomes`` and ``losses``."""
        plain = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        del plain["outcomes"], plain["losses"]
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = RESULT_FILE) -> EvaluationResult:
        """The inverse of ``to_dict``; ``outcomes`` and ``losses`` stay empty.

        Raises:
            EvaluationError: Another schema version, or keys that don't fit it.
        """
        if content.get("schema_version") != SCHEMA_VERSION:
            raise EvaluationError(
                f"{where} has schema version {content.get('schema_version')}, this SKU reads {SCHEMA_VERSION}: "
                "evaluate again"
            )
        plain = {name: value for name, value in content.items() if name != "schema_version"}
        try:
            return cls(
                **{
                    **plain,
                    "setup": EvaluationSetup(**{**plain["setup"], "notes": tuple(plain["setup"]["notes"])}),
                    "judge": card_from_dict(plain["judge"]),
                    "replies": {split: _rates(rates) for split, rates in plain["replies"].items()},
                    "prefill": {split: _rates(rates) for split, rates in plain["prefill"].items()},
                    "replies_by_category": _nested(plain["replies_by_category"]),
                    "prefill_by_category": _nested(plain["prefill_by_category"]),
                    "perplexity": {split: Perplexity(**value) for split, value in plain["perplexity"].items()},
                    "samples": {split: _rates(rates) for split, rates in plain["samples"].items()},
                    "leak": {
                        split: {k: Leak(**value) for k, value in leaks.items()}
                        for split, leaks in plain["leak"].items()
                    },
                }
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise EvaluationError(f"{where} doesn't fit its schema ({error}): evaluate again") from None


def write_result(folder: Path, result: EvaluationResult) -> None:
    """Writes ``evaluation.json``.

    Raises:
        OutputError: The folder can't be written.
    """
    write_private_text(folder / RESULT_FILE, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")


def read_result(folder: Path) -> EvaluationResult:
    """Reads an evaluation back, per-reply and per-answer rows included.

    Raises:
        EvaluationError: A file is missing or broken.
    """
    path = folder / RESULT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} does not hold keys and values: evaluate again")
    _, outcomes = read_rows(folder / OUTCOMES_FILE, ReplyOutcome)
    _, losses = read_rows(folder / PERPLEXITY_FILE, ExampleLoss)
    result = EvaluationResult.from_dict(content, str(path))
    return dataclasses.replace(result, outcomes=tuple(outcomes), losses=tuple(losses))


def _rates(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, Rate]:
    return {name: Rate(**value) for name, value in plain.items()}


def _nested(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Rates]]:
    return {
        split: {category: _rates(rates) for category, rates in categories.items()}
        for split, categories in plain.items()
    }
