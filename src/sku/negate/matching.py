"""Whether two sets of weights fit each other: one matcher for models in memory and for those that lie in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sku.errors import TaskVectorError
from sku.negate.arithmetic import Shaped

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

    Args:
        base: The original model.
        changes: Name as in the model -> the difference.
        tied: Other name of a tied weight -> the name under which its difference is kept.

    Returns:
        The changes by the base's own names.

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

        Args:
            model: Without adapter.

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

    Args:
        model: Without adapter.

    Returns:
        Name -> tensor, and other name of a tied weight -> the name it is listed under.

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
