"""What a method tells the training loop: which rows it needs and what it minimises on them.

No weight ever sees a loss or a gradient that is not finite: every term is looked at before backward, and the whole
gradient, accumulated and clipped, before the optimizer's step, since a backward can overflow where the loss did not.
With fp16 a gradient that overflows is the gradient scaler's, which skips the step and halves its scale; only where the
scale is 1 already, so that it can't be the cause, the run stops.

Shapes: N = kept positions (whose next token counts) of the rows of one kind, M = those rows, B = joint examples of the
batch, V = vocabulary, H = width of the hidden states, L = decoder layers that are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from sku.data.examples import RowPlan, RowType
from sku.errors import NonFiniteLossError, ProcessError
from sku.losses import Scores, answer_nll, logits_of, mean_per_example, sum_per_example
from sku.processes import is_together


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """What a model says of the rows of one kind: one pair of scores and target for each kept position."""

    scores_NV: Scores
    """Logits, or what they would be made from where they are too many to hold; ``answer_nll`` and ``token_kl`` take
    both."""
    targets_N: Tensor
    """Token ids that follow; where ``RowPlan.retain_tokens`` is ``all``, those of the prompt too."""
    row_N: Tensor
    """Which row, 0 to M-1, each position belongs to."""
    example_M: Tensor
    """Which joint example, 0 to B-1, each row belongs to."""
    num_examples: int
    """B."""
    hidden_NLH: Tensor | None = None
    """Outputs of the decoder layers ``Objective.hidden_layers`` at each position; None where none is read."""

    @property
    def logits_NV(self) -> Tensor:  # noqa: N802 - named by shape
        """Scores as a tensor, made where they are not yet: for losses that are no function of NLL or KL."""
        return logits_of(self.scores_NV)

    @property
    def example_N(self) -> Tensor:  # noqa: N802 - named by shape
        """Which joint example each position belongs to."""
        return self.example_M[self.row_N]

    def hidden_states(self) -> Tensor:
        """``hidden_NLH`` of an objective that names hidden layers."""
        assert self.hidden_NLH is not None, "the objective names hidden layers"
        return self.hidden_NLH

    def mean_nll(self) -> Tensor:
        """``[B]``, nats per token: mean over the tokens of each row, then over the rows of each example."""
        nll_M = mean_per_example(answer_nll(self.scores_NV, self.targets_N), self.row_N, len(self.example_M))
        return mean_per_example(nll_M, self.example_M, self.num_examples)

    def total_nll(self) -> Tensor:
        """``[B]``, nats: sum over the tokens of each row, ``-log p(y | x)``, then mean over the rows."""
        nll_M = sum_per_example(answer_nll(self.scores_NV, self.targets_N), self.row_N, len(self.example_M))
        return mean_per_example(nll_M, self.example_M, self.num_examples)


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One batch, as an objective sees it. Nothing is computed for a kind of rows before it is asked for."""

    rows: Callable[[RowType], ScoredRows]
    """Kind of rows -> what the model in training says of them."""
    reference: Callable[[RowType], ScoredRows]
    """The same of the frozen original model, without gradient."""
    progress: float = 1.0
    """Share of training that is done with this step, above 0 and up to 1: for terms whose weight changes."""


