"""LoRA adapters as task vectors in factors: ``sum_i c_i s_i B_i A_i`` as one LoRA, with our own float32 arithmetic.

Coefficients go into B, which rounds each of its entries once. Several adapters become one whose rank is at most the
sum of theirs. Where their factors stand side by side, a slice of the file is one of the adapters. Here the factors are
computed from the product alone, so that two sums with the same product have the same factors up to rounding:

    B A = U S V^T        B' = U S^(1/2) C        A' = C^T S^(1/2) V^T

C is the orthonormal cosine transform (DCT-II). Without it the components of the file were the singular ones, and a
small adapter beside a large one at right angles is the last of these. It hides nothing from whoever takes the singular
value decomposition of the product (docs/limits.md); it keeps the file from holding it ready.

Shapes: O = outputs of a layer, I = its inputs, r = rank as given, k = rank as kept.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.errors import ModelError, RecipeError, TaskVectorError, first_line, one_line
from sku.hazard import mark_model, mark_settings
from sku.model_files import check_no_pickles
from sku.models import changed_by_adapter, with_adapter
from sku.negate.arithmetic import EMPTY_ADAPTER, LowRank, check_same_names, check_same_shape, quantized_weight
from sku.negate.files import ADAPTER_FILE
from sku.storage import HAZARD_KEY, is_marked_hazardous, mark_hazardous, new_folder

_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "monteclora_config",
    "layer_replication",
)  # fmt: skip
"""Settings of PEFT's LoRA that make more of its factors than a product, or of the layers than the original ones."""


_DROPPED = torch.finfo(torch.float32).eps
"""Singular values that are dropped have together at most this share of the product's norm."""


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
        with warnings.catch_warnings():
            # PEFT doesn't know the key that marks a hazardous adapter.
            warnings.filterwarnings("ignore", message=f"Unexpected keyword arguments .*{HAZARD_KEY}")
            # PEFT would leave the factors that it doesn't find at random, and warn of it.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:
        raise ModelError(f"adapter {folder} can't be loaded: {one_line(error)}") from error
    if is_marked_hazardous(folder):
        mark_model(adapted)
    return adapted


def check_plain_lora(settings: PeftConfig, adapter: str) -> None:
    """Refuses an adapter whose change is more than ``scaling * B A``.

    Args:
        settings: The adapter's.
        adapter: Its name, for the message.

    Raises:
        TaskVectorError: It is not a LoRA, is a variant such as DoRA, changes the original weights when it is added, or
            trains biases or whole modules besides.
    """
    if isinstance(settings, LoraConfig):
        variants = [name for name in _VARIANTS if getattr(settings, name, None)]
        other = variants[0] if variants else changed_by_adapter(settings)
    else:
        other = f"peft_type {getattr(settings.peft_type, 'value', settings.peft_type)}"
    if other is not None:
        raise TaskVectorError(f"adapter {adapter} is not a plain LoRA: {other}; merge it and use TaskVector.between")
    assert isinstance(settings, LoraConfig)
    if settings.bias != "none" or settings.lora_bias or settings.modules_to_save:
        raise TaskVectorError(
            "the adapter trains biases or whole modules (bias, modules_to_save); merge it and use "
            "TaskVector.between on the two models"
        )


