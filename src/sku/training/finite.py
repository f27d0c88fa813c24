"""No weight ever sees a loss or a gradient that is not finite; where it can be had, without waiting for the GPU.

Every loss term is looked at before backward, and the whole gradient, accumulated and clipped, before the optimizer's
step: a backward can overflow where the loss did not.

At once: the sums of all terms are fetched before backward, and whether the gradient is finite after it, and the run
stops. These are two waits a step, since the processor can't go on before the GPU has finished.

Late: the sums stay on the GPU, where a flag is raised as soon as one of them, or the gradient, is not finite. The
fused optimizers of torch take such a flag (``found_inf``, made for mixed precision) and leave weights, moments and
step count as they are while it is up; it never goes down. What was seen in a step is fetched in the next one, when it
is long there, and before anything is saved or logged, and the run stops then, with the same weights as at once.

With fp16 a gradient that overflows is the gradient scaler's: it skips the step and halves its scale. Only where the
scale is 1 already, so that it can't be the cause, the run stops. Under DeepSpeed, which steps inside its own backward,
losses alone are looked at.
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

from sku.errors import NonFiniteLossError, ProcessError, RecipeError, SkuError
from sku.processes import is_together
from sku.training.config import FiniteCheck

_ADVICE = "no optimizer step was taken with it. Lower the learning rate, or set a preservation_cap"
_GRADIENT_ADVICE = (
    "no optimizer step was taken with it. Lower the learning rate, or hold the weights in float32 (model.dtype)"
)


@dataclass(frozen=True)
class _Seen:
    """Some numbers of a step, on their way from the GPU, and what is wrong with them."""

    step: int
    values: Tensor
    arrived: torch.cuda.Event | None
    error: Callable[[list[float]], SkuError | None]

    def look(self) -> None:
        """Waits for the numbers, of which all come in one transfer."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found = self.error(self.values.tolist())
        if found is not None:
            raise found


class FiniteGuard(TrainerCallback):
    """Looks at every loss term, and at the gradient, before it can move a weight."""

    def __init__(self, mode: FiniteCheck) -> None:
        """``auto`` looks late on a GPU with a fused optimizer, else at once."""
        self._mode = mode
        self._seen: list[_Seen] = []
        self._flag: Tensor | None = None

    @property
    def is_late(self) -> bool:
        """Whether losses are looked at in the step after them."""
        return self._flag is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Gives the optimizer the flag, where losses are looked at late.

        Raises:
            RecipeError: ``late`` is asked for and the optimizer would not heed the flag.
        """
        self._seen, self._flag = [], None
        inner = getattr(optimizer, "optimizer", optimizer)
        reason = _why_not_late(inner, args)
        if self._mode == "late" and reason:
            raise RecipeError(f"finite_check is late, but {reason}; set finite_check to auto or at_once")
        device = args.device
        if reason or self._mode == "at_once" or (self._mode == "auto" and device.type != "cuda"):
            return
        self._flag = torch.zeros((), device=device)
        inner.found_inf = self._flag

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Looks at the gradient that the optimizer is about to take.

        Raises:
            NonFiniteLossError: It is NaN or infinite somewhere. All processes raise it.
        """
        is_bad = _is_bad_gradient(optimizer, args.device)
        step = state.global_step + 1
        if self._flag is not None:
            self._flag.copy_(torch.maximum(self._flag, is_bad))
            values, arrived = _sent_to_processor(is_bad[None])
            self._seen.append(_Seen(step, values, arrived, lambda found: _gradient_error(step) if found[0] else None))
        elif is_bad.item() and not _scaler_helps(optimizer):
            raise _gradient_error(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at what is left before anything is logged or saved.

        Raises:
            NonFiniteLossError: As ``look``.
        """
        if control.should_log or control.should_save or control.should_training_stop:
            self.settle()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at what is left before the epoch is logged or saved: that is asked for after its last step.

        Raises:
            NonFiniteLossError: As ``look``.
        """
        self.settle()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the last step.

        Raises:
            NonFiniteLossError: As ``look``.
        """
        self.settle()

    def look(self, terms: Mapping[str, Tensor], inputs: Mapping[str, Tensor], step: int) -> None:
        """Looks at the terms of a batch, at once or from the next call on.

        Args:
            terms: Name -> loss of each joint example, ``[B]``.
            inputs: The batch, for its ``forget_index`` and ``retain_index``.
            step: The optimizer step that they are for, from 1.

        Raises:
            NonFiniteLossError: A term, of this batch or late of one before, is NaN or infinite.
            ProcessError: One of another process is: all stop in the same step, since one that went on alone would
                wait for the others' gradients.
        """
        losses = [losses_B.detach() for losses_B in terms.values()]
        sums = torch.stack([losses_B.sum() for losses_B in losses])
        flag = (~sums.isfinite().all()).float()
        if self._flag is not None:
            flag = self._flag.copy_(torch.maximum(self._flag, flag))
        if is_together():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        names, is_bad_B = tuple(terms), ~torch.stack(losses).isfinite().all(0)
        indices = {key: inputs[f"{key}_index"] for key in ("forget", "retain")}
        values, arrived = torch.cat([sums.float(), flag[None]]), None
        if self._flag is not None:
            values, arrived = _sent_to_processor(values)
        seen = _Seen(step, values, arrived, lambda found: _loss_error(found, names, is_bad_B, indices, step))
        if self._flag is None:
            seen.look()
            return
        before = [old for old in self._seen if old.step < step]
        self._seen = [*(old for old in self._seen if old.step == step), seen]
        for old in before:
            old.look()

    def settle(self) -> None:
        """Looks at all that has not been looked at.

        Raises:
            NonFiniteLossError: As ``look``.
        """
        seen, self._seen = self._seen, []
        for old in seen:
            old.look()


def _why_not_late(optimizer: Any, args: Any) -> str:
    """Why an optimizer would step in spite of the flag, empty where it doesn't."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} is not fused (acquire.training.optim=adamw_torch_fused is)"
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"{type(optimizer).__name__} has no flag to be stopped by"
    if args.fp16:
        return "with fp16 that flag belongs to the gradient scaler"
    if any(type(weight) is not torch.nn.Parameter for group in optimizer.param_groups for weight in group["params"]):
        return "weights are spread over several processes"
    return ""


def _sent_to_processor(sums: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that is on its way, and what tells that it has come."""
    if sums.device.type != "cuda":
        return sums, None
    # Into ordinary memory a copy would be waited for.
    copy = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


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


def _gradient_error(step: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the gradient is not finite at step {step}, where every loss term is; {_GRADIENT_ADVICE}"
    )


def _loss_error(
    values: list[float], names: tuple[str, ...], is_bad_B: Tensor, indices: Mapping[str, Tensor], step: int
) -> SkuError | None:
    """What is wrong with the sums of the terms, after which stands the flag of all processes."""
    *sums, flag = values
    for name, value in zip(names, sums, strict=True):
        if not math.isfinite(value):
            forget, retain = (indices[key][is_bad_B].tolist() for key in ("forget", "retain"))
            return NonFiniteLossError(
                f"loss term {name} is {value} at step {step}, forget examples {forget}, retain examples {retain}; "
                f"{_ADVICE}"
            )
    if flag:
        return ProcessError(f"another process met a loss that is not finite at step {step}; {_ADVICE}")
    return None
