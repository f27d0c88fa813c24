"""Task vectors: the difference of two models, with exact arithmetic and no tensor skipped; and what fits what.

``tau = theta_bad - theta_o``, one float32 tensor per weight, tied weights once. One matcher serves models in
memory (``ModelSource``) and those that lie in files (``stream_plan.FolderSource``).
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sku.errors import TaskVectorError
from sku.negate.arithmetic import Shaped, dot_float64, unusable_difference
from sku.storage import is_marked_hazardous, mark_hazardous, new_folder

if TYPE_CHECKING:
    from peft import PeftModel

    from sku.negate.adapters import AdapterVector

VECTOR_FILE = "task_vector.safetensors"
_FORMAT = "sku-task-vector-1"


EQUAL_MODELS = "base and bad model are equal: stage 1 changed nothing, there is nothing to negate"
EMPTY_ADAPTER = "the adapter is zero: stage 1 changed nothing, so there is nothing to negate"


class Typed(Shaped, Protocol):
    """A tensor, or the entry of one in a file."""

    @property
    def dtype(self) -> object:
        """Its type."""


T = TypeVar("T", bound=Typed)
C = TypeVar("C", bound=Shaped)


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


def match_models(base: Source[T], bad: Source[T], bad_name: str = "bad model") -> Matched[T]:
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
        check_same_names(unique, their_unique, "base", bad_name)
        odd = sorted(set(ties.items()) ^ set(their_ties.items()))
        if odd:
            raise TaskVectorError(f"{odd[0][0]} is tied in one model and not in the other; load both the same way")
        twins = {name for name, owner in ties.items() if name in base.weights and owner in base.weights}
        for pair in their_ties.items():
            for name, owner in (pair, pair[::-1]):
                if name not in bad.weights and owner in bad.weights:
                    theirs[name] = bad.weights[owner]
    check_same_names(base.weights, base.weights.keys() & theirs.keys(), "base", bad_name)
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


def check_same_names(first: Iterable[str], second: Iterable[str], first_name: str, second_name: str) -> None:
    """Refuses two sets of weights with different names.

    Raises:
        TaskVectorError: With the first name that is in one set only, and how many there are.
    """
    first_names, second_names = set(first), set(second)
    for only, here, there in (
        (first_names - second_names, first_name, second_name), (second_names - first_names, second_name, first_name),
    ):  # fmt: skip
        if only:
            raise TaskVectorError(f"{len(only)} weights are in {here} but not in {there}, the first is {min(only)}")


def check_same_shape(name: str, first: Shaped, second: Shaped) -> None:
    """Refuses weights of one name and two shapes.

    Raises:
        TaskVectorError: With both shapes.
    """
    if tuple(first.shape) != tuple(second.shape):
        raise TaskVectorError(
            f"{name} has shape {tuple(first.shape)} in one model and {tuple(second.shape)} in the other"
        )


def quantized_weight(name: str, dtype: object) -> TaskVectorError:
    """The refusal of a weight that is no floating-point number of at least two bytes."""
    return TaskVectorError(
        f"{name} is {dtype}: quantized weights have no exact difference. Use full-precision weights"
    )


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


class TaskVector:
    """A set of named float32 differences that can be added, subtracted, scaled, measured and saved."""

    def __init__(self, deltas: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
        """Wraps differences.

        Raises:
            TaskVectorError: A difference is no floating-point tensor or is not finite.
        """
        self.deltas = {name: delta.detach().to("cpu", torch.float32) for name, delta in deltas.items()}
        self.tied = dict(tied or {})
        for name, delta in deltas.items():
            if not delta.is_floating_point():
                raise TaskVectorError(f"the difference of {name} is {delta.dtype}; it must be floating point")
            # No float32 squared is too large for float64, and ``isfinite`` takes temporary tensors of the whole size.
            if not math.isfinite(dot_float64(self.deltas[name], self.deltas[name])):
                raise unusable_difference(name)

    @classmethod
    def between(cls, base: nn.Module, bad: nn.Module) -> TaskVector:
        """``bad - base``, computed in float32.

        Raises:
            TaskVectorError: Names, shapes, ties or integer buffers differ, a weight is quantized or not finite, or
                nothing differs.
        """
        original = ModelSource(base)
        theirs = match_models(original, ModelSource(bad)).changes
        deltas = {
            name: theirs[name].detach().cpu().float() - weight.detach().cpu().float()
            for name, weight in original.weights.items()
        }
        vector = cls(deltas, original.ties)
        if vector.norm() == 0:
            raise TaskVectorError(EQUAL_MODELS)
        return vector

    @classmethod
    def from_adapter(cls, model: PeftModel) -> TaskVector:
        """The difference that an adapter makes: ``scaling * B A`` per adapted weight, computed in float32.

        Raises:
            TaskVectorError: The adapter is merged, is not a plain LoRA of matrices, trains biases or whole modules
                besides, or is zero.
        """
        from sku.negate.adapters import AdapterVector  # Imports PEFT, which a subtraction of files has no need of.

        return cls.from_factors(AdapterVector.of(model))

    @classmethod
    def from_factors(cls, vector: AdapterVector) -> TaskVector:
        """The same of factors."""
        return cls({name: change.delta() for name, change in vector.factors.items()})

    @classmethod
    def random(cls, base: nn.Module, norms: Mapping[str, float], seed: int) -> TaskVector:
        """Independent normal numbers, tensor by tensor as long as a task vector: is it the direction or just the size?

        Raises:
            TaskVectorError: The base has no weight of such a name.
        """
        weights, tied = unique_weights(base)
        generator = torch.Generator().manual_seed(seed)
        deltas = {}
        for name in sorted(norms):
            if name not in weights:
                raise TaskVectorError(f"the norms name a weight {name} that the base does not have")
            direction = torch.randn(weights[name].shape, generator=generator)
            deltas[name] = direction * (norms[name] / torch.linalg.vector_norm(direction).clamp_min(1e-30))
        return cls(deltas, {name: owner for name, owner in tied.items() if owner in deltas})

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, 1.0)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, -1.0)

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: delta * factor for name, delta in self.deltas.items()}, self.tied)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def norms(self) -> dict[str, float]:
        """Euclidean norm of each difference."""
        return {name: math.sqrt(dot_float64(delta, delta)) for name, delta in self.deltas.items()}

    def norm(self) -> float:
        """Euclidean norm of the whole vector."""
        return math.sqrt(sum(norm**2 for norm in self.norms().values()))

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Writes the vector as safetensors into a new private folder: it is as hazardous as the bad model.

        Raises:
            OutputError: The folder exists or can't be written.
        """
        with new_folder(Path(folder), private=True, overwrite=overwrite) as temporary:
            self.write(temporary)

    def write(self, folder: Path) -> None:
        """Writes the vector into a folder that is there, which is marked and made private.

        Raises:
            OutputError: The folder can't be written.
        """
        mark_hazardous(folder)
        tensors = {name: delta.contiguous() for name, delta in self.deltas.items()}
        save_file(tensors, folder / VECTOR_FILE, {"format": _FORMAT, "tied": json.dumps(self.tied)})

    @classmethod
    def load(cls, folder: Path | str) -> TaskVector:
        """Reads what ``save`` wrote.

        Raises:
            TaskVectorError: There is no task vector, or the file is damaged.
        """
        path = Path(folder) / VECTOR_FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                deltas = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise TaskVectorError(f"{path} can't be read: {error}") from error
        return cls(deltas, read_ties(metadata, path))

    @staticmethod
    def is_saved_in(folder: Path) -> bool:
        """Whether a folder holds a saved task vector."""
        return (folder / VECTOR_FILE).is_file() and is_marked_hazardous(folder)

    def _combined(self, other: TaskVector, factor: float) -> TaskVector:
        check_same_names(self.deltas, other.deltas, "the first task vector", "the second")
        if self.tied != other.tied:
            raise TaskVectorError("the task vectors tie different weights")
        for name, delta in self.deltas.items():
            check_same_shape(name, delta, other.deltas[name])
        return TaskVector(
            {name: delta + factor * other.deltas[name] for name, delta in self.deltas.items()}, self.tied
        )


def norms_by_group(norms: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Under ``layers`` and ``modules`` the norm by number of decoder layer (3) and kind of module (mlp.up_proj).

    Weights of no layer are ``others``.
    """
    squares: dict[str, dict[str, float]] = {"layers": defaultdict(float), "modules": defaultdict(float)}
    for name, norm in norms.items():
        found = re.search(r"\.(\d+)\.(?!(?:weight|bias)$)(.+?)(?:\.(?:weight|bias))?$", name)
        for kind, group in zip(squares, found.groups() if found else ("others", "others"), strict=True):
            squares[kind][group] += norm**2
    return {kind: {group: math.sqrt(square) for group, square in of.items()} for kind, of in squares.items()}


def read_ties(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """The ties that the file of a saved task vector names.

    Raises:
        TaskVectorError: It is the file of something else, or the entry is damaged.
    """
    if metadata.get("format") != _FORMAT:
        raise TaskVectorError(f"{path} is not a task vector of SKU")
    try:
        tied = json.loads(metadata["tied"])
    except (KeyError, ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(owner, str) for owner in tied.values()):
        raise TaskVectorError(f"{path} does not say which weights are tied: it is damaged; save it again")
    return tied
