"""Settings of the training loop as transformers takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from sku.errors import RecipeError


@dataclass
class UnlearningConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the lengths of the examples, the same for every method.

    Fields of TrainingArguments keep their meaning. These have other defaults: ``learning_rate`` 2e-4 (LoRA),
    ``per_device_train_batch_size`` 4, ``logging_steps`` 1, ``report_to`` none, ``save_strategy`` no,
    ``remove_unused_columns`` False, ``logging_nan_inf_filter`` False (a non-finite loss must be seen).

    Raises:
        RecipeError: A setting of transformers can't work with joint examples.
    """

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
        if self.remove_unused_columns:
            raise RecipeError("remove_unused_columns must be False: joint examples have no columns to remove")
        if self.train_sampling_strategy != "sequential":
            raise RecipeError(
                "train_sampling_strategy must be sequential: the joint dataset shuffles by itself, seeded by epoch"
            )
        if self.save_only_model:
            raise RecipeError(
                "save_only_model must be False: a run resumed without optimizer and generators would not equal one "
                "that was never interrupted"
            )
        if self.dataloader_persistent_workers:
            raise RecipeError(
                "dataloader_persistent_workers must be False: workers that outlive an epoch would repeat its draws"
            )
