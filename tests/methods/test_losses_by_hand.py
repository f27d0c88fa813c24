"""The loss of each method, and what it puts into it, by hand. P is the original model, Q the one in training."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import ModelMaker
from sku.data.examples import RowType
from sku.methods import method_named
from sku.methods.circuit_breakers import holding_loss, rerouting_loss, shares
from sku.methods.dpo import dpo_loss
from sku.methods.npo import npo_loss
from sku.methods.rmu import rmu_loss, steering_vector
from sku.methods.safe_unlearning import safe_unlearning_loss
from sku.methods.simnpo import simnpo_loss
from sku.training.objective import ScoredRows, TrainingStep

LN2, LN3 = math.log(2), math.log(3)
LIKELY, UNLIKELY = math.log(4 / 3), math.log(4)
"""-log p of token 0 and token 1 under scores (log 3, 0)."""


def test_npo() -> None:
    """With beta = 1/2. NLL above the reference by 2 log 3: -4 log sigmoid(log 3) = -4 log 3/4 = 4 log 4/3.

    Below it by as much: -4 log sigmoid(-log 3) = 4 log 4. Equal: 4 log 2.
    """
    reference = torch.tensor([5.0, 5.0, 5.0])
    nll = torch.tensor([5 + 2 * LN3, 5 - 2 * LN3, 5.0])
    torch.testing.assert_close(npo_loss(nll, reference, beta=0.5), 4 * torch.tensor([LIKELY, UNLIKELY, LN2]))


def test_simnpo() -> None:
    """With beta = 2 and NLL per token log 3. gamma 0: -log sigmoid(log 9) = log 10/9. gamma log 3: -log 3/4 = log 4/3.

    With gamma multiplied by beta, as in the authors' code, the last would be log 2.
    """
    mean_nll = torch.tensor([LN3])
    torch.testing.assert_close(simnpo_loss(mean_nll, beta=2.0, gamma=0.0), torch.tensor([math.log(10 / 9)]))
    torch.testing.assert_close(simnpo_loss(mean_nll, beta=2.0, gamma=LN3), torch.tensor([LIKELY]))


def test_safe_unlearning() -> None:
    """With beta = 2. NLL per token above the reference by log(3) / 2: -log sigmoid(log 3) = log 4/3; equal: log 2.

    NPO of the same would have the factor 2 / beta, here 1, and sums in place of means.
    """
    reference = torch.tensor([5.0, 5.0, 5.0], requires_grad=True)
    nll = torch.tensor([5 + LN3 / 2, 5 - LN3 / 2, 5.0], requires_grad=True)
    loss = safe_unlearning_loss(nll, reference, beta=2.0)
    torch.testing.assert_close(loss, torch.tensor([LIKELY, UNLIKELY, LN2]))
    loss.sum().backward()
    assert reference.grad is None


def test_rerouting() -> None:
    """Two layers. Position 0: cosines 1 and 4/5, mean 9/10; position 1: 0 and -1, which counts as 0; both example 0.

    Position 2, example 1: 3/5 and 0, mean 3/10. Lengths don't count: (2, 0) points where (1, 0) does.
    """
    reference = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]).repeat(3, 1, 1).requires_grad_()
    hidden = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-3.0, -4.0]], [[3.0, 4.0], [4.0, -3.0]]])
    loss = rerouting_loss(hidden, reference, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(loss, torch.tensor([0.45, 0.3]))
    assert not loss.requires_grad, "the original's states are no part of the graph"


def test_holding() -> None:
    """Distances at two layers: 5 and 0, mean 5/2; 0 and 0; both example 0: 5/4. Example 1: 13 and 1, mean 7.

    Squared, as with RMU, the last would be 85. The slope is finite where nothing has moved.
    """
    reference = torch.zeros(3, 2, 2)
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[5.0, -12.0], [0.0, 1.0]]])
    loss = holding_loss(hidden.requires_grad_(), reference, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(loss, torch.tensor([1.25, 7.0]))
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_schedule_of_circuit_breakers() -> None:
    """Step 1 of 150: 299/300 and 1/300; the last: half each."""
    assert shares(1 / 150) == pytest.approx((299 / 300, 1 / 300))
    assert shares(1.0) == (0.5, 0.5)


def test_dpo() -> None:
    """With beta = 1/2. Safe answer log 3 likelier than at first, harmful one log 3 less: sigmoid(log 3), so log 4/3.

    Both the other way round: sigmoid(-log 3), so log 4. Both likelier by log 3, or nothing changed: log 2.
    """
    reference_safe, reference_harmful = torch.full((4,), 7.0), torch.full((4,), 2.0)
    safe = torch.tensor([7 - LN3, 7 + LN3, 7 - LN3, 7.0])
    harmful = torch.tensor([2 + LN3, 2 - LN3, 2 - LN3, 2.0])
    loss = dpo_loss(safe, harmful, reference_safe, reference_harmful, beta=0.5)
    torch.testing.assert_close(loss, torch.tensor([LIKELY, UNLIKELY, LN2, LN2]))


def test_rmu() -> None:
    """Vector c u = (1, 0). Position (1, 2): (0 + 4) / 2 = 2; (3, 4): (4 + 16) / 2 = 10; (1, 1): (0 + 1) / 2.

    Example 0 has the first two, mean 6; example 1 the last, 1/2. A mean over all three would be 12.5 / 3. From states
    of the original, differences (1, 2) and (0, 0) of example 0: (5/2 + 0) / 2 = 5/4; (2, 0) of example 1: 4/2 = 2.
    """
    example_N = torch.tensor([0, 0, 1])
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 1.0]], requires_grad=True)
    torch.testing.assert_close(rmu_loss(hidden, torch.tensor([1.0, 0.0]), example_N, 2), torch.tensor([6.0, 0.5]))
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-1.0, 1.0]], requires_grad=True)
    loss = rmu_loss(hidden, reference, example_N, 2)
    torch.testing.assert_close(loss, torch.tensor([1.25, 2.0]))
    loss.sum().backward()
    assert reference.grad is None


def test_the_steering_vector_is_a_seeded_direction_of_length_c() -> None:
    before = torch.random.get_rng_state()
    vector = steering_vector(64, coefficient=6.5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before), "the draws of training stay as they are"
    assert float(vector.norm()) == pytest.approx(6.5)
    assert float(vector.min()) >= 0, "drawn from [0, 1)"
    assert torch.equal(vector, steering_vector(64, coefficient=6.5, seed=3))
    assert not torch.allclose(vector, steering_vector(64, coefficient=6.5, seed=4))


def test_shapes_that_would_broadcast_are_refused() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="differ"):
        npo_loss(two, one, beta=0.1)
    with pytest.raises(ValueError, match="differ"):
        dpo_loss(two, two, one, two, beta=0.1)
    for target in (one, torch.zeros(1, 4)):
        with pytest.raises(ValueError, match="don't fit"):
            rmu_loss(torch.zeros(2, 4), target, torch.tensor([0, 0]), 1)


def one_answer(scores: list[float], targets: list[int]) -> ScoredRows:
    return ScoredRows(
        scores_NV=torch.tensor([scores]).repeat(len(targets), 1),
        targets_N=torch.tensor(targets),
        row_N=torch.zeros(len(targets), dtype=torch.long),
        example_M=torch.tensor([0]),
        num_examples=1,
    )


ANSWERS = {RowType.FORGET: [0, 1], RowType.SAFE: [0, 0], RowType.RETAIN: [0, 1, 1], RowType.MISMATCHED: [0, 1]}
"""Tokens of one row of each kind, to which Q gives (3/4, 1/4) and P (1/2, 1/2)."""
RETAIN_GD = (LIKELY + 2 * UNLIKELY) / 3


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # Whole answers: log 4/3 + log 4 = log 16/3 against log 4, so sigmoid(log 4/3) = 4/7 and 2 log 7/4.
        ("npo", {"beta": 1.0}, {"forget": 2 * math.log(7 / 4), "retain": RETAIN_GD}),
        # Per token: log(16/3) / 2, times beta log 16/3, sigmoid 16/19, and 2 / beta = 1.
        ("simnpo", {"beta": 2.0}, {"forget": math.log(19 / 16), "retain": RETAIN_GD}),
        # Safe answer: log 4 - log 16/9 = log 9/4 gained; harmful: log 4 - log 16/3 = log 3/4; sigmoid(log 3) = 3/4.
        ("dpo", {"beta": 1.0}, {"preference": LIKELY}),
        ("grad_diff", {}, {"ascent": -math.log(16 / 3) / 2, "retain": RETAIN_GD}),
        ("refusal_tuning", {}, {"refusal": LIKELY, "retain": RETAIN_GD}),
        # Per token: log(16/3) / 2 against log 2, so sigmoid(log(4/3) / 2 * 2) = 4/7.
        ("safe_unlearning", {"beta": 2.0}, {"forget": math.log(7 / 4), "safe": LIKELY, "retain": RETAIN_GD}),
        ("fine_tune", {}, {"retain": RETAIN_GD}),
        ("task_vector", {}, {"guided_distortion": math.log(16 / 3) / 2}),
        # One mismatched row, tokens 0 and 1, in place of K.
        (
            "gradient_ascent_mismatch",
            {},
            {"ascent": -math.log(16 / 3) / 2, "mismatch": math.log(16 / 3) / 2, "retain_kl": LIKELY / 2},
        ),
        ("grad_diff_kl", {}, {"ascent": -math.log(16 / 3) / 2, "retain_kl": LIKELY / 2}),
    ],
)
def test_terms(name: str, settings: dict[str, float], expected: dict[str, float], make_model: ModelMaker) -> None:
    """KL(P||Q) = 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4) = 1/2 (log 2/3 + log 2) = 1/2 log 4/3."""
    method = method_named(name)
    step = TrainingStep(
        rows=lambda kind: one_answer([LN3, 0.0], ANSWERS[kind]),
        reference=lambda kind: one_answer([0.0, 0.0], ANSWERS[kind]),
    )
    losses = method.objective(method.settings(**settings), make_model()).losses(step)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)
