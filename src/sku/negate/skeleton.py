"""A model without weights: which of its weights are one and the same, and what an adapter would change.

Built on torch's ``meta`` device from the configuration alone, so it takes no memory whatever the model's size.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sku.errors import ModelError, TaskVectorError, first_line
from sku.negate.matching import check_known_weights
from sku.negate.task_vector import adapted_layers, check_plain_lora, lora_factors


@dataclass(frozen=True, kw_only=True)
class AdaptedWeight:
    """A weight that a LoRA adapter changes by ``scaling * B A``."""

    upper: str
    """Name of B in the adapter's file, for ``[out, r]``."""
    lower: str
    """Name of A, for ``[r, in]``."""
    rank: int
    scaling: float
    transposed: bool
    """Whether the weight is held as ``[in, out]``."""


class Skeleton:
    """The names of a model's weights, and its ties."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Reads names and ties of a model; see ``skeleton_of``."""
        self._model = model
        self._prefix = f"{model.base_model_prefix}."
        self.ties: dict[str, str] = {}
        """Other name of a tied weight -> the name it is listed under, as of ``unique_weights``."""
        self.weights: set[str] = set()
        """Names of all floating-point weights, tied ones once."""
        owner: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        self._converted = _names_in_files(model, state)
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            if id(tensor) in owner:
                self.ties[name] = owner[id(tensor)]
            else:
                owner[id(tensor)] = name
                self.weights.add(name)

    def stored_name(self, name: str, stored: Mapping[str, object]) -> str | None:
        """The name of a weight in the model's files.

        transformers renames some weights while it loads them, and files may leave the name of the inner model out.

        Args:
            name: In the model.
            stored: Names in the files.

        Returns:
            None where the files don't have it.
        """
        for candidate in (self.name_in_files(name), name, name.removeprefix(self._prefix), self._prefix + name):
            if candidate in stored:
                return candidate
        return None

    def name_in_files(self, name: str) -> str:
        """The name that ``save_pretrained`` would give a weight."""
        return self._converted.get(name, name)

    def adapted(self, folder: Path) -> dict[str, AdaptedWeight]:
        """What an adapter changes, with PEFT's own reading of its settings.

        Args:
            folder: Of the adapter.

        Returns:
            Name of the weight in the model -> its factors.

        Raises:
            TaskVectorError: The adapter is no plain LoRA, or changes layers that are no matrices.
            ModelError: Its settings can't be read or don't fit the model.
        """
        settings = _settings(folder)
        check_plain_lora(settings, "default")
        settings.init_lora_weights = False  # Some ways to begin take the weights apart, and here are none.
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # Of transposed layers, which PEFT sets right.
                adapted = get_peft_model(self._model, settings)
        except (ValueError, RuntimeError, KeyError, TypeError, ArithmeticError, re.error) as error:
            raise ModelError(f"adapter {folder} does not fit the base model: {first_line(error)}") from error
        assert isinstance(adapted, PeftModel)
        weights = {}
        for name, module in adapted_layers(adapted, "default"):
            factors = lora_factors(module, "default")
            if factors is None:
                raise TaskVectorError(
                    f"the adapter changes {name}, a {type(module).__name__}, which is no single matrix; merge it and "
                    "give the merged model"
                )
            stored = "lora_embedding_{}" if isinstance(module, Embedding) else "lora_{}.weight"
            weights[f"{name}.weight"] = AdaptedWeight(
                upper=f"base_model.model.{name}.{stored.format('B')}",
                lower=f"base_model.model.{name}.{stored.format('A')}",
                rank=factors[1].shape[0],
                scaling=module.scaling["default"],
                transposed=factors[2],
            )
        check_known_weights(weights, self.weights)
        return weights


def skeleton_of(folder: Path) -> Skeleton:
    """The skeleton of a model folder.

    Raises:
        ModelError: transformers knows no such model.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # Loaders of single architectures warn of their own internals.
            return Skeleton(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        ArithmeticError,
    ) as error:
        raise ModelError(f"model {folder} can't be built from its config.json: {first_line(error)}") from error


def _names_in_files(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of a weight -> the one that ``save_pretrained`` would give it; without those that it takes apart."""
    marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    names = {id(mark): name for name, mark in marks.items()}
    saved = revert_weight_conversion(model, marks)
    return {names[id(mark)]: name for name, mark in saved.items() if id(mark) in names}


def _settings(folder: Path) -> LoraConfig:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of keys that it doesn't know, our mark among them.
            settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"adapter {folder} can't be read: {first_line(error)}") from error
    check_plain_lora(settings, "default")
    assert isinstance(settings, LoraConfig)
    return settings
