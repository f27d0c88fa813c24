"""A model folder as the matcher sees it: names and shapes by headers of files, ties and adapters by a skeleton.

The skeleton is a model without weights: built on torch's ``meta`` device from the configuration alone, it takes no
memory whatever the model's size.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sku.errors import ModelError, TaskVectorError, first_line
from sku.negate.adapters import LowRank, adapted_weights, check_plain_lora
from sku.negate.files import StoredTensor, read_config, read_folder
from sku.negate.matching import Source, quantized_weight

_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Constants that older versions of transformers stored and today's make anew: rotary frequencies, causal masks."""
_UNBUILT = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError, re.error,
)  # fmt: skip
"""What transformers and PEFT raise for settings that make no model."""


class FolderSource(Source[StoredTensor]):
    """The tensors of a model folder, by their headers."""

    def __init__(self, folder: Path, where: str) -> None:
        """Reads them.

        Args:
            folder: In safetensors.
            where: What the model is, for messages.

        Raises:
            ModelError: A file or the configuration can't be used.
            TaskVectorError: A weight is quantized.
        """
        self.folder, self.config = folder, read_config(folder)
        self.files = read_folder(folder)
        self.weights, self.integers = {}, {}
        for tensor in (tensor for file in self.files for tensor in file.tensors):
            if _is_old_buffer(tensor):
                continue
            if tensor.is_weight:
                self.weights[tensor.name] = tensor
            elif (tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool) or tensor.name.endswith("weight"):
                raise quantized_weight(f"{tensor.name} of the {where}", tensor.dtype)
            else:
                self.integers[tensor.name] = tensor

    @property
    def ties(self) -> Mapping[str, str]:
        """As of ``Source``. Copies that differ are not tied, whatever the configuration says: so transformers decides.

        Raises:
            ModelError: transformers knows no such model.
        """
        ties = {}
        for name, owner in self._skeleton.ties.items():
            place, owner_place = self._stored(name), self._stored(owner)
            if place is None or owner_place is None or self.equal(self.weights[place], self.weights[owner_place]):
                files = self._skeleton.file_names
                ties[place or files.get(name, name)] = owner_place or files.get(owner, owner)
        return ties

    @property
    def may_be_tied(self) -> bool:
        """As of ``Source``: two matrices outside the numbered layers have one shape, as the two ends of a model do."""
        shapes = Counter(
            weight.shape
            for name, weight in self.weights.items()
            if len(weight.shape) == 2 and not re.search(r"\.\d+\.", name)
        )
        return self.config.get("tie_word_embeddings") is not False and any(count > 1 for count in shapes.values())

    def known(self) -> tuple[set[str], Mapping[str, str]]:
        """As of ``Source``."""
        return self._skeleton.weights, self._skeleton.ties

    def places(self, name: str) -> Sequence[str]:
        """As of ``Source``.

        Raises:
            TaskVectorError: The files don't have it.
        """
        others = (other for other, owner in self._skeleton.ties.items() if owner == name)
        found = [place for place in map(self._stored, (name, *others)) if place is not None]
        if not found:
            raise TaskVectorError(
                f"the base's files store no tensor {name}: transformers builds it from others while loading; negate "
                "in Python, with sku.negate"
            )
        first = self.weights[found[0]]
        return [found[0], *(place for place in found[1:] if self.equal(first, self.weights[place]))]

    def equal(self, first: StoredTensor, second: StoredTensor) -> bool:
        """As of ``Source``, piece by piece."""
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        with first.path.open("rb") as one, second.path.open("rb") as other:
            one.seek(first.start)
            other.seek(second.start)
            sizes = (min(2**20, first.size - at) for at in range(0, first.size, 2**20))
            return all(one.read(size) == other.read(size) for size in sizes)

    def adapted(self, folder: Path) -> dict[str, LowRank]:
        """What an adapter changes, with PEFT's own reading of its settings; the factors are without memory.

        Raises:
            TaskVectorError: The adapter is no plain LoRA, or changes layers that are no matrices.
            ModelError: Its settings can't be read or don't fit the model.
        """
        settings = _settings(folder)
        model = self._skeleton.model
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # Of transposed layers, which PEFT sets right.
                adapted = get_peft_model(model, settings)
        except _UNBUILT as error:
            raise ModelError(f"adapter {folder} does not fit the base model: {first_line(error)}") from error
        assert isinstance(adapted, PeftModel)
        return dict(adapted_weights(adapted, "default"))

    @cached_property
    def _skeleton(self) -> _Skeleton:
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # Loaders of single architectures warn of their own internals.
                return _Skeleton(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder)))
        except _UNBUILT as error:
            raise ModelError(
                f"model {self.folder} can't be built from its config.json: {first_line(error)}"
            ) from error

    def _stored(self, name: str) -> str | None:
        """The name of a weight in the files, if they have it.

        transformers renames some weights while it loads them, and files may leave the name of the inner model out.
        """
        skeleton, prefix = self._skeleton, f"{self._skeleton.model.base_model_prefix}."
        candidates = (skeleton.file_names.get(name, name), name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in self.weights), None)


class _Skeleton:
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


def _is_old_buffer(tensor: StoredTensor) -> bool:
    return bool(_OLD_BUFFERS.search(tensor.name)) and (
        len(tensor.shape) == 4 or tensor.name.endswith(("inv_freq", "masked_bias"))
    )
