"""The trainer of stage 1: the common training loop with the three losses of SKU."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.acquire.config import SkuConfig
from sku.acquire.objective import sku_objective
from sku.config import CompatConfig, PromptFormatName
from sku.data.examples import ForgetRetainData
from sku.data.joint import JointDataset
from sku.training.trainer import UnlearningTrainer


class SkuTrainer(UnlearningTrainer):
    """Trains the bad model: ``UnlearningTrainer`` with the objective that its settings describe.

    It trains one model. With ``train_twin="good"`` that is the good twin; ``sku run`` and ``sku acquire`` train both
    one after the other where the recipe says ``acquire.twin: good``, and subtract bad minus good.

    From ``train`` on the model is marked: ``save_model`` and ``save_pretrained`` mark the folder and make it private,
    and ``push_to_hub`` refuses (``sku.hazard``).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SkuConfig,
        train_dataset: ForgetRetainData | JointDataset,
        *,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
        prompt_format: PromptFormatName = "auto",
        compat: CompatConfig | None = None,
        **trainer_options: Any,
    ) -> None:
        """Prepares the model and the joint examples.

        Args:
            model: The original model. With ``peft_config`` its weights stay as they are; without one and without an
                adapter of its own all weights are trained in place.
            args: Settings of training and of the three modules.
            train_dataset: Splits, tokenized here with the settings of ``args``; or joint examples made before.
            processing_class: Tokenizer of the model.
            peft_config: Adapter to add, such as ``LoraConfig``.
            prompt_format: How prompts are written when ``train_dataset`` holds splits.
            compat: Behaviours of the public code to reproduce; None for none. ``row_split`` is a matter of the data.
            **trainer_options: As of ``transformers.Trainer``: callbacks, optimizers, ...

        Raises:
            DataError: As ``JointDataset``.
            ModelError: No usable pad token or prompt format, or a model without trainable weights.
            RecipeError: Several GPUs in one process, an adapter that doesn't fit the model, or ``compat`` that doesn't
                fit the settings.
        """
        super().__init__(
            model,
            args,
            train_dataset,
            objective=sku_objective(args.modules(), compat, twin=args.train_twin),
            processing_class=processing_class,
            peft_config=peft_config,
            prompt_format=prompt_format,
            hazardous=True,
            **trainer_options,
        )
        self.settings = args
