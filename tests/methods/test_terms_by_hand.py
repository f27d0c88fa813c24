"""From rows to terms: which likelihoods of which rows the preference methods put into their losses, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import ModelMaker
from sku.data.examples import RowType
from sku.methods import method_named
from sku.training.objective import ScoredRows, TrainingStep

SCORES, UNIFORM = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)


def one_answer(scores: Tensor, targets: list[int]) -> ScoredRows:
    return ScoredRows(
        scores_NV=scores.repeat(len(targets), 1),
        targets_N=torch.tensor(targets),
        row_N=torch.zeros(len(targets), dtype=torch.long),
        example_M=torch.tensor([0]),
        num_examples=1,
    )


# Q gives (3/4, 1/4), the original model P (1/2, 1/2).
ANSWERS = {RowType.FORGET: [0, 1], RowType.SAFE: [0, 0], RowType.RETAIN: [0, 1, 1], RowType.MISMATCHED: [0, 1]}
STEP = TrainingStep(
    num_examples=1,
    rows=lambda kind: one_answer(SCORES, ANSWERS[kind]),
    reference=lambda kind: one_answer(UNIFORM, ANSWERS[kind]),
)
RETAIN_GD = (math.log(4 / 3) + 2 * math.log(4)) / 3


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # Whole answers: log 4/3 + log 4 = log 16/3 against log 4, so sigmoid(log 4/3) = 4/7 and 2 log 7/4.
        ("npo", {"beta": 1.0}, {"forget": 2 * math.log(7 / 4), "retain": RETAIN_GD}),
        # Per token: log(16/3) / 2, times beta log 16/3, sigmoid 16/19, and 2 / beta = 1.
        ("simnpo", {"beta": 2.0}, {"forget": math.log(19 / 16), "retain": RETAIN_GD}),
        # Safe answer: log 4 - log 16/9 = log 9/4 gained; harmful: log 4 - log 16/3 = log 3/4; sigmoid(log 3) = 3/4.
        ("dpo", {"beta": 1.0}, {"preference": math.log(4 / 3)}),
        ("grad_diff", {}, {"ascent": -math.log(16 / 3) / 2, "retain": RETAIN_GD}),
        ("refusal_tuning", {}, {"refusal": math.log(4 / 3), "retain": RETAIN_GD}),
        # Per token: log(16/3) / 2 against log 2, so sigmoid(log(4/3) / 2 * 2) = 4/7.
        (
            "safe_unlearning",
            {"beta": 2.0},
            {"forget": math.log(7 / 4), "safe": math.log(4 / 3), "retain": RETAIN_GD},
        ),
        ("fine_tune", {}, {"retain": RETAIN_GD}),
        ("task_vector", {}, {"guided_distortion": math.log(16 / 3) / 2}),
        # One mismatched row, tokens 0 and 1, in place of K.
        (
            "gradient_ascent_mismatch",
            {},
            {
                "ascent": -math.log(16 / 3) / 2,
                "mismatch": math.log(16 / 3) / 2,
                "retain_kl": math.log(4 / 3) / 2,
            },
        ),
        ("grad_diff_kl", {}, {"ascent": -math.log(16 / 3) / 2, "retain_kl": math.log(4 / 3) / 2}),
    ],
)
def test_terms(name: str, settings: dict[str, float], expected: dict[str, float], make_model: ModelMaker) -> None:
    """KL(P||Q) = 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4) = 1/2 (log 2/3 + log 2) = 1/2 log 4/3."""
    method = method_named(name)
    losses = method.objective(method.settings(**settings), make_model()).losses(STEP)
    assert {name: loss.tolist() for name, loss in losses.items()} == {
        name: [pytest.approx(value, rel=1e-5)] for name, value in expected.items()
    }


def test_the_mismatched_answers_of_gradient_ascent_are_normal_ones(make_model: ModelMaker) -> None:
    """K = 5 NORMAL answers after the harmful prompt, weights 0.5, 1, 1 as in the authors' code."""
    method = method_named("gradient_ascent_mismatch")
    objective = method.objective(method.settings(), make_model())
    assert objective.weights == {"ascent": 0.5, "mismatch": 1.0, "retain_kl": 1.0}
    assert (objective.rows.mismatched, objective.rows.mismatched_from) == (5, "retain")
