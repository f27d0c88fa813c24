"""The arithmetic that the modules share, worked out by hand, and the same chunk by chunk from hidden states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sku.losses import Head, HeadScores, answer_nll, mean_per_example, token_kl

LN3 = math.log(3)
POSITIONS, WIDTH, VOCABULARY = 11, 6, 37
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "scale and softcap": {"scale": 2.0, "softcap": 1.5}}


def test_nll_by_hand() -> None:
    """Scores (log 3, 0): probabilities (3/4, 1/4), so -log p is log(4/3) for token 0 and log 4 for token 1.

    In bfloat16 a log-softmax over 1,000 equal scores would be rounded to 6.9062; log 1000 = 6.9078.
    """
    nll = answer_nll(torch.tensor([[LN3, 0.0], [LN3, 0.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(nll, torch.tensor([math.log(4 / 3), math.log(4)]))
    nll = answer_nll(torch.zeros(1, 1000, dtype=torch.bfloat16), torch.tensor([5]))
    torch.testing.assert_close(nll, torch.tensor([math.log(1000)]))


def test_kl_by_hand_from_the_reference_to_the_model() -> None:
    """P = (3/4, 1/4), Q = (1/2, 1/2): 3/4 log(3/4 / 1/2) + 1/4 log(1/4 / 1/2) = 3/4 log 1.5 - 1/4 log 2 = 0.1308.

    The other way round is KL(Q||P) = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3) = 0.1438. A constant added to all scores
    changes nothing.
    """
    p, q = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    torch.testing.assert_close(token_kl(p, q), torch.tensor([0.75 * math.log(1.5) - 0.25 * math.log(2)]))
    torch.testing.assert_close(token_kl(q, p), torch.tensor([0.5 * math.log(4 / 3)]))
    assert float(token_kl(p, p + 7).abs()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_gaps_between_scores_stay_finite_in_value_and_gradient(dtype: torch.dtype) -> None:
    """A gap of 1e4: P is all on token 0, Q all on token 1, so -log q_0 = 1e4 and KL = 1e4 (softmax underflows)."""
    reference = torch.tensor([[1e4, 0.0]], dtype=dtype, requires_grad=True)
    model = torch.tensor([[0.0, 1e4]], dtype=dtype, requires_grad=True)
    nll, kl = answer_nll(model, torch.tensor([0])), token_kl(reference, model)
    gap = float(torch.tensor(1e4, dtype=dtype))
    torch.testing.assert_close(torch.cat([nll, kl]), torch.tensor([gap, gap]))
    (nll + kl).sum().backward()
    # d nll = q - onehot(0) = (-1, 1); d KL = q - p = (-1, 1).
    torch.testing.assert_close(model.grad, torch.tensor([[-2.0, 2.0]], dtype=dtype))
    assert reference.grad is None


def test_mean_per_example_weighs_long_and_short_alike() -> None:
    """Example 0 has 1, 2, 3 (mean 2), example 1 has 10 alone: means (2, 10), whose mean is 6 and not 16 / 4 = 4."""
    values = torch.tensor([1.0, 10.0, 2.0, 3.0], requires_grad=True)
    means = mean_per_example(values, torch.tensor([0, 1, 0, 0]), 2)
    assert means.tolist() == [2.0, 10.0]
    means.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1 / 3, 1.0, 1 / 3, 1 / 3]))


def problem(
    *, dtype: torch.dtype = torch.float32, trained: bool = True, bias: bool = False, seed: int = 0, **head: Any
) -> tuple[HeadScores, Tensor]:
    """Hidden states, a head and targets; chunks of 4 positions, so that the last one is a part."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    made = Head(
        weight_VH=draw(VOCABULARY, WIDTH).requires_grad_(trained),
        bias_V=draw(VOCABULARY).requires_grad_(trained) if bias else None,
        **({"chunk_rows": 4} | head),
    )
    hidden_NH = draw(POSITIONS, WIDTH).requires_grad_()
    return HeadScores(hidden_NH=hidden_NH, head=made), torch.randint(VOCABULARY, (POSITIONS,), generator=generator)


