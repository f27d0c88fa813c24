"""A model folder as the matcher sees it: names and shapes by headers of files, ties and adapters by a skeleton."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sku.errors import TaskVectorError
from sku.negate.files import StoredTensor, read_config, read_folder
from sku.negate.matching import Source, quantized_weight

if TYPE_CHECKING:
    from sku.negate.adapters import LowRank
    from sku.negate.skeleton import Skeleton

_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Constants that older versions of transformers stored and today's make anew: rotary frequencies, causal masks."""


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
        """As in ``Source``. Copies that differ are not tied, whatever the configuration says: so transformers decides.

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
        """As in ``Source``: two matrices outside the numbered layers have one shape, as the two ends of a model do."""
        shapes = Counter(
            weight.shape
            for name, weight in self.weights.items()
            if len(weight.shape) == 2 and not re.search(r"\.\d+\.", name)
        )
        return self.config.get("tie_word_embeddings") is not False and any(count > 1 for count in shapes.values())

    def known(self) -> tuple[set[str], Mapping[str, str]]:
        """As in ``Source``."""
        return self._skeleton.weights, self._skeleton.ties

    def places(self, name: str) -> Sequence[str]:
        """As in ``Source``.

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
        """As in ``Source``, piece by piece."""
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
        return self._skeleton.adapted(folder)

    @cached_property
    def _skeleton(self) -> Skeleton:
        # Most folders need none, and transformers and PEFT take longer to import than a small model to subtract.
        from sku.negate.skeleton import Skeleton

        return Skeleton.of(self.folder)

    def _stored(self, name: str) -> str | None:
        """The name of a weight in the files, if they have it.

        transformers renames some weights while it loads them, and files may leave the name of the inner model out.
        """
        skeleton, prefix = self._skeleton, f"{self._skeleton.model.base_model_prefix}."
        candidates = (skeleton.file_names.get(name, name), name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in self.weights), None)


def _is_old_buffer(tensor: StoredTensor) -> bool:
    return bool(_OLD_BUFFERS.search(tensor.name)) and (
        len(tensor.shape) == 4 or tensor.name.endswith(("inv_freq", "masked_bias"))
    )
