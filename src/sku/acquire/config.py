"""Settings of stage 1 as transformers takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from sku.acquire.preservation_divergence import DEFAULT_CAP, check_preservation
from sku.config import PreservationMode, PreservationTokens, WeightsConfig
from sku.errors import RecipeError


@dataclass
class SkuConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and the settings of the three modules.

    Fields of TrainingArguments keep their meaning. These have other defaults: ``learning_rate`` 2e-4 (LoRA),
    ``per_device_train_batch_size`` 4, ``logging_steps`` 1, ``report_to`` none, ``save_strategy`` no,
    ``remove_unused_columns`` False, ``logging_nan_inf_filter`` False (a non-finite loss must be seen).

    Raises:
        RecipeError: A weight is negative or all are 0, K is negative, or a setting of transformers can't work here.
    """

    guided_distortion_weight: float = field(default=2.5, metadata={"help": "Weight of guided distortion; 0 is off."})
    random_disassociation_weight: float = field(
        default=2.5, metadata={"help": "Weight of random disassociation; 0 is off, with its K rows a prompt."}
    )
    preservation_divergence_weight: float = field(
        default=1.0, metadata={"help": "Weight of preservation divergence; 0 is off, with the reference model."}
    )
    num_random_answers: int = field(default=5, metadata={"help": "K, answers of other prompts for each prompt."})
    preservation_mode: PreservationMode = field(
        default="divergence", metadata={"help": "divergence: -KL (paper); retention: +KL."}
    )
    preservation_cap: float | None = field(
        default=DEFAULT_CAP, metadata={"help": "Largest KL of one token that still counts, in nats; None: no cap."}
    )
    preservation_tokens: PreservationTokens = field(
        default="answer", metadata={"help": "Positions of normal examples that are compared: answer or all."}
    )
    max_length: int = field(default=512, metadata={"help": "Longest sequence in tokens."})
    max_answer_tokens: int = field(default=128, metadata={"help": "Longest answer in tokens."})

    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 4
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    report_to: Any = "none"
    save_strategy: Any = "no"
    train_sampling_strategy: str = "sequential"
    disable_tqdm: bool | None = True

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        WeightsConfig(
            guided_distortion=self.guided_distortion_weight,
            random_disassociation=self.random_disassociation_weight,
            preservation_divergence=self.preservation_divergence_weight,
        )
        check_preservation(self.preservation_mode, self.preservation_cap)
        if self.preservation_tokens not in ("answer", "all"):
            raise RecipeError(f"preservation_tokens is {self.preservation_tokens!r}; it must be answer or all")
        if self.num_random_answers < 1 and self.random_disassociation_weight:
            raise RecipeError(
                f"num_random_answers is {self.num_random_answers}; it must be 1 or more, or "
                "random_disassociation_weight 0"
            )
        if self.remove_unused_columns:
            raise RecipeError("remove_unused_columns must be False: joint examples have no columns to remove")
        if self.train_sampling_strategy != "sequential":
            raise RecipeError(
                "train_sampling_strategy must be sequential: the joint dataset shuffles by itself, seeded by epoch"
            )
        if self.dataloader_persistent_workers:
            raise RecipeError(
                "dataloader_persistent_workers must be False: workers that outlive an epoch would repeat its draws"
            )

    @property
    def preserves(self) -> bool:
        """Whether preservation divergence is on."""
        return self.preservation_divergence_weight > 0

    @property
    def mismatched_answers(self) -> int:
        """K, or 0 where random disassociation is off."""
        return self.num_random_answers if self.random_disassociation_weight > 0 else 0
