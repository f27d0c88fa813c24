"""Task vectors: the difference of two models, with exact arithmetic and no tensor skipped.

``tau = theta_bad - theta_o``, one float32 tensor per weight, tied weights once.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sku.errors import TaskVectorError
from sku.negate.arithmetic import dot_float64, unusable_difference
from sku.negate.matching import (
    EQUAL_MODELS,
    ModelSource,
    check_same_names,
    check_same_shape,
    match_models,
    unique_weights,
)
from sku.storage import is_marked_hazardous, mark_hazardous, new_folder

if TYPE_CHECKING:
    from peft import PeftModel

    from sku.negate.adapters import AdapterVector

VECTOR_FILE = "task_vector.safetensors"
_FORMAT = "sku-task-vector-1"


class TaskVector:
    """A set of named float32 differences that can be added, subtracted, scaled, measured and saved."""

    def __init__(self, deltas: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
        """Wraps differences.

        Args:
            deltas: Weight name -> difference; kept on the CPU in float32.
            tied: Other name of a tied weight -> the name under which its difference is kept.

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

        Args:
            base: The original model.
            bad: The model of stage 1, merged if it was trained with an adapter.

        Returns:
            One difference per weight; tied weights have one.

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

        Args:
            model: Model with one active LoRA adapter, not merged.

        Returns:
            Differences of the adapted weights alone, under the names of the model without adapter.

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

        Args:
            base: The original model, for the shapes.
            norms: Weight name -> norm, as of ``norms``.
            seed: Equal seeds give equal vectors.

        Returns:
            A difference for each named weight.

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

    Args:
        metadata: Of the file.
        path: Of the file, for the message.

    Returns:
        Other name of a tied weight -> the name under which its difference is kept.

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
