"""Whether two sets of weights fit each other, by names and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sku.errors import TaskVectorError


class Shaped(Protocol):
    """A tensor, or the entry of one in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""


def read_ties(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """The ties that the file of a saved task vector names.

    Args:
        metadata: Of the file.
        path: Of the file, for the message.

    Returns:
        Other name of a tied weight -> the name under which its difference is kept.

    Raises:
        TaskVectorError: There is no such entry, or it is damaged.
    """
    try:
        tied = json.loads(metadata["tied"])
    except (KeyError, ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(owner, str) for owner in tied.values()):
        raise TaskVectorError(f"{path} does not say which weights are tied: it is damaged; save it again")
    return tied


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


def check_known_weights(changed: Iterable[str], known: Iterable[str]) -> None:
    """Refuses a task vector that changes weights which the base does not have.

    Raises:
        TaskVectorError: With the first such name, and how many there are.
    """
    extra = sorted(set(changed) - set(known))
    if extra:
        raise TaskVectorError(
            f"the task vector changes {len(extra)} weights that the base does not have, the first is {extra[0]}"
        )


def check_known_ties(vector: Iterable[tuple[str, str]], base: Iterable[tuple[str, str]]) -> None:
    """Refuses a task vector that ties weights which the base keeps apart.

    Args:
        vector: Other name of a tied weight and the name its difference is kept under.
        base: The same of the base.

    Raises:
        TaskVectorError: With the first such name.
    """
    odd = sorted(set(vector) - set(base))
    if odd:
        raise TaskVectorError(
            f"{odd[0][0]} is tied in the task vector and not in the base; load the base with its ties"
        )


def check_same_ties(first: Iterable[tuple[str, str]], second: Iterable[tuple[str, str]]) -> None:
    """Refuses two models that tie different weights.

    Raises:
        TaskVectorError: With the first such name.
    """
    odd = sorted(set(first) ^ set(second))
    if odd:
        raise TaskVectorError(f"{odd[0][0]} is tied in one model and not in the other; load both the same way")


EQUAL_MODELS = "base and bad model are equal: stage 1 changed nothing, there is nothing to negate"
EMPTY_ADAPTER = "the adapter is zero: stage 1 changed nothing, so there is nothing to negate"


def quantized_weight(name: str, dtype: str) -> TaskVectorError:
    """The refusal of a weight that is no floating-point number of at least two bytes."""
    return TaskVectorError(
        f"{name} is {dtype}: quantized weights have no exact difference. Use full-precision weights"
    )


def different_integers(name: str, dtype: str) -> TaskVectorError:
    """The refusal of integer buffers that differ: GPTQ and AWQ keep weights there."""
    return TaskVectorError(f"{name} is {dtype} and differs: quantized weights have no exact difference")


def unusable_difference(name: str) -> TaskVectorError:
    """The refusal of a difference with values that are not finite."""
    return TaskVectorError(f"the difference of {name} holds NaN or infinity; the bad model is unusable")


def unusable_result(name: str, dtype: str) -> TaskVectorError:
    """The refusal of a result with values that are not finite."""
    return TaskVectorError(f"{name} would hold NaN or infinity in {dtype}; lower alpha or keep float32")
