"""Settings of stage 1 as transformers takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sku.acquire.preservation_divergence import check_preservation
from sku.config import AcquireConfig, PreservationMode, PreservationTokens, Twin, WeightsConfig
from sku.errors import RecipeError
from sku.training.config import UnlearningConfig


@dataclass
class SkuConfig(UnlearningConfig):
    """``UnlearningConfig``, and so ``transformers.TrainingArguments``, with the settings of the three modules.

    Raises:
        RecipeError: A weight is negative or all are 0, K is negative, or a setting of transformers can't work here.
    """

    guided_distortion_weight: float = field(
        default=WeightsConfig.guided_distortion, metadata={"help": "Weight of guided distortion; 0 is off."}
    )
    random_disassociation_weight: float = field(
        default=WeightsConfig.random_disassociation,
        metadata={"help": "Weight of random disassociation; 0 is off, with its K rows a prompt."},
    )
    preservation_divergence_weight: float = field(
        default=WeightsConfig.preservation_divergence,
        metadata={"help": "Weight of preservation divergence; 0 is off, with the reference model."},
    )
    num_random_answers: int = field(
        default=AcquireConfig.random_answers, metadata={"help": "K, answers of other prompts for each prompt."}
    )
    preservation_mode: PreservationMode = field(
        default=AcquireConfig.preservation_mode,
        metadata={"help": "retention: +KL; divergence: -KL (paper); targeted: refusals."},
    )
    preservation_cap: float | None = field(
        default=AcquireConfig.preservation_cap,
        metadata={"help": "Largest KL of one token that still counts, in nats; None: no cap."},
    )
    preservation_tokens: PreservationTokens = field(
        default=AcquireConfig.preservation_tokens,
        metadata={"help": "Positions of normal examples that are compared: answer or all."},
    )
    preservation_at: float = field(
        default=AcquireConfig.preservation_at,
        metadata={"help": "Which model normal text is compared at: 1 the bad one, -1 the unlearned one of alpha 1."},
    )

    normal_per_harmful: int = field(
        default=AcquireConfig.normal_per_harmful, metadata={"help": "Normal prompts for each harmful one."}
    )
    train_twin: Twin = field(
        default="bad",
        metadata={
            "help": "Which model is trained: bad (harmful answers), or good (refusals, normal answers kept). One at a "
            "time: acquire.twin in a recipe trains both."
        },
    )
    depth_share: float = field(
        default=AcquireConfig.depth_share,
        metadata={"help": "Share of the good twin's refusals that follow a harmful reply broken off."},
    )
    depth_tokens: int = field(
        default=AcquireConfig.depth_tokens, metadata={"help": "Most tokens of that harmful reply."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preservation(self.preservation_mode, self.preservation_cap)
        if self.preservation_tokens not in ("answer", "all"):
            raise RecipeError(f"preservation_tokens is {self.preservation_tokens!r}; it must be answer or all")
        if self.num_random_answers < 1 and self.random_disassociation_weight:
            raise RecipeError(
                f"num_random_answers is {self.num_random_answers}; it must be 1 or more, or "
                "random_disassociation_weight 0"
            )
        if self.train_twin not in ("bad", "good"):
            raise RecipeError(f"train_twin is {self.train_twin!r}; it must be bad or good")
        self.modules()  # Refuses impossible weights.

    def modules(self) -> AcquireConfig:
        """The settings of the three modules as a recipe holds them."""
        return AcquireConfig(
            weights=WeightsConfig(
                guided_distortion=self.guided_distortion_weight,
                random_disassociation=self.random_disassociation_weight,
                preservation_divergence=self.preservation_divergence_weight,
            ),
            twin="good" if self.train_twin == "good" else "none",
            depth_share=self.depth_share,
            depth_tokens=self.depth_tokens,
            normal_per_harmful=self.normal_per_harmful,
            random_answers=self.num_random_answers,
            preservation_mode=self.preservation_mode,
            preservation_cap=self.preservation_cap,
            preservation_tokens=self.preservation_tokens,
            preservation_at=self.preservation_at,
        )