def adapted_weights(model: PeftModel, adapter: str) -> Iterator[tuple[str, LowRank]]:
    """The weights that an adapter changes, without computing a change.

    Args:
        model: With the adapter, not merged; its factors may be without memory.
        adapter: The adapter's name.

    Yields:
        Name of the weight in the model without adapter, and the factors as the adapter holds them.

    Raises:
        TaskVectorError: The adapter is merged, is no plain LoRA, or changes a layer that is no single matrix.
    """
    check_plain_lora(model.peft_config[adapter], adapter)
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise TaskVectorError("the adapter is merged into the weights; unmerge it first")
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            raise TaskVectorError(f"adapter {adapter} of {type(module).__name__} is not a LoRA")
        name, scaling = names[id(module)], module.scaling[adapter]
        if isinstance(module, Embedding):
            upper, lower, transposed = module.lora_embedding_B[adapter], module.lora_embedding_A[adapter], True
        elif isinstance(module.get_base_layer(), nn.Linear | Conv1D) and adapter in module.lora_A:
            upper, lower = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            transposed = bool(getattr(module, "fan_in_fan_out", False))
        else:
            raise TaskVectorError(
                f"the adapter changes {name}, a {type(module).__name__}, which is no single matrix; merge it and "
                "give the merged model"
            )
        yield (
            f"{name}.weight",
            LowRank(
                upper_Or=upper, lower_rI=lower, scaling=scaling, transposed=transposed,
                of_embedding=isinstance(module, Embedding),
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterVector:
    """What an adapter adds to the original weights, in factors."""

    factors: Mapping[str, LowRank]
    """Weight name -> its change, float32 on the CPU."""
    base_name: str | None = None
    """Name or folder of the original model, as the adapter says."""
    target_modules: tuple[str, ...] = ()
    """Names that fit the adapted modules and no others, as the adapter says; empty for those of ``factors``."""

    @classmethod
    def of(cls, model: PeftModel) -> AdapterVector:
        """The factors of a model's active adapter.

        Args:
            model: Model with one active, unmerged LoRA adapter.

        Returns:
            Copies.

        Raises:
            TaskVectorError: The adapter is not a plain LoRA of matrices, or is zero.
        """
        adapter = model.active_adapter
        factors = {}
        for name, change in adapted_weights(model, adapter):
            upper, lower = (
                part.detach().to("cpu", torch.float32, copy=True) for part in (change.upper_Or, change.lower_rI)
            )
            factors[name] = dataclasses.replace(change, upper_Or=upper, lower_rI=lower)
        if not any(change.upper_Or.any() and change.lower_rI.any() for change in factors.values()):
            raise TaskVectorError(EMPTY_ADAPTER)
        config = model.peft_config[adapter]
        assert isinstance(config, LoraConfig)
        targets = config.target_modules if isinstance(config.target_modules, set | list | tuple) else ()
        # Other settings may narrow them (layers_to_transform, exclude_modules); then each layer is named whole.
        layers = (name for name, _ in model.get_base_model().named_modules())
        fit = {f"{name}.weight" for name in layers if any(_fits(name, target) for target in targets)}
        return cls(
            factors=factors,
            base_name=config.base_model_name_or_path,
            target_modules=tuple(sorted(targets)) if fit == factors.keys() else (),
        )

    def __mul__(self, coefficient: float) -> AdapterVector:
        factors = {
            name: dataclasses.replace(change, upper_Or=change.upper_Or * coefficient)
            for name, change in self.factors.items()
        }
        return dataclasses.replace(self, factors=factors)

    __rmul__ = __mul__

    def save(self, folder: Path, *, hazardous: bool = False) -> None:
        """Writes an adapter that plain PEFT loads on the original model and that adds this vector to it.

        Args:
            folder: New folder.
            hazardous: Mark it, and make it private.

        Raises:
            TaskVectorError: A factor is not finite.
            OutputError: The folder exists or can't be written.
        """
        layers = {name.removesuffix(".weight"): change for name, change in self.factors.items()}
        largest = max(layers.values(), key=lambda change: change.rank)
        config: PeftConfig = LoraConfig(
            r=largest.rank,
            lora_alpha=largest.alpha,
            rank_pattern={name: change.rank for name, change in layers.items() if change.rank != largest.rank},
            alpha_pattern={name: change.alpha for name, change in layers.items() if change.alpha != largest.alpha},
            target_modules=list(self.target_modules or layers),
            fan_in_fan_out=any(change.transposed and not change.of_embedding for change in layers.values()),
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=self.base_name,
            inference_mode=True,
        )
        tensors = {}
        for name, change in self.factors.items():
            for place, factor in zip(change.file_names(name), (change.upper_Or, change.lower_rI), strict=True):
                if not torch.isfinite(factor).all():
                    raise TaskVectorError(f"{place} holds NaN or infinity; lower alpha or the coefficients")
                tensors[place] = factor.contiguous()
        with new_folder(folder, private=hazardous) as temporary:
            if hazardous:
                mark_hazardous(temporary)
                config = mark_settings(config)
            save_file(tensors, temporary / ADAPTER_FILE, {"format": "pt"})
            config.save_pretrained(str(temporary))


def _fits(name: str, target: str) -> bool:
    """As PEFT reads a list of ``target_modules``."""
    return name == target or name.endswith(f".{target}")


def combined(terms: Sequence[tuple[float, AdapterVector]]) -> AdapterVector:
    """``sum_i c_i s_i B_i A_i`` as one adapter.

    Args:
        terms: Coefficient and adapter of each term, at least one, all of the same original model.

    Returns:
        An adapter with a scaling of 1. Of several, its factors are those of ``refactored``, each weight of
        the numerical rank of its sum; a single one keeps its factors, which its product gives away anyhow.

    Raises:
        TaskVectorError: Two adapters change a weight of different shapes, or a factor is not finite.
    """
    names = dict.fromkeys(name for _, vector in terms for name in vector.factors)
    factors = {}
    for name in names:
        own = [(coefficient, vector.factors[name]) for coefficient, vector in terms if name in vector.factors]
        if len({(len(change.upper_Or), change.lower_rI.shape[1]) for _, change in own}) > 1:
            raise TaskVectorError(f"the adapters change {name} in different shapes: they are of different models")
        upper = torch.cat([change.upper_Or * change.scaling * coefficient for coefficient, change in own], dim=1)
        lower = torch.cat([change.lower_rI for _, change in own], dim=0)
        if len(terms) > 1:
            if not (upper.isfinite().all() and lower.isfinite().all()):
                raise TaskVectorError(f"an adapter of {name} holds NaN or infinity; lower the coefficients")
            upper, lower = refactored(upper, lower)
        factors[name] = dataclasses.replace(own[0][1], upper_Or=upper, lower_rI=lower, scaling=1.0)
    first = terms[0][1]
    same = all(vector.target_modules == first.target_modules for _, vector in terms)
    # Where they differ, names of modules of one would fit modules that only another adapts.
    return AdapterVector(
        factors=factors, base_name=first.base_name, target_modules=first.target_modules if same else ()
    )


def refactored(upper_Or: Tensor, lower_rI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in balanced, mixed factors of its numerical rank.

    Args:
        upper_Or: B, finite.
        lower_rI: A, finite.

    Returns:
        ``B' [O, k]`` and ``A' [k, I]``, float32, k at least 1; ``B' A'`` is ``B A`` to about 1e-7 of its norm. The
        same input gives the same bits: each left singular vector has its largest entry above 0.
    """
    left, left_core = torch.linalg.qr(upper_Or.double())
    right, right_core = torch.linalg.qr(lower_rI.double().T)
    inner, sizes, right_inner = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rest = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = max(1, int((rest > _DROPPED * rest[0]).sum()))
    first, second = left @ inner[:, :kept], right_inner[:kept] @ right.T
    largest = first.gather(0, first.abs().argmax(0, keepdim=True))
    roots, mix = sizes[:kept].sqrt() * torch.where(largest[0] < 0, -1.0, 1.0), cosines(kept)
    return ((first * roots) @ mix).float(), (mix.T @ (roots[:, None] * second)).float()


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, ``C[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n))``, row 0 over sqrt(2): float64."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(places[:, None] * (2 * places[None] + 1) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def adapter_in_folder(model: PreTrainedModel, folder: Path) -> dict[str, LowRank]:
    """What a saved adapter changes, in float32, with PEFT's own reading of its settings.

    Args:
        model: Without weights; gets the adapter.
        folder: Of the adapter.

    Raises:
        TaskVectorError: The adapter is no plain LoRA, changes layers that are no matrices, or its file has other
            factors than its settings say.
        ModelError: Its settings can't be read or don't fit the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of keys that PEFT doesn't know, our mark among them.
            settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"adapter {folder} can't be read: {first_line(error)}") from error
    check_plain_lora(settings, "default")
    assert isinstance(settings, LoraConfig)
    settings.init_lora_weights = False  # Some ways to begin take the weights apart, and here are none.
    try:
        adapted = dict(adapted_weights(with_adapter(model, settings), "default"))
    except RecipeError as error:
        raise ModelError(f"adapter {folder} does not fit the base model: {error}") from error
    expected = {place for name, change in adapted.items() for place in change.file_names(name)}
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        # PEFT adds the frozen embedding to the file where the adapter changes it; loading takes the factors alone.
        found = {name for name in file.keys() if ".lora_" in name}  # noqa: SIM118 - not a mapping
        check_same_names(expected, found, "the adapter's settings", "its file")

        def read(place: str, planned: Tensor) -> Tensor:
            factor: Tensor = file.get_tensor(place)
            if not factor.is_floating_point() or factor.element_size() < 2:
                raise quantized_weight(place, factor.dtype)
            check_same_shape(place, planned, factor)
            return factor.to(torch.float32, copy=True)

        factors = {}
        for name, change in adapted.items():
            upper, lower = change.file_names(name)
            factors[name] = dataclasses.replace(
                change, upper_Or=read(upper, change.upper_Or), lower_rI=read(lower, change.lower_rI)
            )
    return factors
