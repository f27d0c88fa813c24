"""No weight ever sees a loss or a gradient that is not finite.

Every loss term is looked at before backward, and the whole gradient, accumulated and clipped, before the optimizer's
step: a backward can overflow where the loss did not.

With fp16 a gradient that overflows is the gradient scaler's: it skips the step and halves its scale. Only where the
scale is 1 already, so that it can't be the cause, the run stops. Under DeepSpeed, which steps inside its own backward,
losses alone are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from sku.errors import NonFiniteLossError, ProcessError
from sku.processes import is_together

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
        inputs: The batch, for its ``forget_index`` and ``retain_index``.
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
            forget, retain = (inputs[f"{key}_index"][is_bad_B].tolist() for key in ("forget", "retain"))
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
