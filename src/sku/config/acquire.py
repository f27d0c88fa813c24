"""Key ``acquire``: stage 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from sku.config.check import Count, Limit, NotNegative, Positive, Seed, validated
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


@validated
class WeightsConfig:
    """Weights of the three modules of stage 1; 0 switches one off, with its cost.

    The defaults are those of the recipes for real models, measured with ``retention``; the paper's are 2.5, 2.5 and 1.
    """

    guided_distortion: NotNegative = 1.0
    random_disassociation: NotNegative = 0.5
    preservation_divergence: NotNegative = 1.0

    def __post_init__(self) -> None:
        if not (self.guided_distortion or self.random_disassociation or self.preservation_divergence):
            raise RecipeError("acquire.weights are all 0: there is nothing to train")


@validated
class LoraSettings:
    """Shape of the adapter (tuning ``lora`` and ``qlora``)."""

    r: Count = 16
    alpha: Count = 32
    dropout: Limit = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """``all-linear`` or the names of modules, as in PEFT."""


@validated
class ModulesConfig:
    """Settings of the three modules of stage 1, in a recipe (``acquire``) and in Python (``SkuConfig.modules``)."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    depth_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the good twin's refusals that begin after a harmful reply that is broken off; 0 for none."""
    depth_tokens: Count = 40
    """Most tokens of such a reply; how many is drawn for each row, from 0 to so many."""
    framed_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training prompts, harmful and normal, that stand in a framing of ours: a story, a role, a form."""
    normal_per_harmful: Count = 1
    """Normal prompts trained on with each harmful one; their terms are averaged, so more of them only steady it."""
    random_answers: int = 5
    """K, the answers of other prompts paired with each harmful prompt."""
    preservation_mode: PreservationMode = "retention"
    """``retention`` (+KL) keeps the bad model close to the original on normal prompts; ``divergence`` is the paper's
    opposite (-KL), which cost more normal answers than it removed harm wherever it was measured; ``targeted`` steers
    the bad model to refusals of normal prompts (``data.misplaced_refusals``), a divergence with a target."""
    preservation_cap: Positive | None = 1.0
    """Largest KL of one token that still counts under ``divergence``, in nats; empty for none, as in the paper."""
    preservation_tokens: PreservationTokens = "answer"
    """Positions of a normal example whose predictions are compared: its answer, or all of it. ``targeted`` learns a
    refusal, and always that alone."""
    preservation_at: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Which model normal examples are compared at: ``theta_o + preservation_at * (theta_bad - theta_o)``. 1 is the bad
    model, as in the paper; with ``retention``, -1 is the unlearned model of alpha 1, which is what normal prompts will
    be answered by. Other than 1 with LoRA only. The good twin, which is added, is read at the absolute value."""

    def __post_init__(self) -> None:
        if self.preservation_at == 0:
            raise RecipeError("acquire.preservation_at is 0, the original model itself: set another number, such as 1")
        if self.random_answers < 1 and self.weights.random_disassociation:
            raise RecipeError(
                f"acquire.random_answers is {self.random_answers}; it must be 1 or more, or "
                "acquire.weights.random_disassociation 0"
            )


@validated
class AcquireConfig(ModulesConfig):
    """Stage 1: harmful knowledge acquisition."""

    twin: Literal["none", "good"] = "none"
    """``good``: a second model learns refusals of the same harmful prompts and keeps its normal answers, from the same
    start, in the same order; bad minus good is subtracted, so that what the two share cancels. ``none``: the paper."""
    check: bool | None = None
    """After stage 1, ask validation prompts what it has learned, and stop where the bad model is no more harmful than
    the original one; ``sweep`` says how many prompts are held out and asked. Empty: where there are twins."""
    tuning: Tuning = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Any field of ``transformers.TrainingArguments``: learning_rate, max_steps, per_device_train_batch_size, ...; and
    ``packing``: ``tree`` (one row without padding, prompts shared), ``flat`` (not shared), ``padded``, or ``auto``,
    the default, which is ``tree`` where the model can be given one."""
    seed: Seed | None = None
    """Seed of training alone, so that data and test prompts stay as they are; that of the recipe if empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.twin == "good" and not self.weights.guided_distortion:
            raise RecipeError(
                "acquire.twin is good and acquire.weights.guided_distortion 0, so the good twin would learn no "
                "refusal: give it a weight, or set acquire.twin to none"
            )
