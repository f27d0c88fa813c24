"""The arithmetic that the modules share, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sku.losses import answer_nll, mean_per_example, token_kl

LN3 = math.log(3)


def test_nll_by_hand() -> None:
    """Scores (log 3, 0): probabilities (3/4, 1/4), so -log p is log(4/3) for token 0 and log 4 for token 1."""
    nll = answer_nll(torch.tensor([[LN3, 0.0], [LN3, 0.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(nll, torch.tensor([math.log(4 / 3), math.log(4)]))


def test_kl_by_hand_from_the_reference_to_the_model() -> None:
    """P = (3/4, 1/4), Q = (1/2, 1/2): 3/4 log(3/4 / 1/2) + 1/4 log(1/4 / 1/2) = 3/4 log 1.5 - 1/4 log 2 = 0.1308.

    The other way round is KL(Q||P) = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3) = 0.1438. A constant added to all scores
    changes nothing.
    """
    p, q = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    torch.testing.assert_close(token_kl(p, q), torch.tensor([0.75 * math.log(1.5) - 0.25 * math.log(2)]))
    torch.testing.assert_close(token_kl(q, p), torch.tensor([0.5 * math.log(4 / 3)]))
    assert float(token_kl(p, p + 7).abs()) < 1e-6


def test_no_gradient_flows_into_the_reference() -> None:
    reference, model = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    token_kl(reference, model).sum().backward()
    assert reference.grad is None
    assert model.grad is not None
    assert float(model.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_gaps_between_scores_stay_finite_in_value_and_gradient(dtype: torch.dtype) -> None:
    """A gap of 1e4: P is all on token 0, Q all on token 1, so -log q_0 = 1e4 and KL = 1e4 (softmax underflows)."""
    reference = torch.tensor([[1e4, 0.0]], dtype=dtype)
    model = torch.tensor([[0.0, 1e4]], dtype=dtype, requires_grad=True)
    nll, kl = answer_nll(model, torch.tensor([0])), token_kl(reference, model)
    assert nll.dtype == kl.dtype == torch.float32
    gap = float(torch.tensor(1e4, dtype=dtype))
    torch.testing.assert_close(torch.cat([nll, kl]), torch.tensor([gap, gap]))
    (nll + kl).sum().backward()
    assert model.grad is not None
    # d nll = q - onehot(0) = (-1, 1); d KL = q - p = (-1, 1).
    torch.testing.assert_close(model.grad, torch.tensor([[-2.0, 2.0]], dtype=dtype))


def test_half_precision_scores_are_compared_in_float32() -> None:
    """In bfloat16 a log-softmax over 1,000 equal scores would be rounded to 6.9062; log 1000 = 6.9078."""
    nll = answer_nll(torch.zeros(1, 1000, dtype=torch.bfloat16), torch.tensor([5]))
    torch.testing.assert_close(nll, torch.tensor([math.log(1000)]))


def test_mean_per_example_weighs_long_and_short_alike() -> None:
    """Example 0 has 1, 2, 3 (mean 2), example 1 has 10 alone: means (2, 10), whose mean is 6 and not 16 / 4 = 4."""
    values = torch.tensor([1.0, 10.0, 2.0, 3.0], requires_grad=True)
    means = mean_per_example(values, torch.tensor([0, 1, 0, 0]), 2)
    assert means.tolist() == [2.0, 10.0]
    means.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1 / 3, 1.0, 1 / 3, 1 / 3]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    one, two, three = (torch.zeros(n, dtype=torch.long) for n in (1, 2, 3))
    for call, *arguments in (
        (answer_nll, torch.zeros(2, 4), three), (answer_nll, torch.zeros(1, 2, 4), one),
        (token_kl, torch.zeros(2, 4), torch.zeros(3, 4)), (token_kl, torch.zeros(4), torch.zeros(4)),
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011
            call(*arguments)
    with pytest.raises(ValueError):  # noqa: PT011
        mean_per_example(two.float(), three, 1)
