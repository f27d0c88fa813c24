"""PerTA: every single parameter gets its own factor, by how much it matters for forgetting and for keeping.

Paper: https://arxiv.org/abs/2601.22030 (per-parameter task arithmetic). Established from its abstract and from public
notes on it: the task vector is rescaled entry by entry; the factors weigh the importance for the forget data against
that for the retain data; both are measured at the original weights, by gradients (PerTA-grad) or by mean squares of
gradients, the diagonal of the Fisher information (PerTA-fisher); a share of the data is enough. How the paper
normalises and bounds the factors could not be established. Our reading:

    ``w = f / (f + r)``, between 0 and 1, and ``tau' = w * tau``,

with ``f = |mean gradient|`` on harmful answers and r that on normal answers for ``grad``, and the mean over examples
of squared gradients for ``fisher``. An entry that matters for neither keeps half, as one that matters for both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll
from sku.negate.operators.base import Operated, Operator, OperatorContext
from sku.negate.operators.texts import answer_logits, batches, device_of, drawn
from sku.negate.task_vector import TaskVector, unique_weights


@dataclass(frozen=True, kw_only=True)
class PertaSettings:
    """How importance is measured."""

    importance: Literal["grad", "fisher"] = "grad"
    """``fisher`` takes one backward pass an example."""
    examples: int = 64
    """Most examples of each kind, drawn by the seed."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise RecipeError(f"examples is {self.examples}; it must be 1 or more")


def mean_gradient(
    model: PreTrainedModel, names: Sequence[str], examples: Sequence[TokenizedExample], batch_size: int
) -> dict[str, Tensor]:
    """Gradient of the answers' mean negative log-likelihood a token, by weight.

    Args:
        model: In evaluation mode. It is not changed.
        names: Weights.
        examples: At least one.
        batch_size: Examples at once.

    Returns:
        Name -> gradient on the CPU, float32.
    """
    tokens = sum(len(batch.targets_N) for batch in batches(examples, batch_size, device_of(model)))
    return _summed(model, names, examples, batch_size, lambda gradient: gradient, tokens)


def fisher_diagonal(
    model: PreTrainedModel, names: Sequence[str], examples: Sequence[TokenizedExample]
) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of an answer's negative log-likelihood a token.

    Args:
        model: In evaluation mode. It is not changed.
        names: Weights.
        examples: At least one.

    Returns:
        Name -> mean square on the CPU, float32.
    """
    found = _summed(model, names, examples, 1, torch.square, None)
    return {name: total / len(examples) for name, total in found.items()}


def _summed(
    model: PreTrainedModel,
    names: Sequence[str],
    examples: Sequence[TokenizedExample],
    batch_size: int,
    change: Callable[[Tensor], Tensor],
    tokens: int | None,
) -> dict[str, Tensor]:
    """Sums changed gradients over batches; each batch's loss is divided by all tokens, or by its own where None."""
    weights = unique_weights(model)[0]
    # Leaves that share the model's memory: its own parameters may be frozen and stay as they are.
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    sums = {name: torch.zeros(leaf.shape) for name, leaf in leaves.items()}
    for batch in batches(examples, batch_size, device_of(model)):
        nll_N = answer_nll(answer_logits(model, batch, leaves), batch.targets_N)
        loss = nll_N.sum() / (len(batch.targets_N) if tokens is None else tokens)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:  # Else the loss doesn't depend on it: a bias that only chooses experts.
                sums[name] += change(gradient.float()).cpu()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise TaskVectorError(f"the gradient of {name} holds NaN or infinity: load the model in float32")
    return sums


def _apply(settings: PertaSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    names = list(vector.deltas)
    importance = []
    for examples in (context.harmful, context.normal):
        chosen = drawn(examples, settings.examples, context.seed)
        if settings.importance == "fisher":
            importance.append(fisher_diagonal(context.base, names, chosen))
        else:
            found = mean_gradient(context.base, names, chosen, context.batch_size)
            importance.append({name: gradient.abs() for name, gradient in found.items()})
    forget, retain = importance
    factors = {name: relative_importance(forget[name], retain[name]) for name in names}
    changed = TaskVector({name: delta * factors[name] for name, delta in vector.deltas.items()}, vector.tied)
    entries = sum(factor.numel() for factor in factors.values())
    mean = sum(float(factor.double().sum()) for factor in factors.values()) / entries
    return Operated(vector=changed, row_maps=None, record={"mean_factor": mean})


def relative_importance(forget: Tensor, retain: Tensor) -> Tensor:
    """``f / (f + r)``, one half where both are 0.

    Args:
        forget: Importance for forgetting, 0 or more.
        retain: Importance for keeping, same shape.

    Returns:
        Factors from 0 to 1.
    """
    total = forget + retain
    return torch.where(total > 0, forget / torch.where(total > 0, total, torch.ones_like(total)), 0.5)


PERTA = Operator(
    name="perta",
    title="PerTA",
    paper_url="https://arxiv.org/abs/2601.22030",
    settings=PertaSettings,
    apply=_apply,
    needs=("normal", "harmful"),
)
