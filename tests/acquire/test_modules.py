"""The three losses of stage 1, by hand. P is the original model, Q the one in training."""

from __future__ import annotations

import math

import pytest
import torch

from sku.config import PreservationMode
from sku.methods.sku import guided_distortion_loss, preservation_divergence_loss, random_disassociation_loss

LN3 = math.log(3)
LIKELY, UNLIKELY = math.log(4 / 3), math.log(4)
"""-log p of token 0 and token 1 under scores (log 3, 0)."""


def scores(rows: int) -> torch.Tensor:
    return torch.tensor([[LN3, 0.0]]).repeat(rows, 1)


def test_guided_distortion_by_hand() -> None:
    """Answer 0 is tokens 0, 1: (log 4/3 + log 4) / 2. Answer 1 is token 0: log 4/3."""
    loss = guided_distortion_loss(scores(3), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(loss, torch.tensor([(LIKELY + UNLIKELY) / 2, LIKELY]))


def test_random_disassociation_is_the_mean_over_tokens_then_over_answers() -> None:
    """K = 2 for one prompt: A is tokens 0, 0, 0 (mean log 4/3), B is token 1 (log 4); mean (log 4/3 + log 4) / 2.

    A mean over all four tokens would be (3 log 4/3 + log 4) / 4: less, and answer A would weigh three times B.
    """
    loss = random_disassociation_loss(
        scores(4), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0]), 1
    )
    torch.testing.assert_close(loss, torch.tensor([(LIKELY + UNLIKELY) / 2]))


# KL((3/4, 1/4) || (1/2, 1/2)), worked out in test_losses.py.
KL = 0.75 * math.log(1.5) - 0.25 * math.log(2)


@pytest.mark.parametrize(("mode", "sign"), [("divergence", -1.0), ("retention", 1.0)])
def test_sign_and_mean(mode: PreservationMode, sign: float) -> None:
    """Example 0 has KL and 0 at its two positions, mean KL / 2; example 1 has KL at its one."""
    reference, model = scores(3), torch.tensor([[0.0, 0.0], [LN3, 0.0], [0.0, 0.0]])
    loss = preservation_divergence_loss(reference, model, torch.tensor([0, 0, 1]), 2, mode=mode, cap=None)
    torch.testing.assert_close(loss, torch.tensor([sign * KL / 2, sign * KL]))


def test_beyond_the_cap_a_token_keeps_its_value_and_stops_pulling() -> None:
    """Gaps of 3 the other way: KL of about 2.7 nats is counted as 1; the small KL beside it is counted in full."""
    reference = torch.tensor([[3.0, 0.0], [LN3, 0.0]])
    model = torch.tensor([[0.0, 3.0], [0.0, 0.0]], requires_grad=True)
    loss = preservation_divergence_loss(reference, model, torch.tensor([0, 1]), 2, mode="divergence", cap=1.0)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.0, -KL]))
    loss.sum().backward()
    assert model.grad is not None
    assert model.grad[0].tolist() == [0.0, 0.0]
    assert float(model.grad[1].abs().sum()) > 0


def test_retention_has_no_cap() -> None:
    """KL(P||Q) with p_0 = q_1 = s = 1/(1+e^-3): (2 s - 1) * 3 = 2.7155, all of it counted."""
    loss = preservation_divergence_loss(
        torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([0]), 1, mode="retention", cap=1.0
    )
    torch.testing.assert_close(loss, torch.tensor([(2 / (1 + math.exp(-3)) - 1) * 3]))
