"""What AdamW runs on: optimizers in few bits, and one for weights that are held in bfloat16 and nowhere else.

A bfloat16 weight has 8 bits of precision: an update smaller than 1/512 of it is lost when it is rounded to the
nearest, step after step, however many steps agree. Rounded up or down at random, with the chance of each given by the
distance to the other, the mean of the result is the exact sum, and small updates add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sku.errors import RecipeError

_LOST_BITS = 16
"""Of a float32, that a bfloat16 doesn't have."""
_STOCHASTIC = ("adamw_torch", "adamw_torch_fused")


def check_optimizer(optim: str, *, stochastic_rounding: bool, on_gpu: bool) -> None:
    """Refuses an optimizer whose package is missing, or that can't round at random.

    Args:
        optim: Name as in ``transformers.TrainingArguments``.
        stochastic_rounding: Whether it is asked for.
        on_gpu: Whether training is on a GPU, whose memory is what paged moments spare.

    Raises:
        RecipeError: What is missing, or what to choose.
    """
    package = None
    if optim in ("adamw_torch_8bit", "adamw_torch_4bit"):
        package = "torchao"
    elif any(part in optim for part in ("8bit", "bnb", "paged")):
        package = "bitsandbytes"
    if package and find_spec(package) is None:
        wanted = '"sku-unlearning[gpu]"' if package == "bitsandbytes" else package
        raise RecipeError(
            f"optim is {optim}, which needs the package {package}: pip install {wanted}, or choose another optim"
        )
    if "paged" in optim and not on_gpu:
        raise RecipeError(f"optim is {optim}, and there is nothing to page out without a GPU: drop the paged_ of it")
    if stochastic_rounding and optim not in _STOCHASTIC:
        raise RecipeError(
            f"stochastic_rounding is AdamW's, and optim is {optim}: set optim to adamw_torch, or for torchao's 8-bit "
            "AdamW optim_args to bf16_stochastic_round=True"
        )


def stochastic_optimizer(model: torch.nn.Module, settings: Any) -> tuple[type[StochasticAdamW], dict[str, Any]]:
    """The optimizer that rounds at random, as ``transformers.Trainer`` takes it (``optimizer_cls_and_kwargs``).

    Raises:
        RecipeError: No weight that is trained is bfloat16, so that it would do nothing.
    """
    dtypes = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    if torch.bfloat16 not in dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise RecipeError(
            f"stochastic_rounding is for bfloat16 weights, and those that are trained are {names}: leave it out, or "
            "set model.dtype to bfloat16 and acquire.tuning to full"
        )
    return StochasticAdamW, {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "seed": settings.seed,
    }


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds up or down at random, so that the mean of the result is the value.

    ``P(up) = (x - down) / (up - down)`` with ``down`` and ``up`` the bfloat16 numbers next to x.

    Args:
        values: float32, any shape.
        generator: On the device of ``values``.

    Returns:
        bfloat16 of the same shape. Values that bfloat16 holds stay as they are; so do infinity and NaN.

    Source: the bit trick of many, such as torchao: a random number below the bits that are cut off is added to them.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << _LOST_BITS, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = ((bits + noise) & (-1 << _LOST_BITS)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW of torch whose moments are float32 and whose bfloat16 weights are rounded at random.

    It needs 12 bytes a weight (weight, gradient, two moments) where float32 weights need 16. Draws depend on the seed
    and the step alone, so that equal runs are equal, a resumed run too, and processes with the same weights keep them
    the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        """As ``torch.optim.AdamW``.

        Args:
            params: Weights, or groups of them; those that are not bfloat16 are updated as ever.
            lr: Learning rate.
            betas: Decay of the two moments.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled.
            seed: Of the rounding.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all weights that have a gradient; ``closure``, if given, computes the loss again before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group, generators)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any], generators: dict[torch.device, torch.Generator]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
        wide, gradient = weight.float(), weight.grad
        assert gradient is not None
        beta1, beta2 = group["betas"]
        adamw(
            [wide], [gradient.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        if weight.dtype != torch.bfloat16:
            weight.copy_(wide)
            return
        if weight.device not in generators:
            # All weights have seen equally many steps, since each gets a gradient in each.
            seed = self._seed * 1_000_003 + int(state["step"])
            generators[weight.device] = torch.Generator(weight.device).manual_seed(seed)
        weight.copy_(round_to_bfloat16(wide, generators[weight.device]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads the state; moments stay float32, which torch would make bfloat16 as the weights are."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for place, weight in enumerate(weights):
            for name in ("exp_avg", "exp_avg_sq"):
                if place in saved:
                    self.state[weight][name] = saved[place][name].to(weight.device, torch.float32, copy=True)
