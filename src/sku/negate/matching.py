"""What fits what: of two models, in memory (``ModelSource``) or in files (``FolderSource``), by one matcher.

Names and shapes of files come from their headers, ties and adapters from a model without weights (``Skeleton``).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from sku.errors import ModelError, TaskVectorError, first_line
from sku.negate.arithmetic import LowRank, check_same_names, check_same_shape, quantized_weight
from sku.negate.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    StoredFile,
    StoredTensor,
    read_config,
    read_folder,
    read_layout,
)
from sku.storage import is_marked_hazardous

VECTOR_FILE = "task_vector.safetensors"
VECTOR_FORMAT = "sku-task-vector-1"
EQUAL_MODELS = "base and bad model are equal: stage 1 changed nothing, there is nothing to negate"
BadForm = Literal["model", "adapter", "vector"]
_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Constants that older versions of transformers stored and today's make anew: rotary frequencies, causal masks."""
Change = StoredTensor | LowRank
"""The bad model's weight, or the difference from the base's."""
T = TypeVar("T", Tensor, StoredTensor)
C = TypeVar("C", Tensor, StoredTensor, LowRank)


class Source(ABC, Generic[T]):
    """The tensors of a model, in memory or in files, as far as they are matched; here what holds in memory."""

    weights: dict[str, T]
    """Floating-point tensors, by the name they are kept under."""
    integers: dict[str, T]
    """All others. They have no difference and must be equal: GPTQ and AWQ keep weights there."""
    _ties: Mapping[str, str]

    @property
    def ties(self) -> Mapping[str, str]:
        """Other name of a tied weight -> the name it is listed under, both as they would be kept."""
        return self._ties

    @property
    def may_be_tied(self) -> bool:
        """False where there are certainly no ties; to find them may mean to read files."""
        return bool(self.ties)

    def known(self) -> tuple[Collection[str], Mapping[str, str]]:
        """Names of the weights, tied ones once, and ties, as task vectors and adapters have them."""
        return self.weights, self.ties

    def places(self, name: str) -> Sequence[str]:
        """Under which names a weight of such a name is kept; a tied pair can be there twice."""
        return (name,)

    @abstractmethod
    def equal(self, first: T, second: T) -> bool:
        """Whether two of the tensors are of one type and shape and hold the same."""


@dataclass(frozen=True, kw_only=True)
class Matched(Generic[C]):
    """What is subtracted from which weight."""

    changes: Mapping[str, C]
    """By the name under which the base keeps the weight."""
    twins: frozenset[str] = frozenset()
    """Of these, names whose tied twin is counted."""


def match_models(base: Source[T], bad: Source[T]) -> Matched[T]:
    """Finds the other model's tensor of each weight of the base.

    Raises:
        TaskVectorError: Names, shapes, ties or integers differ.
    """
    theirs = dict(bad.weights)
    twins: set[str] = set()
    if base.weights.keys() != theirs.keys() or base.may_be_tied or bad.may_be_tied:
        ties, their_ties = base.ties, bad.ties
        unique, their_unique = (
            {tied.get(name, name) for name in kept} for tied, kept in ((ties, base.weights), (their_ties, theirs))
        )
        check_same_names(unique, their_unique, "base", "bad model")
        odd = sorted(set(ties.items()) ^ set(their_ties.items()))
        if odd:
            raise TaskVectorError(f"{odd[0][0]} is tied in one model and not in the other; load both the same way")
        twins = {name for name, owner in ties.items() if name in base.weights and owner in base.weights}
        for pair in their_ties.items():
            for name, owner in (pair, pair[::-1]):
                if name not in bad.weights and owner in bad.weights:
                    theirs[name] = bad.weights[owner]
    check_same_names(base.weights, base.weights.keys() & theirs.keys(), "base", "bad model")
    _check_same_integers(base, bad)
    for name, weight in base.weights.items():
        check_same_shape(name, weight, theirs[name])
    return Matched(changes={name: theirs[name] for name in base.weights}, twins=frozenset(twins))


def match_changes(base: Source[T], changes: Mapping[str, C], tied: Mapping[str, str]) -> Matched[C]:
    """Finds the weights of the base that a task vector or an adapter changes.

    Raises:
        TaskVectorError: The base has no such weight, ties others, or has it in another shape.
    """
    weights, ties = base.known()
    extra = sorted(set(changes) - set(weights))
    if extra:
        raise TaskVectorError(
            f"the task vector changes {len(extra)} weights that the base does not have, the first is {extra[0]}"
        )
    odd = sorted(set(tied.items()) - set(ties.items()))
    if odd:
        raise TaskVectorError(
            f"{odd[0][0]} is tied in the task vector and not in the base; load the base with its ties"
        )
    placed: dict[str, C] = {}
    twins: set[str] = set()
    for name, change in changes.items():
        first, *others = base.places(name)
        twins.update(others)
        for place in (first, *others):
            check_same_shape(place, base.weights[place], change)
            placed[place] = change
    return Matched(changes=placed, twins=frozenset(twins))


def _check_same_integers(base: Source[T], bad: Source[T]) -> None:
    for name, tensor in {**bad.integers, **base.integers}.items():
        own, other = base.integers.get(name), bad.integers.get(name)
        if own is None or other is None or not base.equal(own, other):
            raise TaskVectorError(f"{name} is {tensor.dtype} and differs: quantized weights have no exact difference")


