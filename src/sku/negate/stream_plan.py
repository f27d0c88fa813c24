"""What a streamed subtraction does with each stored tensor, decided and checked before anything is written.

A model folder as the matcher sees it: names and shapes by headers of files, ties and adapters by a skeleton.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sku.errors import ModelError, TaskVectorError
from sku.negate.arithmetic import LowRank
from sku.negate.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    StoredFile,
    StoredTensor,
    make_header,
    read_config,
    read_folder,
    read_layout,
)
from sku.negate.task_vector import (
    EMPTY_ADAPTER,
    EQUAL_MODELS,
    VECTOR_FILE,
    Matched,
    Source,
    TaskVector,
    check_same_names,
    match_changes,
    match_models,
    quantized_weight,
    read_ties,
)

if TYPE_CHECKING:
    from sku.negate.adapters import Skeleton

BadForm = Literal["model", "adapter", "vector"]
_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Constants that older versions of transformers stored and today's make anew: rotary frequencies, causal masks."""
Change = StoredTensor | LowRank[StoredTensor]
"""The bad model's weight, or the difference from the base's."""


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
        # Most folders need none, and transformers and PEFT take longer to import than a small model to subtract.
        from sku.negate.adapters import Skeleton

        return Skeleton(self.folder)

    def _stored(self, name: str) -> str | None:
        """The name of a weight in the files, if they have it.

        transformers renames some weights while it loads them, and files may leave the name of the inner model out.
        """
        skeleton, prefix = self.skeleton, f"{self.skeleton.model.base_model_prefix}."
        candidates = (skeleton.file_names.get(name, name), name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in self.weights), None)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What becomes of one stored tensor of the base."""

    base: StoredTensor
    change: Change | None
    """None where the tensor stays as it is."""
    counts: bool
    """Whether the record counts it: of tied weights that are stored twice, one."""
    dtype: torch.dtype
    """Of the result."""


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How a weight file of the result will look."""

    source: StoredFile
    header: bytes
    starts: dict[str, int]
    """Name of a tensor -> byte of the new file at which it begins."""
    size: int

    @property
    def name(self) -> str:
        """Of the file: the base's."""
        return self.source.path.name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided."""

    base: Path
    bad: Path
    form: BadForm
    layouts: tuple[ShardLayout, ...]
    """Of the new files, by name."""
    work: Mapping[str, Work]
    """By the tensor's name."""
    dtype: torch.dtype
    """Of the result, or of most of it."""
    inputs: tuple[StoredFile, ...]
    """All files that will be read."""

    @property
    def size(self) -> int:
        """Of all new files, in bytes."""
        return sum(layout.size for layout in self.layouts)

    @property
    def changed(self) -> list[Work]:
        """The tensors from which something is subtracted."""
        return [work for work in self.work.values() if work.change is not None]

    @property
    def empty_message(self) -> str | None:
        """What to say where the difference turns out to be zero; None where that is no mistake."""
        return {"model": EQUAL_MODELS, "adapter": EMPTY_ADAPTER, "vector": None}[self.form]

    def identities(self) -> dict[str, Any]:
        """What tells whether inputs are those of an earlier call: size, time and header of each file, and settings."""
        settings = [self.base / "config.json", self.bad / ADAPTER_CONFIG, self.bad / "config.json"]
        return {
            "weights": {str(file.path.resolve()): list(file.identity) for file in self.inputs},
            "settings": {
                str(path.resolve()): sha256(path.read_bytes()).hexdigest() for path in settings if path.is_file()
            },
        }


def bad_form(folder: Path) -> BadForm:
    """Which of the three forms of a bad model a folder holds; a task vector comes before an adapter."""
    if TaskVector.is_saved_in(folder):
        return "vector"
    return "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"