Losses = Mapping[str, Tensor]
"""Term -> its loss for each joint example, ``[B]`` float32, before its weight."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of an objective, with what it needs: a weight of 0 leaves all of that out."""

    weight: float
    loss: Callable[[TrainingStep], Tensor]
    """``[B]`` float32, before the weight."""
    rows: Mapping[str, Any]
    """Fields of ``RowPlan``: the rows that it asks for."""
    reference: bool = False
    """Whether it asks for ``TrainingStep.reference``."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises: ``sum over terms of weight * mean over joint examples of the term``."""

    rows: RowPlan
    weights: Mapping[str, float]
    """Term -> weight, for the terms that ``losses`` gives and no others."""
    losses: Callable[[TrainingStep], Losses]
    needs_reference: bool = False
    """Whether ``losses`` asks for ``TrainingStep.reference``, of the same kinds of rows in each step."""
    hidden_layers: tuple[int, ...] = ()
    """Decoder layers, counted from 0, whose outputs ``losses`` reads. That of the last one has passed the final norm,
    as transformers returns it."""

    @classmethod
    def of(cls, terms: Mapping[str, Term], *, hidden_layers: tuple[int, ...] = ()) -> Objective:
        """The objective of those terms whose weight is not 0.

        Args:
            terms: Name in the log -> term.
            hidden_layers: As of the objective.
        """
        on = {name: term for name, term in terms.items() if term.weight}
        return cls(
            rows=RowPlan(**{key: value for term in on.values() for key, value in term.rows.items()}),
            weights={name: float(term.weight) for name, term in on.items()},
            losses=lambda step: {name: term.loss(step) for name, term in on.items()},
            needs_reference=any(term.reference for term in on.values()),
            hidden_layers=hidden_layers,
        )


_ADVICE = "no optimizer step was taken with it. Lower the learning rate, or set a preservation_cap"
_GRADIENT_ADVICE = (
    "no optimizer step was taken with it. Lower the learning rate, or hold the weights in float32 (model.dtype)"
)


class FiniteGuard(TrainerCallback):
    """Looks at the gradient before it can move a weight."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Called by the trainer.

        Raises:
            NonFiniteLossError: It is NaN or infinite somewhere. All processes raise it.
        """
        if _is_bad_gradient(optimizer, args.device).item() and not _scaler_helps(optimizer):
            raise NonFiniteLossError(
                f"the gradient is not finite at step {state.global_step + 1}, where every loss term is; "
                f"{_GRADIENT_ADVICE}"
            )


def check_finite(terms: Mapping[str, Tensor], inputs: Mapping[str, Tensor], step: int) -> None:
    """Looks at the terms of a batch before their backward.

    Args:
        terms: Name -> loss of each joint example, ``[B]``.
        inputs: The batch, for its ``forget_index`` and ``retain_rows``.
        step: The optimizer step that they are for, from 1.

    Raises:
        NonFiniteLossError: A term is NaN or infinite.
        ProcessError: One of another process is: all stop in the same step, since one that went on alone would wait for
            the others' gradients.
    """
    losses = [losses_B.detach() for losses_B in terms.values()]
    sums = torch.stack([losses_B.sum() for losses_B in losses])
    flag = (~sums.isfinite().all()).float()
    if is_together():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    *values, is_bad = torch.cat([sums.float(), flag[None]]).tolist()  # One transfer.
    for name, value in zip(terms, values, strict=True):
        if not math.isfinite(value):
            is_bad_B = ~torch.stack(losses).isfinite().all(0)
            retain_BR = inputs["retain_rows"].reshape(len(is_bad_B), len(inputs["retain_rows"]) // len(is_bad_B))
            forget, retain = inputs["forget_index"][is_bad_B].tolist(), retain_BR[is_bad_B].flatten().tolist()
            raise NonFiniteLossError(
                f"loss term {name} is {value} at step {step}, forget examples {forget}, retain examples {retain}; "
                f"{_ADVICE}"
            )
    if is_bad:
        raise ProcessError(f"another process met a loss that is not finite at step {step}; {_ADVICE}")


def _is_bad_gradient(optimizer: Any, device: torch.device) -> Tensor:
    """1 where any gradient of any process is not finite, else 0; on the device, without waiting for it."""
    gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
    # Of a weight that is spread over processes, each one looks at its own part.
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in gradients if part is not None]
    parts = [part for part in parts if part.numel()]
    # The largest entry: a sum of squares overflows where no entry does.
    largest = get_total_norm(parts, math.inf) if parts else torch.zeros(())
    flag = (~largest.isfinite()).to(device, torch.float32)
    if is_together():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return flag


def _scaler_helps(optimizer: Any) -> bool:
    """Whether fp16's gradient scaler skips this step and tries again with a smaller scale."""
    scaler = getattr(optimizer, "scaler", None)
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1
