"""Losses from hidden states, chunk by chunk, against the same losses from all scores at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sku.losses import Head, HeadScores, answer_nll, token_kl

POSITIONS, WIDTH, VOCABULARY = 11, 6, 37
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"scale": 2.0, "softcap": 1.5},
}


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


def reference_of(scores: HeadScores) -> HeadScores:
    """Another model's hidden states and weights, in the same shape."""
    other, _ = problem(dtype=scores.hidden_NH.dtype, bias=scores.head.bias_V is not None, seed=1)
    head = Head(
        weight_VH=other.head.weight_VH, bias_V=other.head.bias_V, scale=scores.head.scale,
        softcap=scores.head.softcap, dtype=scores.head.dtype, chunk_rows=scores.head.chunk_rows,
    )  # fmt: skip
    return HeadScores(hidden_NH=other.hidden_NH, head=head)


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


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    """Up to a part of the largest entry."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        scale = float(second[name].abs().max())
        assert float((tensor - second[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["both"]], ids=["plain", "both"])
def test_chunks_give_what_all_scores_at_once_give(head: dict[str, Any], trained: bool, bias: bool) -> None:
    scores, targets_N = problem(trained=trained, bias=bias, **head)
    reference = reference_of(scores)
    names = {"loss", "hidden"} | ({"weight"} | ({"bias"} if bias else set()) if trained else set())
    nll = losses_and_gradients(answer_nll(scores, targets_N), scores)
    assert nll.keys() == names
    assert_close(nll, losses_and_gradients(answer_nll(scores.logits(), targets_N), scores), 1e-5)
    kl = losses_and_gradients(token_kl(reference, scores), scores)
    assert_close(kl, losses_and_gradients(token_kl(reference.logits(), scores.logits()), scores), 1e-5)
    assert float(kl["loss"].min()) > 0.01
    assert reference.hidden_NH.grad is None
    assert reference.head.weight_VH.grad is None


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["both"]], ids=["plain", "both"])
def test_gradients_are_those_of_finite_differences(head: dict[str, Any], trained: bool) -> None:
    scores, targets_N = problem(dtype=torch.float64, trained=trained, bias=True, **head)
    reference = reference_of(scores)
    assert scores.head.bias_V is not None
    inputs = (scores.hidden_NH, scores.head.weight_VH, scores.head.bias_V)

    def rebuilt(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> HeadScores:
        made = Head(weight_VH=weight_VH, bias_V=bias_V, **({"chunk_rows": 4} | head))
        return HeadScores(hidden_NH=hidden_NH, head=made)

    assert torch.autograd.gradcheck(lambda *leaves: answer_nll(rebuilt(*leaves), targets_N), inputs)
    assert torch.autograd.gradcheck(lambda *leaves: token_kl(reference, rebuilt(*leaves)), inputs)


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operation returns, and how many operations multiplied matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_no_tensor_of_all_positions_and_the_whole_vocabulary_is_made(trained: bool) -> None:
    """64 positions, a vocabulary of 500, chunks of 8: the largest tensor is a chunk's or the head's, not N times V."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(500, 4, generator=generator).requires_grad_(trained)
    hidden_NH = torch.randn(64, 4, generator=generator).requires_grad_()
    scores = HeadScores(hidden_NH=hidden_NH, head=Head(weight_VH=weight_VH, chunk_rows=8))
    reference = HeadScores(hidden_NH=hidden_NH.detach() + 1, head=scores.head)
    with LargestTensor() as seen:
        (answer_nll(scores, torch.arange(64)).sum() + token_kl(reference, scores).sum()).backward()
    assert seen.elements == 8 * 500
    with LargestTensor() as seen_at_once:
        answer_nll(scores.logits(), torch.arange(64)).sum().backward()
    assert seen_at_once.elements == 64 * 500
