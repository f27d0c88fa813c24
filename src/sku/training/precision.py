"""What can be computed in few bits on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from sku.errors import RecipeError
from sku.training.stochastic_rounding import StochasticAdamW

_STOCHASTIC = ("adamw_torch", "adamw_torch_fused")


def bf16_pays(*, use_cpu: bool) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones.

    Args:
        use_cpu: Training stays on the processor though there may be a GPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_optimizer(optim: str, *, stochastic_rounding: bool, on_gpu: bool) -> None:
    """Refuses an optimizer whose package is missing, or that can't round at random.

    Args:
        optim: Name as in ``transformers.TrainingArguments``.
        stochastic_rounding: Whether it is asked for.
        on_gpu: Whether training is on a GPU, whose memory is what paged moments spare.

    Raises:
        RecipeError: What is missing, or what to choose.
    """
    package = _package_of(optim)
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

    Args:
        model: What is trained.
        settings: ``transformers.TrainingArguments``, for the learning rate, the decays and the seed.

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


def _package_of(optim: str) -> str | None:
    if optim in ("adamw_torch_8bit", "adamw_torch_4bit"):
        return "torchao"
    if "8bit" in optim or "bnb" in optim or "paged" in optim:
        return "bitsandbytes"
    return None
