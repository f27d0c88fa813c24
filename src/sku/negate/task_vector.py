"""Task vectors: the difference of two models, with exact arithmetic and no tensor skipped.

``tau = theta_bad - theta_o``, one float32 tensor per weight, tied weights once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sku.errors import TaskVectorError
from sku.models import changed_by_adapter
from sku.negate.low_rank import low_rank_product
from sku.negate.matching import (
    EMPTY_ADAPTER,
    EQUAL_MODELS,
    check_same_names,
    check_same_shape,
    check_same_ties,
    different_integers,
    quantized_weight,
    read_ties,
    unusable_difference,
)
from sku.negate.sums import dot_float64
from sku.storage import is_marked_hazardous, mark_hazardous, new_folder

_FILE = "task_vector.safetensors"
_FORMAT = "sku-task-vector-1"
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "monteclora_config",
    "layer_replication",
)  # fmt: skip
"""Settings of PEFT's LoRA that make more of its factors than a product, or of the layers than the original ones."""


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
        base_weights, bad_weights, tied = paired_weights(base, bad)
        deltas = {
            name: bad_weights[name].detach().cpu().float() - weight.detach().cpu().float()
            for name, weight in base_weights.items()
        }
        vector = cls(deltas, tied)
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
            TaskVectorError: The adapter is merged, is not a plain LoRA, trains biases or whole modules besides, or is
                zero.
        """
        adapter = model.active_adapter
        check_plain_lora(model.peft_config[adapter], adapter)
        vector = cls(
            {f"{name}.weight": _adapter_delta(module, adapter) for name, module in adapted_layers(model, adapter)}
        )
        if vector.norm() == 0:
            raise TaskVectorError(EMPTY_ADAPTER)
        return vector

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

    def save(self, folder: Path | str) -> None:
        """Writes the vector as safetensors into a new private folder: it is as hazardous as the bad model.

        Raises:
            OutputError: The folder exists or can't be written.
        """
        with new_folder(Path(folder), private=True) as temporary:
            self.write(temporary)

    def write(self, folder: Path) -> None:
        """Writes the vector into a folder that is there, which is marked and made private.

        Raises:
            OutputError: The folder can't be written.
        """
        mark_hazardous(folder)
        tensors = {name: delta.contiguous() for name, delta in self.deltas.items()}
        save_file(tensors, folder / _FILE, {"format": _FORMAT, "tied": json.dumps(self.tied)})

    @classmethod
    def load(cls, folder: Path | str) -> TaskVector:
        """Reads what ``save`` wrote.

        Raises:
            TaskVectorError: There is no task vector, or the file is damaged.
        """
        path = Path(folder) / _FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                deltas = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise TaskVectorError(f"{path} can't be read: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise TaskVectorError(f"{path} is not a task vector of SKU")
        return cls(deltas, read_ties(metadata, path))

    @staticmethod
    def is_saved_in(folder: Path) -> bool:
        """Whether a folder holds a saved task vector."""
        return (folder / _FILE).is_file() and is_marked_hazardous(folder)

    def _combined(self, other: TaskVector, factor: float) -> TaskVector:
        check_same_names(self.deltas, other.deltas, "the first task vector", "the second")
        if self.tied != other.tied:
            raise TaskVectorError("the task vectors tie different weights")
        for name, delta in self.deltas.items():
            check_same_shape(name, delta, other.deltas[name])
        return TaskVector(
            {name: delta + factor * other.deltas[name] for name, delta in self.deltas.items()}, self.tied
        )


def check_plain_lora(settings: PeftConfig, adapter: str) -> None:
    """Refuses an adapter whose change is more than ``scaling * B A``.

    Args:
        settings: The adapter's.
        adapter: Its name, for the message.

    Raises:
        TaskVectorError: It is not a LoRA, is a variant such as DoRA, changes the original weights when it is added, or
            trains biases or whole modules besides.
    """
    other = _other_than_factors(settings)
    if other is not None:
        raise TaskVectorError(f"adapter {adapter} is not a plain LoRA: {other}; merge it and use TaskVector.between")
    assert isinstance(settings, LoraConfig)
    if settings.bias != "none" or settings.lora_bias or settings.modules_to_save:
        raise TaskVectorError(
            "the adapter trains biases or whole modules (bias, modules_to_save); merge it and use "
            "TaskVector.between on the two models"
        )


def _other_than_factors(settings: PeftConfig) -> str | None:
    """The setting by which the merged weights are not the original ones plus ``scaling * B A``."""
    if not isinstance(settings, LoraConfig):
        return f"peft_type {getattr(settings.peft_type, 'value', settings.peft_type)}"
    variants = [name for name in _VARIANTS if getattr(settings, name, None)]
    return variants[0] if variants else changed_by_adapter(settings)


def adapted_layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that an adapter changes.

    Args:
        model: With the adapter, not merged.
        adapter: The adapter's name.

    Yields:
        Name of the layer in the model without adapter, and the layer.

    Raises:
        TaskVectorError: The adapter is merged, or a layer is not a LoRA.
    """
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            assert isinstance(module, nn.Module)
            if module.merged:
                raise TaskVectorError("the adapter is merged into the weights; unmerge it first")
            if not isinstance(module, LoraLayer) or adapter not in module.scaling:
                raise TaskVectorError(f"adapter {adapter} of {type(module).__name__} is not a LoRA")
            yield names[id(module)], module


