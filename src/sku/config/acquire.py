"""Key ``acquire``: stage 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sku.config.seed import check_seed
from sku.errors import RecipeError

PreservationMode = Literal["divergence", "retention", "targeted"]
PreservationTokens = Literal["answer", "all"]
Packing = Literal["auto", "tree", "flat", "padded"]
Tuning = Literal["lora", "full", "qlora"]
Twin = Literal["bad", "good"]
"""Which of the models of stage 1: the one whose behaviour is subtracted, or the one whose behaviour is kept."""
TRAINING_KEYS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
    "activation_checkpointing", "save_steps", "save_total_limit", "logging_steps", "packing",
)  # fmt: skip
"""Those of ``acquire.training`` that are looked for elsewhere most; it takes all of ``sku.training.config``."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weights of the three modules of stage 1; 0 switches one off, with its cost.

    The defaults are those of the recipes for real models, measured with ``retention``; the paper's are 2.5, 2.5 and 1.
    """

    guided_distortion: float = 1.0
    random_disassociation: float = 0.5
    preservation_divergence: float = 1.0

    def __post_init__(self) -> None:
        weights = dataclasses.asdict(self)
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise RecipeError(f"acquire.weights.{name} is {weight}; it must be 0 or more and finite")
        if not any(weights.values()):
            raise RecipeError("acquire.weights are all 0: there is nothing to train")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter (tuning ``lora`` and ``qlora``)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """``all-linear`` or the names of modules, as in PEFT."""

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                raise RecipeError(f"acquire.lora.{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"acquire.lora.dropout is {self.dropout}; it must be 0 or more and below 1")


@dataclass(frozen=True, kw_only=True)
class AcquireConfig:
    """Stage 1: harmful knowledge acquisition."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    twin: Literal["none", "good"] = "none"
    """``good``: a second model learns refusals of the same harmful prompts and keeps its normal answers, from the same
    start, in the same order; bad minus good is subtracted, so that what the two share cancels. ``none``: the paper."""
    depth_share: float = 0.5
    """Share of the good twin's refusals that begin after a harmful reply that is broken off; 0 for none."""
    depth_tokens: int = 40
    """Most tokens of such a reply; how many is drawn for each row, from 0 to so many."""
    normal_per_harmful: int = 1
    """Normal prompts trained on with each harmful one; their terms are averaged, so more of them only steady it."""
    check: bool | None = None
    """After stage 1, ask validation prompts what it has learned, and stop where the bad model is no more harmful than
    the original one; ``sweep`` says how many prompts are held out and asked. Empty: where there are twins."""
    random_answers: int = 5
    """K, the answers of other prompts paired with each harmful prompt."""
    preservation_mode: PreservationMode = "retention"
    """``retention`` (+KL) keeps the bad model close to the original on normal prompts; ``divergence`` is the paper's
    opposite (-KL), which cost more normal answers than it removed harm wherever it was measured; ``targeted`` steers
    the bad model to refusals of normal prompts (``data.misplaced_refusals``), a divergence with a target."""
    preservation_cap: float | None = 1.0
    """Largest KL of one token that still counts under ``divergence``, in nats; empty for none, as in the paper."""
    preservation_tokens: PreservationTokens = "answer"
    """Positions of a normal example whose predictions are compared: its answer, or all of it. ``targeted`` learns a
    refusal, and always that alone."""
    preservation_at: float = 1.0
    """Which model normal examples are compared at: ``theta_o + preservation_at * (theta_bad - theta_o)``. 1 is the bad
    model, as in the paper; with ``retention``, -1 is the unlearned model of alpha 1, which is what normal prompts will
    be answered by. Other than 1 with LoRA only. The good twin, which is added, is read at the absolute value."""
    tuning: Tuning = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Any field of ``transformers.TrainingArguments``: learning_rate, max_steps, per_device_train_batch_size, ...; and
    ``packing``: ``tree`` (one row without padding, prompts shared), ``flat`` (not shared), ``padded``, or ``auto``,
    the default, which is ``tree`` where the model can be given one."""
    seed: int | None = None
    """Seed of training alone, so that data and test prompts stay as they are; that of the recipe if empty."""

    def __post_init__(self) -> None:
        check_seed("acquire.seed", self.seed)
        if not abs(self.preservation_at) < float("inf") or self.preservation_at == 0:
            raise RecipeError(
                f"acquire.preservation_at is {self.preservation_at}; it must be finite, and not 0: the original model"
            )
        if self.preservation_cap is not None and not 0 < self.preservation_cap < float("inf"):
            raise RecipeError(
                f"acquire.preservation_cap is {self.preservation_cap}; it must be above 0 and finite, or empty"
            )
        if self.twin == "good" and not self.weights.guided_distortion:
            raise RecipeError(
                "acquire.twin is good and acquire.weights.guided_distortion 0, so the good twin would learn no "
                "refusal: give it a weight, or set acquire.twin to none"
            )
        if not 0 <= self.depth_share <= 1:
            raise RecipeError(f"acquire.depth_share is {self.depth_share}; it must be a share from 0 to 1")
        for name in ("depth_tokens", "normal_per_harmful"):
            if getattr(self, name) < 1:
                raise RecipeError(f"acquire.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.random_answers < 1 and self.weights.random_disassociation:
            raise RecipeError(
                f"acquire.random_answers is {self.random_answers}; it must be 1 or more, or "
                "acquire.weights.random_disassociation 0"
            )
