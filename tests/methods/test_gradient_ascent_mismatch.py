"""GA+Mismatch against the three equations of its paper, on a vocabulary of two tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import ModelMaker
from sku.data.examples import RowType
from sku.methods.gradient_ascent_mismatch import GRADIENT_ASCENT_MISMATCH, GradientAscentMismatchSettings
from sku.training.objective import ScoredRows, TrainingStep

LN3 = math.log(3)
LIKELY, UNLIKELY = math.log(4 / 3), math.log(4)
"""-log p of token 0 and token 1 under scores (log 3, 0)."""


def rows(logits_NV: Tensor, targets: list[int], row_N: list[int], example_M: list[int]) -> ScoredRows:
    return ScoredRows(
        scores_NV=logits_NV,
        targets_N=torch.tensor(targets),
        row_N=torch.tensor(row_N),
        example_M=torch.tensor(example_M),
        num_examples=2,
    )


SCORES = torch.tensor([[LN3, 0.0]])
STEP = TrainingStep(
    num_examples=2,
    rows={
        RowType.FORGET: rows(SCORES.repeat(3, 1), [0, 1, 0], [0, 0, 1], [0, 1]),
        RowType.MISMATCHED: rows(SCORES.repeat(6, 1), [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 2, 3], [0, 0, 1, 1]),
        RowType.RETAIN: rows(torch.zeros(3, 2), [0, 1, 1], [0, 0, 1], [0, 1]),
    }.__getitem__,
    reference={
        RowType.RETAIN: rows(torch.tensor([[LN3, 0.0], [0.0, 0.0], [0.0, LN3]]), [0, 1, 1], [0, 0, 1], [0, 1])
    }.__getitem__,
)


def test_all_three_terms_and_their_sum(make_model: ModelMaker) -> None:
    """Two joint examples, K = 2.

    Ascent: answer 0 is tokens 0, 1, answer 1 is token 0: -(log 4/3 + log 4) / 2 and -log 4/3.
    Mismatch: example 0 has A = 0, 0, 0 (mean log 4/3) and B = 1 (log 4), example 1 has C = 1 and D = 0: both
    (log 4/3 + log 4) / 2.
    KL(P||Q), Q = (1/2, 1/2): P = (3/4, 1/4) gives k = 3/4 log 3/2 + 1/4 log 1/2 = 0.1308, P = Q gives 0 and
    P = (1/4, 3/4) gives k again; example 0 has the first two (mean k / 2), example 1 the last (k).
    Sum with e1 = 1/2, e2 = e3 = 1, each term a mean over the two examples.
    """
    objective = GRADIENT_ASCENT_MISMATCH.objective(GradientAscentMismatchSettings(), make_model())
    losses = objective.losses(STEP)
    mixed = (LIKELY + UNLIKELY) / 2
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = {
        "ascent": torch.tensor([-mixed, -LIKELY]),
        "mismatch": torch.tensor([mixed, mixed]),
        "retain_kl": torch.tensor([kl / 2, kl]),
    }
    torch.testing.assert_close(dict(losses), expected)
    total = sum(objective.weights[name] * float(loss.mean()) for name, loss in losses.items())
    assert total == pytest.approx(-0.5 * (mixed + LIKELY) / 2 + mixed + 0.75 * kl, rel=1e-5)


def test_the_rows_are_those_of_the_paper(make_model: ModelMaker) -> None:
    """K = 5 NORMAL answers after the harmful prompt, weights 0.5, 1, 1 as in the authors' code."""
    objective = GRADIENT_ASCENT_MISMATCH.objective(GradientAscentMismatchSettings(), make_model())
    assert objective.weights == {"ascent": 0.5, "mismatch": 1.0, "retain_kl": 1.0}
    plan = objective.rows
    assert (plan.forget, plan.mismatched, plan.mismatched_from, plan.retain) == (True, 5, "retain", True)
    assert plan.safe == "none"
