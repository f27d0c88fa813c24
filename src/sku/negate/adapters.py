"""Task vectors that stay adapters: ``sum_i c_i s_i B_i A_i`` as one LoRA, with our own float32 arithmetic.

The factors of several adapters are put side by side, so that the rank of the result is the sum of theirs and nothing
is approximated. Scaling and coefficients go into B, which rounds each of its entries once; the saved adapter has
``lora_alpha = r``, a scaling of 1.

Shapes: O = outputs of a layer, I = its inputs, r = rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.errors import ModelError, TaskVectorError, one_line
from sku.hazard import mark_model
from sku.model_files import check_no_pickles
from sku.negate.task_vector import TaskVector
from sku.storage import HAZARD_KEY, is_marked_hazardous, new_folder

_FILE = "adapter_model.safetensors"


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a saved adapter on a model, also one that is marked as hazardous.

    Args:
        base: Gets the adapter; its own weights stay as they are.
        folder: As PEFT saves it, in safetensors.

    Returns:
        The model with the adapter, marked where the folder is.

    Raises:
        ModelError: The adapter is pickled, can't be read, lacks factors, or doesn't fit the model.
    """
    check_no_pickles(folder, "adapter_model", "PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)")
    try:
        with without_mark_warning():
            # PEFT would leave the factors that it doesn't find at random, and warn of it.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:
        raise ModelError(f"adapter {folder} can't be loaded: {one_line(error)}") from error
    if is_marked_hazardous(folder):
        mark_model(adapted)
    return adapted


