"""Which weights a model folder holds, under which names: read off the model without its weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sku.errors import ModelError, first_line
from sku.meta_model import UNBUILT, without_weights
from sku.negate.adapters import LowRank, adapted_weights, check_plain_lora


class Skeleton:
    """A model without weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights: set[str] = set()
        """Names of all floating-point weights, tied ones once."""
        self.ties: dict[str, str] = {}
        """Other name of a tied weight -> the name it is listed under, as of ``unique_weights``."""
        owner: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if tensor.is_floating_point():
                first = owner.setdefault(id(tensor), name)
                if first == name:
                    self.weights.add(name)
                else:
                    self.ties[name] = first
        marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        names = {id(mark): name for name, mark in marks.items()}
        saved = revert_weight_conversion(model, marks)
        self.file_names = {names[id(mark)]: name for name, mark in saved.items() if id(mark) in names}
        """Name of a weight -> the one that ``save_pretrained`` would give it; without those that it takes apart."""

    @classmethod
    def of(cls, folder: Path) -> Skeleton:
        """Of a model folder.

        Raises:
            ModelError: Its configuration makes no model.
        """
        try:
            config = AutoConfig.from_pretrained(folder)
        except UNBUILT as error:
            raise ModelError(f"model {folder} has a config.json that can't be read: {first_line(error)}") from error
        return cls(without_weights(config, torch.float32, str(folder)))

    def adapted(self, folder: Path) -> dict[str, LowRank]:
        """What an adapter changes; the factors are without memory.

        Raises:
            TaskVectorError: The adapter is no plain LoRA, or changes layers that are no matrices.
            ModelError: Its settings can't be read or don't fit the model.
        """
        settings = _settings(folder)
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # Of transposed layers, which PEFT sets right.
                adapted = get_peft_model(self.model, settings)
        except UNBUILT as error:
            raise ModelError(f"adapter {folder} does not fit the base model: {first_line(error)}") from error
        assert isinstance(adapted, PeftModel)
        return dict(adapted_weights(adapted, "default"))


def _settings(folder: Path) -> LoraConfig:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of keys that it doesn't know, our mark among them.
            settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"adapter {folder} can't be read: {first_line(error)}") from error
    check_plain_lora(settings, "default")
    assert isinstance(settings, LoraConfig)
    settings.init_lora_weights = False  # Some ways to begin take the weights apart, and here are none.
    return settings
