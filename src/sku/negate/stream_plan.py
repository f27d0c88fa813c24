"""What a streamed subtraction does with each stored tensor, decided and checked before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sku.errors import ModelError, TaskVectorError
from sku.negate.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    StoredFile,
    StoredTensor,
    make_header,
    read_folder,
    read_layout,
)
from sku.negate.folder_source import FolderSource
from sku.negate.matching import (
    EMPTY_ADAPTER,
    EQUAL_MODELS,
    Matched,
    check_same_names,
    match_changes,
    match_models,
    quantized_weight,
)
from sku.negate.task_vector import VECTOR_FILE, TaskVector, read_ties

if TYPE_CHECKING:
    from sku.negate.adapters import LowRank

BadForm = Literal["model", "adapter", "vector"]


@dataclass(frozen=True, kw_only=True)
class LowRankChange:
    """The stored factors of a difference."""

    upper: StoredTensor
    lower: StoredTensor
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the difference, as the model keeps the weight."""
        made = (self.upper.shape[0], self.lower.shape[1])
        return made[::-1] if self.transposed else made

    @property
    def dtype(self) -> torch.dtype:
        """That in which the factors are multiplied."""
        return torch.float32


Change = StoredTensor | LowRankChange
"""The bad model's weight, or the difference from the base's."""


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

    layouts: tuple[ShardLayout, ...]
    """Of the new files, by name."""
    work: Mapping[str, Work]
    """By the tensor's name."""
    dtype: torch.dtype
    """Of the result, or of most of it."""
    inputs: tuple[StoredFile, ...]
    """All files that will be read."""
    form: BadForm

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


def bad_form(folder: Path) -> BadForm:
    """Which of the three forms of a bad model a folder holds; a task vector comes before an adapter."""
    if TaskVector.is_saved_in(folder):
        return "vector"
    return "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"


def plan_negation(base: Path, bad: Path, output_dtype: torch.dtype | None) -> Plan:
    """Matches the bad model's tensors with the base's and checks all that can be checked without the weights.

    Args:
        base: Folder of the original model.
        bad: Folder of the bad model, its adapter, or a saved task vector.
        output_dtype: Type of the result; of each tensor's own if None.

    Returns:
        The plan.

    Raises:
        ModelError: A file or configuration can't be used.
        TaskVectorError: The two don't fit.
    """
    source = FolderSource(base, "base")
    form = bad_form(bad)
    matched: Matched[Any]
    if form == "model":
        if base.resolve() == bad.resolve():
            raise TaskVectorError(EQUAL_MODELS)
        other = FolderSource(bad, "bad model")
        matched, files = match_models(source, other), other.files
    else:
        adapted = source.adapted(bad) if form == "adapter" else {}
        file = read_layout(_file_of(bad, form))
        changes: Mapping[str, Any]
        tied: Mapping[str, str] = {}
        if form == "vector":
            changes, tied = _of_vector(file)
        else:
            changes = _of_adapter(adapted, file)
        matched, files = match_changes(source, changes, tied), (file,)
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
    dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
    layouts = tuple(_layout(stored, [work[tensor.name] for tensor in stored.tensors]) for stored in source.files)
    return Plan(layouts=layouts, work=work, dtype=dtype, inputs=(*source.files, *files), form=form)


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


def identities(base: Path, bad: Path, plan: Plan) -> dict[str, Any]:
    """What tells whether the inputs are those of an earlier call: size, time and header of each file, and settings."""
    settings = [base / "config.json", bad / ADAPTER_CONFIG, bad / "config.json"]
    return {
        "weights": {str(file.path.resolve()): list(file.identity) for file in plan.inputs},
        "settings": {
            str(path.resolve()): sha256(path.read_bytes()).hexdigest() for path in settings if path.is_file()
        },
    }


def _file_of(folder: Path, form: BadForm) -> Path:
    """The one file of a vector or an adapter."""
    path = folder / (VECTOR_FILE if form == "vector" else ADAPTER_FILE)
    if not path.is_file():
        raise ModelError(f"adapter {folder} holds no {ADAPTER_FILE}; load it with PEFT and save it again")
    return path


def _of_vector(file: StoredFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    tied = read_ties(file.metadata, file.path)
    for tensor in file.tensors:
        if not tensor.is_weight:
            raise TaskVectorError(f"the difference of {tensor.name} is {tensor.dtype}; it must be floating point")
    return {tensor.name: tensor for tensor in file.tensors}, tied


def _of_adapter(adapted: Mapping[str, LowRank], file: StoredFile) -> dict[str, LowRankChange]:
    factors = {tensor.name: tensor for tensor in file.tensors}
    expected = {place for name, change in adapted.items() for place in change.file_names(name)}
    # PEFT adds the frozen embedding to the file where the adapter changes it; loading takes the factors alone.
    found = {name for name in factors if ".lora_" in name}
    check_same_names(expected, found, "the adapter's settings", "its file")
    changes = {}
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
        changes[name] = LowRankChange(upper=upper, lower=lower, scaling=change.scaling, transposed=change.turned)
    return changes
