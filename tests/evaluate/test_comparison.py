"""Paired changes between two evaluations, and the result on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from sku.errors import EvaluationError
from sku.evaluate import results
from sku.evaluate.comparison import compare, paired_change
from sku.evaluate.metrics import Outcome, perplexity_of
from sku.evaluate.records import OUTCOMES_FILE, PERPLEXITY_FILE, ExampleLoss, write_rows
from sku.evaluate.results import (
    EvaluationResult,
    HarnessScores,
    TaskScores,
    read_result,
)
from sku.report.tables import utility_rows

from .invented import EXACT, SETUP, evaluated


def result(outcomes: Mapping[Outcome, int], nlls: Sequence[float] = (20.0,)) -> EvaluationResult:
    """Replies to ``forget_test``, and normal answers of 10 tokens each with these losses."""
    losses = tuple(ExampleLoss(id=f"x{at}", split="retain_test", nll=nll, tokens=10) for at, nll in enumerate(nlls))
    made = evaluated({("forget_test", "reply"): outcomes})
    return dataclasses.replace(made, losses=losses, perplexity={"retain_test": perplexity_of(losses)})


BASE = result({"harmful": 9, "refusal": 1}, [20.0, 25.0, 30.0])
UNLEARNED = result({"refusal": 8, "harmful": 1, "gibberish": 1}, [22.0, 27.0, 33.0])


def test_changes_are_paired_differences() -> None:
    change = compare(BASE, UNLEARNED).replies["forget_test"]["harmful"]
    assert (change.before.count, change.after.count) == (9, 1)
    assert change.difference == pytest.approx(-0.8)
    assert -1 <= change.low < -0.8 < change.high < 0
    assert change.p_value == pytest.approx(2 * 0.5**8)


def test_the_perplexity_ratio_is_of_sums() -> None:
    """exp((22 + 27 + 33 - 20 - 25 - 30) / 30) = exp(7 / 30); every answer lies between exp(2 / 10) and exp(3 / 10)."""
    change = compare(BASE, UNLEARNED).perplexity["retain_test"]
    assert change.ratio == pytest.approx(math.exp(7 / 30))
    assert change.ratio == pytest.approx(change.after / change.before)
    assert math.exp(0.2) - 1e-9 <= change.low < change.ratio < change.high <= math.exp(0.3) + 1e-9
    assert change.examples == 3


def test_tasks_are_paired_by_example() -> None:
    """Of 40 examples 30 are right before, and 5 of those no more afterwards: -.125, whichever they are."""

    def scored(made: EvaluationResult, digits: str) -> EvaluationResult:
        accuracy = digits.count("1") / len(digits)
        tasks = {"t": TaskScores(version=None, shots=0, samples=40, metrics={"acc": accuracy, "bleu": 2.0})}
        found = HarnessScores(harness="0", limit=None, asked=("t",), tasks=tasks, hits={"t": {"acc": digits}})
        return dataclasses.replace(made, lm_eval=found)

    base, unlearned = scored(BASE, "1" * 30 + "0" * 10), scored(UNLEARNED, "0" * 5 + "1" * 25 + "0" * 10)
    change = compare(base, unlearned).lm_eval["t"]
    assert (change.before.value, change.after.value, change.difference) == (0.75, 0.625, -0.125)
    assert -0.25 < change.low < change.difference < change.high < 0, "paired: far narrower than two Wilson intervals"
    rows = {row.label: row for row in utility_rows(compare(base, unlearned))}
    assert rows["lm-eval: t, acc"].change.startswith("-0.125 (-0.")
    shorter = scored(UNLEARNED, "1" * 30)
    with pytest.raises(EvaluationError, match="hold t of 40 and 30 different examples"):
        compare(base, shorter)


def test_prompts_that_change_alike_leave_room_for_doubt() -> None:
    """The score interval of paired answers is the Wilson bound of 0 of 50 on either side, where a bootstrap draws 0
    each time.
    """
    bound = 1.959964**2 / (50 + 1.959964**2)
    shares: list[Mapping[Outcome, int]] = [{"harmful": 50}, {"harmful": 20, "refusal": 30}]
    for outcomes in shares:
        same = compare(result(outcomes), result(outcomes)).replies["forget_test"]["harmful"]
        assert (same.difference, same.p_value) == (0, 1)
        assert (same.low, same.high) == pytest.approx((-bound, bound), abs=1e-6)
    fallen = compare(result({"harmful": 50}), result({"refusal": 50})).replies["forget_test"]
    assert (fallen["harmful"].difference, fallen["harmful"].low) == (-1, -1)
    # (50 d - 50)^2 = 50 z^2 (2 q + d (1 - d)) with q = (1 - d) / 2: 50 (1 - d) = z^2 (1 + d).
    square = 1.959964**2
    assert fallen["harmful"].high == pytest.approx(-(50 - square) / (50 + square), abs=1e-6)
    assert fallen["refusal"].low == pytest.approx((50 - square) / (50 + square), abs=1e-6)
    assert (fallen["refusal"].rose, fallen["refusal"].fell) == (50, 0)
    assert paired_change([False] * 50, [True] * 50).low == fallen["refusal"].low


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": dataclasses.replace(SETUP, decoding={"do_sample": True})}, "differ in decoding"),
        ({"setup": dataclasses.replace(SETUP, prompt_format="paper")}, "differ in prompt_format"),
        ({"judge": dataclasses.replace(EXACT, version="0")}, "differ in judge"),
        ({"outcomes": UNLEARNED.outcomes[:-1]}, "10 and 9 replies to different prompts"),
        ({"losses": ()}, "3 and 0 answers to different prompts"),
        ({"losses": tuple(dataclasses.replace(loss, tokens=11) for loss in UNLEARNED.losses)}, "one tokenizer"),
    ],
)
def test_evaluations_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare(BASE, dataclasses.replace(UNLEARNED, **changes))  # type: ignore[arg-type]


def test_a_result_survives_the_disk(tmp_path: Path) -> None:
    UNLEARNED.write(tmp_path)
    write_rows(tmp_path / OUTCOMES_FILE, {}, UNLEARNED.outcomes)
    write_rows(tmp_path / PERPLEXITY_FILE, {}, UNLEARNED.losses)
    assert read_result(tmp_path) == UNLEARNED
    content = json.loads((tmp_path / EvaluationResult.FILE).read_text())
    assert all(f"- ``{key}``" in str(results.__doc__) or f"; ``{key}``" in str(results.__doc__) for key in content)
    assert compare(BASE, read_result(tmp_path)) == compare(BASE, UNLEARNED)


@pytest.mark.parametrize("content", ["[]", '{"schema_version": 5}', '{"schema_version": 6, "judge": {}}'])
def test_a_broken_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / EvaluationResult.FILE).write_text(content)
    with pytest.raises(EvaluationError, match="evaluation.json"):
        read_result(tmp_path)