def lora_factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, bool] | None:
    """The factors of a layer whose change is one matrix product.

    Args:
        module: From ``adapted_layers``.
        adapter: The adapter's name.

    Returns:
        B ``[out, r]``, A ``[r, in]`` and whether the weight is held as ``[in, out]``; None for other layers, such as
        convolutions.
    """
    if isinstance(module, Embedding):
        return module.lora_embedding_B[adapter], module.lora_embedding_A[adapter], True
    if isinstance(module, Linear):
        upper, lower = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        assert isinstance(upper, Tensor)
        assert isinstance(lower, Tensor)
        return upper, lower, bool(module.fan_in_fan_out)
    return None


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
    owner: dict[tuple[int, int, tuple[int, ...]], str] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            if name in parameters:
                raise quantized_weight(name, str(tensor.dtype))
            continue  # Integer buffers, such as position ids, have no difference; ``between`` compares them.
        key = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in owner:
            tied[name] = owner[key]
        else:
            owner[key] = name
            weights[name] = tensor
    return weights, tied


def paired_weights(base: nn.Module, bad: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The weights of two models that can be subtracted.

    Args:
        base: The original model.
        bad: The model of stage 1, without adapter.

    Returns:
        Name -> tensor of each, and other name of a tied weight -> the name it is listed under.

    Raises:
        TaskVectorError: Names, shapes, ties or integer buffers differ, or a weight is quantized.
    """
    base_weights, tied = unique_weights(base)
    bad_weights, bad_tied = unique_weights(bad)
    check_same_names(base_weights, bad_weights, "base", "bad model")
    check_same_ties(tied.items(), bad_tied.items())
    _check_same_integers(base, bad)
    for name, weight in base_weights.items():
        check_same_shape(name, weight, bad_weights[name])
    return base_weights, bad_weights, tied


def _check_same_integers(base: nn.Module, bad: nn.Module) -> None:
    """Refuses models whose integer buffers differ: GPTQ and AWQ keep weights there."""
    bad_tensors = bad.state_dict()
    for name, tensor in base.state_dict().items():
        if tensor.is_floating_point() and tensor.element_size() >= 2:
            continue
        if name not in bad_tensors or not torch.equal(tensor.cpu(), bad_tensors[name].cpu()):
            raise different_integers(name, str(tensor.dtype))


def _adapter_delta(module: LoraLayer, adapter: str) -> Tensor:
    """``scaling * B A`` in float32, whatever type the adapter is held in."""
    matrices = lora_factors(module, adapter)
    if matrices is not None:
        upper, lower, transposed = matrices
        return low_rank_product(
            upper.detach().float(), lower.detach().float(), module.scaling[adapter], transposed=transposed
        )
    assert isinstance(module, nn.Module)
    multiply = module.get_delta_weight
    assert callable(multiply)
    factors = [parameter for name, parameter in module.named_parameters() if name.startswith("lora_")]
    held = [factor.data for factor in factors]
    try:
        # PEFT knows convolutions and other layers, but multiplies in the type of the factors.
        for factor in factors:
            factor.data = factor.data.float()
        with torch.no_grad():
            delta = multiply(adapter)
    finally:
        for factor, data in zip(factors, held, strict=True):
            factor.data = data
    assert isinstance(delta, Tensor)
    return delta