def plan_negation(base: Path, bad: Path, output_dtype: torch.dtype | None) -> Plan:
    """Matches the bad model's tensors with the base's and checks all that can be checked without the weights.

    Raises:
        ModelError: A file or configuration can't be used.
        TaskVectorError: The two don't fit.
    """
    source = FolderSource(base, "base")
    form = bad_form(bad)
    matched, files = _matched(source, bad, form)
    work = {
        tensor.name: Work(
            base=tensor,
            change=matched.changes.get(tensor.name),
            counts=tensor.name not in matched.twins,
            dtype=output_dtype if output_dtype is not None and tensor.name in source.weights else tensor.dtype,
        )
        for stored in source.files
        for tensor in stored.tensors
    }
    sizes = Counter[torch.dtype]()
    for name, tensor in source.weights.items():
        sizes[work[name].dtype] += tensor.elements
    return Plan(
        base=base,
        bad=bad,
        form=form,
        layouts=tuple(_layout(stored, [work[tensor.name] for tensor in stored.tensors]) for stored in source.files),
        work=work,
        dtype=sizes.most_common(1)[0][0] if sizes else torch.float32,
        inputs=(*source.files, *files),
    )


def _matched(source: FolderSource, bad: Path, form: BadForm) -> tuple[Matched[Any], tuple[StoredFile, ...]]:
    """What is subtracted from which weight, and the files that hold it."""
    if form == "model":
        if source.folder.resolve() == bad.resolve():
            raise TaskVectorError(EQUAL_MODELS)
        other = FolderSource(bad, "bad model")
        return match_models(source, other), other.files
    adapted = source.skeleton.adapted(bad) if form == "adapter" else {}
    file = read_layout(_file_of(bad, form))
    if form == "adapter":
        return match_changes(source, _of_adapter(adapted, file), {}), (file,)
    tied = read_ties(file.metadata, file.path)
    for tensor in file.tensors:
        if not tensor.is_weight:
            raise TaskVectorError(f"the difference of {tensor.name} is {tensor.dtype}; it must be floating point")
    return match_changes(source, {tensor.name: tensor for tensor in file.tensors}, tied), (file,)


def _layout(source: StoredFile, work: list[Work]) -> ShardLayout:
    """The header of a new file: the base's own, byte for byte, unless types change."""
    if all(item.dtype == item.base.dtype for item in work):
        starts = {item.base.name: item.base.start for item in work}
        return ShardLayout(source=source, header=source.header, starts=starts, size=source.identity[0])
    work = sorted(work, key=lambda item: -item.dtype.itemsize)  # So that each begins at a multiple of its own size.
    header, starts = make_header(((item.base.name, item.dtype, item.base.shape) for item in work), source.metadata)
    size = len(header) + sum(item.base.elements * item.dtype.itemsize for item in work)
    return ShardLayout(source=source, header=header, starts=starts, size=size)


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


def _file_of(folder: Path, form: BadForm) -> Path:
    """The one file of a vector or an adapter."""
    path = folder / (VECTOR_FILE if form == "vector" else ADAPTER_FILE)
    if not path.is_file():
        raise ModelError(f"adapter {folder} holds no {ADAPTER_FILE}; load it with PEFT and save it again")
    return path


def _of_adapter(adapted: Mapping[str, LowRank[Tensor]], file: StoredFile) -> dict[str, LowRank[StoredTensor]]:
    factors = {tensor.name: tensor for tensor in file.tensors}
    expected = {place for name, change in adapted.items() for place in change.file_names(name)}
    # PEFT adds the frozen embedding to the file where the adapter changes it; loading takes the factors alone.
    found = {name for name in factors if ".lora_" in name}
    check_same_names(expected, found, "the adapter's settings", "its file")
    changes: dict[str, LowRank[StoredTensor]] = {}
    for name, change in adapted.items():
        upper, lower = (factors[place] for place in change.file_names(name))
        for factor in (upper, lower):
            if not factor.is_weight:
                raise quantized_weight(factor.name, factor.dtype)
        if len(upper.shape) != 2 or len(lower.shape) != 2 or {upper.shape[1], lower.shape[0]} != {change.rank}:
            raise TaskVectorError(
                f"{upper.name} has shape {upper.shape} and its partner {lower.shape}, which are no factors of rank "
                f"{change.rank}"
            )
        changes[name] = LowRank(upper_Or=upper, lower_rI=lower, scaling=change.scaling, transposed=change.transposed)
    return changes


def _is_old_buffer(tensor: StoredTensor) -> bool:
    return bool(_OLD_BUFFERS.search(tensor.name)) and (
        len(tensor.shape) == 4 or tensor.name.endswith(("inv_freq", "masked_bias"))
    )
