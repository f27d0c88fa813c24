"""Full fine-tuning of a part of a model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from sku.errors import ModelError


def train_only(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Freezes all but the weights of the named modules.

    Args:
        model: Changed in place.
        names: Full names of modules.

    Raises:
        ModelError: The model has no module of such a name.
    """
    model.requires_grad_(requires_grad=False)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ModelError(f"the model has no module {name} to train")
        modules[name].requires_grad_(requires_grad=True)
