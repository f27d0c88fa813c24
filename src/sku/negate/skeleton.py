"""Which weights a model folder holds, under which names: read off the model without its weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from sku.errors import ModelError, RecipeError, first_line
from sku.models import UNBUILT, with_adapter, without_weights
from sku.negate.adapters import adapted_weights, check_plain_lora
from sku.negate.arithmetic import LowRank
from sku.negate.task_vector import unique_weights


class Skeleton:
    """A model without weights."""

    def __init__(self, folder: Path) -> None:
        """That of a model folder.

        Raises:
            ModelError: Its configuration makes no model.
        """
        try:
            config = AutoConfig.from_pretrained(folder)
        except UNBUILT as error:
            raise ModelError(f"model {folder} has a config.json that can't be read: {first_line(error)}") from error
        self.model = without_weights(config, torch.float32, str(folder))
        self.weights, self.ties = unique_weights(self.model)
        marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.model.state_dict().items()}
        names = {id(mark): name for name, mark in marks.items()}
        saved = revert_weight_conversion(self.model, marks)
        self.file_names = {names[id(mark)]: name for name, mark in saved.items() if id(mark) in names}
        """Name of a weight -> the one that ``save_pretrained`` would give it; without those that it takes apart."""

    def adapted(self, folder: Path) -> dict[str, LowRank[Tensor]]:
        """What an adapter changes, with PEFT's own reading of its settings; the factors are without memory.

        Raises:
            TaskVectorError: The adapter is no plain LoRA, or changes layers that are no matrices.
            ModelError: Its settings can't be read or don't fit the model.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of keys that PEFT doesn't know, our mark among them.
                settings = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"adapter {folder} can't be read: {first_line(error)}") from error
        check_plain_lora(settings, "default")
        assert isinstance(settings, LoraConfig)
        settings.init_lora_weights = False  # Some ways to begin take the weights apart, and here are none.
        try:
            adapted = with_adapter(self.model, settings)
        except RecipeError as error:
            raise ModelError(f"adapter {folder} does not fit the base model: {error}") from error
        return dict(adapted_weights(adapted, "default"))