@contextmanager
def without_mark_warning() -> Iterator[None]:
    """PEFT doesn't know the key that marks a hazardous adapter, and would warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Unexpected keyword arguments .*{HAZARD_KEY}")
        yield


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """``B A``, the change of one weight."""

    upper_Or: Tensor
    """B, float32, with every factor in it."""
    lower_rI: Tensor
    """A, float32."""


@dataclass(frozen=True, kw_only=True)
class AdapterVector:
    """What an adapter of linear layers adds to the original weights, in factors."""

    factors: Mapping[str, LowRank]
    """Weight name -> its change."""
    turned: frozenset[str] = frozenset()
    """Weights that the model keeps as ``[I, O]`` (GPT-2's layers)."""
    base_name: str | None = None
    """Name or folder of the original model, as the adapter says."""
    target_modules: tuple[str, ...] = field(default=())
    """Names that fit the adapted modules and no others, as the adapter says; empty for those of ``factors``."""

    @classmethod
    def of(cls, model: PeftModel) -> AdapterVector:
        """The factors of a model's active adapter, ``scaling`` inside B.

        Args:
            model: Model with one active, unmerged LoRA adapter.

        Returns:
            Float32 copies on the CPU.

        Raises:
            TaskVectorError: The adapter is not a plain LoRA of linear layers, or is zero.
        """
        TaskVector.from_adapter(model)  # Refuses all that a product of two factors doesn't describe.
        adapter = model.active_adapter
        names = {id(module): name for name, module in model.get_base_model().named_modules()}
        factors, turned = {}, set()
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            layer: Any = module
            weight = f"{names[id(module)]}.weight"
            if adapter not in layer.lora_A or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
                raise TaskVectorError(f"{weight} is adapted and no linear layer: its change can't be kept in factors")
            if isinstance(layer.get_base_layer(), Conv1D):
                turned.add(weight)
            upper, lower = (part[adapter].weight.detach().cpu().float() for part in (layer.lora_B, layer.lora_A))
            factors[weight] = LowRank(upper_Or=upper * layer.scaling[adapter], lower_rI=lower.clone())
        config = model.peft_config[adapter]
        assert isinstance(config, LoraConfig)
        targets = config.target_modules if isinstance(config.target_modules, set | list | tuple) else ()
        # Other settings may narrow them (layers_to_transform, exclude_modules); then each layer is named whole.
        fit = {f"{name}.weight" for name in names.values() if any(_fits(name, target) for target in targets)}
        return cls(
            factors=factors,
            turned=frozenset(turned),
            base_name=config.base_model_name_or_path,
            target_modules=tuple(sorted(targets)) if fit == factors.keys() else (),
        )

    def mapped(self, row_maps: Sequence[Mapping[str, Callable[[Tensor], Tensor]]]) -> AdapterVector:
        """Follows operators: ``B (A M)`` is ``(B A) M``, of the same rank.

        Args:
            row_maps: One after the other, weight name -> map of rows, as of ``OperatedVector.row_maps``.

        Returns:
            A new vector.
        """
        factors = dict(self.factors)
        for maps in row_maps:
            for name in factors.keys() & maps.keys():
                changed = maps[name](factors[name].lower_rI)
                factors[name] = LowRank(upper_Or=factors[name].upper_Or, lower_rI=changed)
        return self._with(factors)

    def __mul__(self, coefficient: float) -> AdapterVector:
        return self._with(
            {
                name: LowRank(upper_Or=change.upper_Or * coefficient, lower_rI=change.lower_rI)
                for name, change in self.factors.items()
            }
        )

    __rmul__ = __mul__

    def dense(self) -> TaskVector:
        """The same as differences of whole weights."""
        deltas = {}
        for name, change in self.factors.items():
            delta = change.upper_Or @ change.lower_rI
            deltas[name] = delta.T.contiguous() if name in self.turned else delta
        return TaskVector(deltas)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Writes an adapter that plain PEFT loads on the original model and that adds this vector to it.

        Args:
            folder: New folder.
            overwrite: Replace it if it exists.

        Raises:
            TaskVectorError: A factor is not finite.
            OutputError: The folder exists or can't be written.
        """
        ranks = {name.removesuffix(".weight"): len(change.lower_rI) for name, change in self.factors.items()}
        largest = max(ranks.values())
        odd = {name: rank for name, rank in ranks.items() if rank != largest}
        config = LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=odd,
            alpha_pattern=odd,
            target_modules=list(self.target_modules or ranks),
            fan_in_fan_out=bool(self.turned),
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=self.base_name,
            inference_mode=True,
        )
        tensors = {}
        for name, change in self.factors.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = change.lower_rI.contiguous()
            tensors[f"{module}.lora_B.weight"] = change.upper_Or.contiguous()
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise TaskVectorError(f"{bad[0]} holds NaN or infinity; lower alpha or the coefficients")
        with new_folder(folder, overwrite=overwrite) as temporary:
            save_file(tensors, temporary / _FILE, {"format": "pt"})
            config.save_pretrained(str(temporary))

    def _with(self, factors: Mapping[str, LowRank], **changes: Any) -> AdapterVector:
        return AdapterVector(
            factors=factors,
            turned=self.turned,
            base_name=self.base_name,
            target_modules=changes.get("target_modules", self.target_modules),
        )


def _fits(name: str, target: str) -> bool:
    """As PEFT reads a list of ``target_modules``."""
    return name == target or name.endswith(f".{target}")


def combined(terms: Sequence[tuple[float, AdapterVector]]) -> AdapterVector:
    """``sum_i c_i s_i B_i A_i`` as one adapter: B's side by side, A's one below the other.

    Args:
        terms: Coefficient and adapter of each term, at least one, all of the same original model.

    Returns:
        An adapter whose rank is the sum of theirs, weight by weight.

    Raises:
        TaskVectorError: Two adapters change a weight of different shapes.
    """
    scaled = [coefficient * vector for coefficient, vector in terms]
    names = dict.fromkeys(name for vector in scaled for name in vector.factors)
    factors = {}
    for name in names:
        own = [vector.factors[name] for vector in scaled if name in vector.factors]
        if len({(len(change.upper_Or), change.lower_rI.shape[1]) for change in own}) > 1:
            raise TaskVectorError(f"the adapters change {name} in different shapes: they are of different models")
        factors[name] = LowRank(
            upper_Or=torch.cat([change.upper_Or for change in own], dim=1),
            lower_rI=torch.cat([change.lower_rI for change in own], dim=0),
        )
    first = scaled[0]
    same = all(vector.target_modules == first.target_modules for vector in scaled)
    return AdapterVector(
        factors=factors,
        turned=frozenset().union(*(vector.turned for vector in scaled)),
        base_name=first.base_name,
        # Where they differ, names of modules of one would fit modules that only another adapts.
        target_modules=first.target_modules if same else (),
    )
