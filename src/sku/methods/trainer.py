"""Stage 1 as transformers' ``Trainer`` and ``TrainingArguments``: the common training loop with SKU's three losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config.data import PromptFormatName
from sku.config.stages import ModulesConfig, Twin
from sku.data.examples import ForgetRetainData
from sku.data.joint import JointDataset
from sku.data.load import Source
from sku.errors import RecipeError
from sku.methods.sku import sku_objective
from sku.training.config import UnlearningConfig
from sku.training.trainer import UnlearningTrainer


@dataclass
class SkuConfig(UnlearningConfig):
    """``UnlearningConfig``, and so ``transformers.TrainingArguments``, with the settings of the three modules.

    Raises:
        RecipeError: A setting can't work here.
    """

    modules: ModulesConfig = field(
        default_factory=ModulesConfig, metadata={"help": "The three modules, as ``acquire`` of a recipe has them."}
    )
    train_twin: Twin = field(
        default="bad",
        metadata={
            "help": "Which model is trained: bad (harmful answers), or good (refusals, normal answers kept). One at a "
            "time: acquire.twin in a recipe trains both."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_twin not in get_args(Twin):
            raise RecipeError(f"train_twin is {self.train_twin!r}; it must be bad or good")

    def to_dict(self) -> dict[str, Any]:
        """As in ``TrainingArguments``: plain data."""
        plain: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {**plain, "modules": dataclasses.asdict(self.modules)}


class SkuTrainer(UnlearningTrainer):
    """Trains the bad model: ``UnlearningTrainer`` with the objective that its settings describe.

    It trains one model. With ``train_twin="good"`` that is the good twin; ``sku run`` and ``sku acquire`` train both
    one after the other where the recipe says ``acquire.twin: good``, and subtract bad minus good.

    From ``train`` on the model is marked: ``save_model`` and ``save_pretrained`` mark the folder and make it private,
    and ``push_to_hub`` refuses (``sku.hazard``).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | Path,
        args: SkuConfig | None = None,
        train_dataset: ForgetRetainData | JointDataset | Source | None = None,
        *,
        retain_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        prompt_format: PromptFormatName = "auto",
        **trainer_options: Any,
    ) -> None:
        """Prepares the model and the joint examples.

        Args:
            model: The original model, or its folder or hub id. With ``peft_config`` its weights stay as they are;
                without one and without an adapter of its own all weights are trained in place.
            args: Settings of training and of the three modules; the defaults, in the folder ``bad``, if None.
            train_dataset: Splits, tokenized here with the settings of ``args``; joint examples made before; or harmful
                pairs (a ``datasets.Dataset``, a list of dicts, a file, a hub id), of which all are trained on.
            retain_dataset: Normal pairs in the same forms, with harmful pairs.
            processing_class: Tokenizer of the model; loaded from where the model came from if None.
            peft_config: Adapter to add, such as ``LoraConfig``.
            prompt_format: How prompts are written when ``train_dataset`` holds splits.
            **trainer_options: As in ``transformers.Trainer``: callbacks, optimizers, ...

        Raises:
            DataError: As ``JointDataset``.
            ModelError: No usable pad token or prompt format, or a model without trainable weights.
            RecipeError: Several GPUs in one process, an adapter that doesn't fit the model, or no harmful
                or no normal pairs.
        """
        if train_dataset is None:
            raise RecipeError("train_dataset is missing: give harmful pairs, and normal ones as retain_dataset")
        args = SkuConfig(output_dir="bad") if args is None else args
        super().__init__(
            model,
            args,
            train_dataset,
            objective=sku_objective(args.modules, twin=args.train_twin),
            retain_dataset=retain_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            prompt_format=prompt_format,
            hazardous=True,
            **trainer_options,
        )