def test_shapes_that_do_not_fit_are_refused() -> None:
    one, three = (torch.zeros(n, dtype=torch.long) for n in (1, 3))
    scores, targets_N = problem()
    for call, *arguments in (
        (answer_nll, torch.zeros(2, 4), three), (answer_nll, torch.zeros(1, 2, 4), one),
        (answer_nll, scores, targets_N[1:]), (token_kl, torch.zeros(2, 4), torch.zeros(3, 4)),
        (token_kl, torch.zeros(4), torch.zeros(4)), (token_kl, torch.zeros(POSITIONS, 4), scores),
        (mean_per_example, three.float(), one, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011
            call(*arguments)


def losses_and_gradients(loss_N: Tensor, scores: HeadScores) -> dict[str, Tensor]:
    """Loss of each position, and what flows back from an uneven weighting of them, 0 among the weights."""
    leaves = {"hidden": scores.hidden_NH, "weight": scores.head.weight_VH, "bias": scores.head.bias_V}
    for leaf in leaves.values():
        if leaf is not None:
            leaf.grad = None
    weights_N = torch.linspace(-1, 2, POSITIONS)
    weights_N[3] = 0
    (loss_N * weights_N).sum().backward()
    return {"loss": loss_N.detach()} | {
        name: leaf.grad.clone() for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None
    }


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Up to a part of the largest entry."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().max()) <= 1e-5 * float(second[name].abs().max()), name


@pytest.mark.parametrize(("trained", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_chunks_give_what_all_scores_at_once_give(head: dict[str, Any], trained: bool, bias: bool) -> None:
    scores, targets_N = problem(trained=trained, bias=bias, **head)
    reference, _ = problem(bias=bias, seed=1, **head)
    nll = losses_and_gradients(answer_nll(scores, targets_N), scores)
    assert nll.keys() == {"loss", "hidden"} | ({"weight"} | ({"bias"} if bias else set()) if trained else set())
    assert_close(nll, losses_and_gradients(answer_nll(scores.logits(), targets_N), scores))
    kl = losses_and_gradients(token_kl(reference, scores), scores)
    assert_close(kl, losses_and_gradients(token_kl(reference.logits(), scores.logits()), scores))
    assert float(kl["loss"].min()) > 0.01
    assert reference.hidden_NH.grad is None
    assert reference.head.weight_VH.grad is None


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_gradients_are_those_of_finite_differences(trained: bool) -> None:
    head = HEADS["scale and softcap"]
    scores, targets_N = problem(dtype=torch.float64, trained=trained, bias=True, **head)
    reference, _ = problem(dtype=torch.float64, bias=True, seed=1, **head)

    def rebuilt(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> HeadScores:
        made = Head(weight_VH=weight_VH, bias_V=bias_V, chunk_rows=4, **head)
        return HeadScores(hidden_NH=hidden_NH, head=made)

    assert scores.head.bias_V is not None
    inputs = (scores.hidden_NH, scores.head.weight_VH, scores.head.bias_V)
    assert torch.autograd.gradcheck(lambda *leaves: answer_nll(rebuilt(*leaves), targets_N), inputs)
    assert torch.autograd.gradcheck(lambda *leaves: token_kl(reference, rebuilt(*leaves)), inputs)


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_no_tensor_of_all_positions_and_the_whole_vocabulary_is_made(trained: bool) -> None:
    """64 positions, a vocabulary of 500, chunks of 8: the largest tensor is a chunk's or the head's, not N times V."""
    weight_VH = torch.ones(500, 4).requires_grad_(trained)
    hidden_NH = torch.ones(64, 4).requires_grad_()
    scores = HeadScores(hidden_NH=hidden_NH, head=Head(weight_VH=weight_VH, chunk_rows=8))
    reference = HeadScores(hidden_NH=hidden_NH.detach() + 1, head=scores.head)
    with LargestTensor() as seen:
        (answer_nll(scores, torch.arange(64)).sum() + token_kl(reference, scores).sum()).backward()
    assert seen.elements == 8 * 500