class ModelSource(Source[Tensor]):
    """The tensors of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        """Lists them.

        Raises:
            TaskVectorError: A parameter is quantized.
        """
        self.weights, self._ties = unique_weights(model)
        self.integers = {name: tensor for name, tensor in model.state_dict().items() if not _is_weight(tensor)}

    def equal(self, first: Tensor, second: Tensor) -> bool:
        """As in ``Source``."""
        return torch.equal(first.cpu(), second.cpu())


def unique_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All weights and persistent floating-point buffers of a model, tied ones once.

    Raises:
        TaskVectorError: A parameter is quantized.
    """
    weights: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owner: dict[object, str] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not _is_weight(tensor):
            if name in parameters:
                raise quantized_weight(name, tensor.dtype)
            continue  # Integer buffers, such as position ids, have no difference; ``match_models`` compares them.
        # Without memory nothing but the object tells.
        key = id(tensor) if tensor.is_meta else (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in owner:
            tied[name] = owner[key]
        else:
            owner[key] = name
            weights[name] = tensor
    return weights, tied


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() >= 2


class FolderSource(Source[StoredTensor]):
    """The tensors of a model folder, by their headers."""

    def __init__(self, folder: Path, where: str) -> None:
        """Reads them.

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
        for name, owner in self.skeleton.ties.items():
            place, owner_place = self._stored(name), self._stored(owner)
            if place is None or owner_place is None or self.equal(self.weights[place], self.weights[owner_place]):
                files = self.skeleton.file_names
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

    def known(self) -> tuple[Collection[str], Mapping[str, str]]:
        """As in ``Source``."""
        return self.skeleton.weights, self.skeleton.ties

    def places(self, name: str) -> Sequence[str]:
        """As in ``Source``.

        Raises:
            TaskVectorError: The files don't have it.
        """
        others = (other for other, owner in self.skeleton.ties.items() if owner == name)
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

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model without its weights, for what headers don't tell: ties and adapters."""
        return Skeleton(self.folder)

    def _stored(self, name: str) -> str | None:
        """The name of a weight in the files, if they have it.

        transformers renames some weights while it loads them, and files may leave the name of the inner model out.
        """
        skeleton, prefix = self.skeleton, f"{self.skeleton.model.base_model_prefix}."
        candidates = (skeleton.file_names.get(name, name), name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in self.weights), None)


class Skeleton:
    """A model without weights."""

    def __init__(self, folder: Path) -> None:
        """That of a model folder.

        Raises:
            ModelError: Its configuration makes no model.
        """
        # Most folders need none, and transformers takes longer to import than a small model to subtract.
        from transformers import AutoConfig
        from transformers.core_model_loading import revert_weight_conversion

        from sku.models import UNBUILT, without_weights

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


def bad_form(folder: Path) -> BadForm:
    """Which of the three forms of a bad model a folder holds; a task vector comes before an adapter."""
    if (folder / VECTOR_FILE).is_file() and is_marked_hazardous(folder):
        return "vector"
    return "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"


def check_bad(folder: Path) -> None:
    """Refuses a bad model whose files are damaged, by their headers.

    Raises:
        ModelError: There is no such folder, or a file can't be used.
    """
    if not folder.is_dir():
        raise ModelError(f"model {folder} can't be loaded: there is no such folder")
    form = bad_form(folder)
    if form == "model":
        read_folder(folder)
    else:
        read_layout(_file_of(folder, form))


def match_folders(source: FolderSource, bad: Path, form: BadForm) -> tuple[Matched[Any], tuple[StoredFile, ...]]:
    """What is subtracted from which weight, and the files that hold it."""
    if form == "model":
        if source.folder.resolve() == bad.resolve():
            raise TaskVectorError(EQUAL_MODELS)
        other = FolderSource(bad, "bad model")
        return match_models(source, other), other.files
    if form == "adapter":
        from sku.negate.adapters import adapter_in_folder  # Imports PEFT.

        file = read_layout(_file_of(bad, form))
        return match_changes(source, adapter_in_folder(source.skeleton.model, bad), {}), (file,)
    file = read_layout(_file_of(bad, form))
    tied = read_ties(file.metadata, file.path)
    for tensor in file.tensors:
        if not tensor.is_weight:
            raise TaskVectorError(f"the difference of {tensor.name} is {tensor.dtype}; it must be floating point")
    return match_changes(source, {tensor.name: tensor for tensor in file.tensors}, tied), (file,)


def _file_of(folder: Path, form: BadForm) -> Path:
    """The one file of a vector or an adapter."""
    path = folder / (VECTOR_FILE if form == "vector" else ADAPTER_FILE)
    if not path.is_file():
        raise ModelError(f"adapter {folder} holds no {ADAPTER_FILE}; load it with PEFT and save it again")
    return path


def _is_old_buffer(tensor: StoredTensor) -> bool:
    return bool(_OLD_BUFFERS.search(tensor.name)) and (
        len(tensor.shape) == 4 or tensor.name.endswith(("inv_freq", "masked_bias"))
    )


def read_ties(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """The ties that the file of a saved task vector names.

    Raises:
        TaskVectorError: It is the file of something else, or the entry is damaged.
    """
    if metadata.get("format") != VECTOR_FORMAT:
        raise TaskVectorError(f"{path} is not a task vector of SKU")
    try:
        tied = json.loads(metadata["tied"])
    except (KeyError, ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(owner, str) for owner in tied.values()):
        raise TaskVectorError(f"{path} does not say which weights are tied: it is damaged; save it again")
    return tied
