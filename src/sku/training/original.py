"""The original model inside the one in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft import PeftConfig, PeftModel
from torch import nn

from sku.errors import RecipeError
from sku.models import changed_by_adapter
from sku.training.evaluation_mode import evaluation_mode, is_four_bit


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """The frozen reference while the context lasts: adapter off and dropout off, as the original model is used.

    Args:
        model: Without wrappers around it; with an adapter, or with weights that no step has moved.
    """
    adapter_off: AbstractContextManager[None] = (
        model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    )
    with evaluation_mode(model), adapter_off:
        yield


def check_original_stays(model: nn.Module, added: PeftConfig | None) -> None:
    """Refuses an adapter that changes the original weights themselves: with it off they would not be the original.

    Args:
        model: That will be trained, perhaps with an adapter.
        added: Adapter that it will get.

    Raises:
        RecipeError: With the setting that does so.
    """
    there = model.peft_config.values() if isinstance(model, PeftModel) else ()
    for settings in (*there, *([] if added is None else [added])):
        changed = changed_by_adapter(settings)
        if changed is not None:
            raise RecipeError(
                f"the adapter changes the original weights: {changed}; leave that setting at its default"
            )


def keep_four_bit_trainable(model: nn.Module) -> None:
    """Puts four-bit layers in training mode before a model that will be trained is first run.

    In evaluation mode bitsandbytes repacks their weights on a CPU for a kernel that has no backward.

    Args:
        model: Its four-bit layers are changed in place.
    """
    for module in model.modules():
        if is_four_bit(module):
            module.training = True
