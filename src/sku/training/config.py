"""Settings of the training loop as transformers takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from transformers import TrainingArguments

from sku.config import Packing
from sku.errors import RecipeError
from sku.training.compiled import check_compile_backend
from sku.training.finite import FiniteCheck, check_finite_check
from sku.training.precision import bf16_pays, check_optimizer
from sku.training.reference_mode import ReferenceMode, check_reference_mode
from sku.training.reporting import check_no_uploads, check_services


@dataclass
class UnlearningConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the lengths and the packing of the examples, for every method.

    Fields of TrainingArguments keep their meaning; ``bf16`` may also be ``auto``, which is on where the machine
    computes faster in bfloat16. These have other defaults: ``learning_rate`` 2e-4 (LoRA),
    ``per_device_train_batch_size`` 4, ``logging_steps`` 1, ``report_to`` none, ``save_strategy`` no,
    ``remove_unused_columns`` False, ``logging_nan_inf_filter`` False (a non-finite loss must be seen).

    Raises:
        RecipeError: A setting of transformers can't work with joint examples.
    """

    max_length: int = field(default=512, metadata={"help": "Longest sequence in tokens."})
    max_answer_tokens: int = field(default=128, metadata={"help": "Longest answer in tokens."})

    packing: Packing = field(
        default="auto",
        metadata={
            "help": "How rows go to the model. tree: one row without padding, prompts shared; flat: the same, not "
            "shared; padded: rows of equal length; auto: tree where the model can."
        },
    )

    logits_budget_mb: float | None = field(
        default=1024.0,
        metadata={
            "help": "Most MB of float32 logits made at once; losses and gradients need 5 to 10 times that. Beyond it "
            "losses are computed from hidden states chunk by chunk; None: no limit."
        },
    )
    reference: ReferenceMode = field(
        default="auto",
        metadata={
            "help": "How the original model is asked: cache (hidden states kept from one pass before training), "
            "forward (adapter switched off, each step), copy (a second model, each step); auto: cache where it fits."
        },
    )
    reference_cache_mb: float = field(default=2048.0, metadata={"help": "Most MB that reference=cache may take."})
    finite_check: FiniteCheck = field(
        default="auto",
        metadata={
            "help": "When losses and gradients are looked at for NaN: at_once, or late (a step later, without waiting "
            "for the GPU; updates are held back meanwhile); auto: late on a GPU with a fused optimizer."
        },
    )
    stochastic_rounding: bool = field(
        default=False,
        metadata={"help": "Round bfloat16 weights at random in AdamW, so that small updates aren't lost."},
    )
    compile_layers: str | None = field(
        default=None,
        metadata={"help": "Backend of torch.compile for each decoder layer, such as inductor; None: not compiled."},
    )
    pad_to_multiple_of: int = field(
        default=1,
        metadata={
            "help": "Rows are padded to a multiple of this, so that fewer lengths occur; above 1, packing auto "
            "is padded."
        },
    )

    bf16: Any = False
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
        if self.bf16 == "auto":
            self.bf16 = bf16_pays(use_cpu=self.use_cpu)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._check_what_resuming_needs()
        self._check_lengths()
        for name in ("logits_budget_mb", "reference_cache_mb"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RecipeError(f"{name} is {value}; it must be 0 or more")
        check_reference_mode(self.reference)
        check_finite_check(self.finite_check)
        check_optimizer(
            getattr(self.optim, "value", self.optim),
            stochastic_rounding=self.stochastic_rounding,
            on_gpu=torch.cuda.is_available() and not self.use_cpu,
        )
        if self.compile_layers is not None and self.torch_compile:
            raise RecipeError("compile_layers and torch_compile exclude each other: set one of them")
        check_compile_backend(self.compile_layers)
        check_services(self.report_to)
        check_no_uploads(self.report_to, push_to_hub=self.push_to_hub)

    def _check_what_resuming_needs(self) -> None:
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

    def _check_lengths(self) -> None:
        if self.packing not in get_args(Packing):
            raise RecipeError(f"packing is {self.packing!r}; it must be one of {', '.join(get_args(Packing))}")
        if self.pad_to_multiple_of < 1:
            raise RecipeError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; it must be 1 or more")
        if self.pad_to_multiple_of > 1 and self.packing != "padded":
            if self.packing != "auto":
                raise RecipeError(
                    f"pad_to_multiple_of is {self.pad_to_multiple_of} and packing {self.packing}, which pads nothing: "
                    "set packing to padded, or leave pad_to_multiple_of out"
                )
            self.packing = "padded"
