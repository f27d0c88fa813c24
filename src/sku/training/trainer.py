"""The one training loop of all methods: transformers' Trainer, which minimises an ``Objective`` on joint examples.

Shapes: B = joint examples of a batch, R = rows, T = tokens, N = kept positions (whose next token counts),
V = vocabulary.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from sku.config.data import ModelConfig, PromptFormatName
from sku.config.stages import Packing
from sku.data.batches import ROWS, JointCollator, JointExample, Rows
from sku.data.examples import ForgetRetainData, RowType
from sku.data.joint import JointDataset, WholeBatches
from sku.data.load import Source, load_training_pairs
from sku.data.tokens import Encoder, resolve_prompt_format
from sku.errors import ModelError, OutputError, RecipeError, one_line
from sku.hazard import mark_model, refuse_upload
from sku.models import ensure_pad_token, load_model, load_tokenizer, plain_model
from sku.training import adapter_inputs_as_they_are
from sku.training.attention import choose_packing
from sku.training.config import UnlearningConfig
from sku.training.forward import DeferredHead, run_rows, scores_of_kind
from sku.training.objective import FiniteGuard, Objective, ScoredRows, TrainingStep, check_finite
from sku.training.reference import (
    NoCacheError,
    ReferenceCache,
    check_original_stays,
    keep_four_bit_trainable,
    original_weights,
)

_LOG = logging.getLogger(__name__)


class UnlearningTrainer(Trainer):
    """Minimises a method's objective. Everything but the loss is transformers' Trainer: resume, accelerate, logging.

    The frozen reference is what the original model made of the rows in one pass before training. Where that doesn't
    fit it is the model with its adapter switched off, or with full fine-tuning a copy.
    """

    # compute_loss divides by the examples of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | Path,
        args: UnlearningConfig,
        train_dataset: ForgetRetainData | JointDataset | Source,
        *,
        objective: Objective,
        retain_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        trained_modules: Sequence[str] | None = None,
        prompt_format: PromptFormatName = "auto",
        hazardous: bool = False,
        **trainer_options: Any,
    ) -> None:
        """Prepares the model and the joint examples.

        Args:
            model: The original model, or its folder or hub id. With ``peft_config`` its weights stay as they are;
                without one and without an adapter of its own its weights are trained in place.
            args: Settings.
            train_dataset: Splits, tokenized here with the settings of ``args``; joint examples made before; or harmful
                pairs as ``load_forget_retain`` takes them, of which all are trained on.
            objective: What is minimised, and the rows it needs.
            retain_dataset: Normal pairs, with harmful pairs.
            processing_class: Tokenizer of the model; loaded from where the model came from if None.
            peft_config: Adapter to add, such as ``LoraConfig``.
            trained_modules: Names of the modules whose own weights full fine-tuning trains; all if None. An adapter
                has ``target_modules`` for that.
            prompt_format: How prompts are written when ``train_dataset`` holds splits.
            hazardous: The trained model answers harmful prompts on purpose: from ``train`` on it is marked
                (``sku.hazard``).
            **trainer_options: As in ``transformers.Trainer``: callbacks, optimizers, ...

        Raises:
            DataError: As ``JointDataset``.
            ModelError: No usable pad token or prompt format, a model without trainable weights, or ``packing`` that
                asks for packed rows where the model can't be given any.
            RecipeError: Several GPUs in one process, an adapter that doesn't fit the model or changes its weights, or
                harmful pairs without normal ones.
        """
        if args.n_gpu > 1:
            raise RecipeError(
                f"{args.n_gpu} GPUs in one process would split joint examples apart; start one process a GPU with "
                "accelerate launch, or show one with CUDA_VISIBLE_DEVICES=0"
            )
        train_dataset = _examples(train_dataset, retain_dataset)
        model, processing_class = _with_tokenizer(model, processing_class)
        ensure_pad_token(processing_class, plain_model(model))
        if isinstance(train_dataset, ForgetRetainData):
            written = resolve_prompt_format(prompt_format, processing_class)
            encoder = Encoder(processing_class, written, args.max_length, args.max_answer_tokens)
            train_dataset = JointDataset(train_dataset, encoder, rows=objective.rows, seed=args.seed)
        self.objective: Objective = objective
        self._is_hazardous = hazardous
        self._reference: PreTrainedModel | None = None
        model = _with_trainable_weights(model, args, peft_config, trained_modules)
        self._trained, self._settings, self._examples = model, args, train_dataset
        self._collate = JointCollator(
            pad_token_id=int(processing_class.pad_token_id), retain_tokens=objective.rows.retain_tokens
        )
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class,
            data_collator=self._collate, **trainer_options,
        )  # fmt: skip
        self._logged_terms: dict[str, Tensor] = {}
        self._logged_examples: Tensor | int = 0
        self._check_sharding()
        self.add_callback(FiniteGuard())
        keep_four_bit_trainable(model)
        self._own_attention = str(plain_model(model).config._attn_implementation)
        self.packing: Packing = choose_packing(model, args.packing)
        if self.packing != "padded":
            self._collate = JointCollator(self.packing, retain_tokens=objective.rows.retain_tokens)
            self.data_collator = self._collate
        self._head = DeferredHead(plain_model(model), args.logits_budget_mb, watched=args.world_size > 1)
        self._cache: ReferenceCache | None = None
        if objective.needs_reference:
            self._cache = ReferenceCache(train_dataset, self._original_rows, args, self._head.head)
            if reason := self._cache.why_not(is_spread=self.is_fsdp_enabled):
                self._ask_in_each_step(reason)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains. Before that and before a checkpoint is loaded, the original model is asked all that it will be.

        A model that becomes hazardous is marked first. Afterwards the model has the attention that it came with.
        """
        if self._is_hazardous:
            mark_model(self._trained)
        try:
            if self._cache is not None:
                # Dropout's draws must be there for training.
                devices = [self.args.device] if self.args.device.type == "cuda" else []
                with torch.no_grad(), torch.random.fork_rng(devices), self.accelerator.autocast():
                    self._outputs_and_terms(self._trained, self._on_device(self._collate([self._examples[0]])))
            return super().train(*args, **kwargs)
        finally:
            if self.packing != "padded":
                plain_model(self._trained).set_attn_implementation(self._own_attention)

    def push_to_hub(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Refuses: a model in training is hazardous, or not yet measured.

        Raises:
            OutputError: Always.
        """
        if self._is_hazardous:
            refuse_upload()
        raise OutputError(
            "the trainer's model is not measured yet, and is not uploaded: sku push uploads that of a finished run"
        )

    def create_model_card(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Refuses: transformers' card would say nothing of unlearning, and take the model for one from scratch.

        Raises:
            OutputError: Always.
        """
        raise OutputError("the trainer writes no model card: sku run writes the one of a finished run")

    def _check_sharding(self) -> None:
        """Refuses, before training, what would leave no whole weights after it."""
        if self.is_deepspeed_enabled:
            raise RecipeError('DeepSpeed is not supported: give accelerate the configuration "$(sku init fsdp2)"')
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise RecipeError(f"FSDP{plugin.fsdp_version} is not supported: set fsdp_version: 2 for accelerate")
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise RecipeError(
                "stage 2 needs whole weights, and fsdp_state_dict_type leaves them in parts: set it to "
                "FULL_STATE_DICT for accelerate"
            )

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """With several processes, an epoch ends for all of them in the same step."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.world_size == 1 or not isinstance(dataset, JointDataset):
            return super()._get_train_sampler(train_dataset)
        return WholeBatches(len(dataset), self.args.train_batch_size * self.args.world_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collects the batches of one optimizer step and counts their joint examples over all processes."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the checkpoint of the last step: transformers would train one step more.
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([batch["counts"].sum() for batch in batches]).sum().to(device)
        return batches, self.accelerator.gather(count).sum()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass, as Trainer's, without casts that autocast undoes."""
        with adapter_inputs_as_they_are(self._trained, autocast=self.args.bf16 or self.args.fp16):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the objective's terms, each a mean over the joint examples of the optimizer step.

        Args:
            model: Possibly wrapped for distributed training.
            inputs: A batch of ``JointCollator``.
            return_outputs: Return the model's outputs as well.
            num_items_in_batch: Joint examples of the optimizer step over all processes; those of ``inputs`` if None.

        Returns:
            Scalar loss in nats per token, or it and the outputs.

        Raises:
            NonFiniteLossError: A term is NaN or infinite. No weight has seen it (``FiniteGuard``).
        """
        outputs, terms = self._outputs_and_terms(model, inputs)
        check_finite(terms, inputs, self.state.global_step + 1)
        terms = {name: losses_B * inputs["counts"] for name, losses_B in terms.items()}
        weights = self.objective.weights
        num_examples = inputs["counts"].sum()
        total = torch.stack([weights[name] * losses_B.sum() for name, losses_B in terms.items()]).sum()
        if model.training:
            for name, losses_B in terms.items():
                self._logged_terms[name] = self._logged_terms.get(name, 0) + losses_B.detach().sum()
            self._logged_examples += num_examples
        # Data-parallel training averages gradients over processes; each holds its part of the sum.
        if num_items_in_batch is None:
            loss = total / num_examples
        else:
            loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each loss term, averaged since the last line, under ``loss/<name>``."""
        if self._logged_terms and "loss" in logs:
            count = self.accelerator.gather(torch.tensor(float(self._logged_examples), device=self.args.device)).sum()
            for name, total in self._logged_terms.items():
                logs[f"loss/{name}"] = float(self.accelerator.gather(total).sum() / count)
            self._logged_terms, self._logged_examples = {}, 0
        super().log(logs, *args, **kwargs)

    def _forward(self, model: nn.Module, rows: Rows, *, without_head: bool = False) -> Any:
        plain, hidden_states = self.accelerator.unwrap_model(model), bool(self.objective.hidden_layers)
        return self._head.run(
            plain, lambda: run_rows(rows, model, plain, hidden_states=hidden_states), defer=without_head
        )

    def _outputs_and_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """The model's outputs for a batch, padded or packed, and the loss of each term, ``[B]``."""
        batch: Rows = inputs[ROWS].to(self.args.device, non_blocking=True)
        outputs = self._forward(model, batch)

        @functools.cache
        def rows(kind: RowType) -> ScoredRows:
            """Once a step: these are copies of the scores, the largest tensors there are."""
            return scores_of_kind(batch, kind, outputs, self.objective.hidden_layers)

        def reference(kind: RowType) -> ScoredRows:
            if self._cache is not None:
                try:
                    return self._cache.look_up(kind, rows(kind), inputs)
                except NoCacheError as reason:
                    self._ask_in_each_step(str(reason))
            return self._reference_rows(model, inputs, kind)

        steps = self.state.max_steps  # 0 where no training is in progress.
        progress = min((self.state.global_step + 1) / steps, 1.0) if steps > 0 else 1.0
        step = TrainingStep(rows=rows, reference=reference, progress=progress)
        return outputs, dict(self.objective.losses(step))

    def _ask_in_each_step(self, reason: str) -> None:
        """Gives up the cache while the original model still is what it was: with the adapter off, or as a copy."""
        _LOG.warning("the original model is asked in each step: %s", reason)
        self._cache = None
        if not isinstance(self._trained, PeftModel):
            self._reference = copy.deepcopy(plain_model(self._trained)).requires_grad_(requires_grad=False)
            self._reference.eval()
            # Where the model in training is: on one device, or sharded in the same way.
            if self.is_fsdp_enabled:
                fsdp2_prepare_model(self.accelerator, self._reference)
            else:
                nn.Module.to(self._reference, self.args.device)

    def _original_rows(self, kind: RowType, examples: list[JointExample]) -> ScoredRows:
        """What goes into the original model's head on the rows of one kind."""
        inputs = self._on_device(self._collate(examples))
        return self._reference_rows(self._trained, inputs, kind, without_head=True)

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: part.to(self.args.device) for name, part in inputs.items()}

    def _reference_rows(
        self, model: nn.Module, inputs: dict[str, Any], kind: RowType, *, without_head: bool = False
    ) -> ScoredRows:
        """What the original model says of the rows of one kind, without gradient."""
        # In the precision of training, where the two are the same model as long as no step is taken.
        precision = self.accelerator.autocast()
        with torch.no_grad(), precision, original_weights(self.accelerator.unwrap_model(model)):
            asked = model if self._reference is None else self._reference
            batch: Rows = inputs[ROWS].to(self.args.device, non_blocking=True).of_kind(kind)
            outputs = self._forward(asked, batch, without_head=without_head)
            return scores_of_kind(batch, kind, outputs, self.objective.hidden_layers)


def _examples(
    given: ForgetRetainData | JointDataset | Source, retain: Source | None
) -> ForgetRetainData | JointDataset:
    if isinstance(given, ForgetRetainData | JointDataset):
        if retain is not None:
            raise RecipeError(
                "retain_dataset is given, and train_dataset holds normal examples already: leave one out"
            )
        return given
    if retain is None:
        raise RecipeError("retain_dataset is missing: unlearning needs normal pairs that are to be kept")
    return load_training_pairs(given, retain)


def _with_tokenizer(
    model: PreTrainedModel | PeftModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    if isinstance(model, str | Path):
        loaded = load_model(model)
        return loaded.model, tokenizer or loaded.tokenizer
    return model, tokenizer or load_tokenizer(ModelConfig(path=str(plain_model(model).name_or_path)))


def _with_trainable_weights(
    model: PreTrainedModel | PeftModel,
    args: UnlearningConfig,
    adapter: PeftConfig | None,
    trained_modules: Sequence[str] | None,
) -> PreTrainedModel | PeftModel:
    """The model with its new adapter, if it gets one, and what training needs of either."""
    # The adapter's first weights are drawn here, before Trainer seeds the rest.
    set_seed(args.seed)
    check_original_stays(model, adapter)
    try:
        if adapter is not None:
            model = get_peft_model(model, adapter)
        elif not isinstance(model, PeftModel) and trained_modules is not None:
            model.requires_grad_(requires_grad=False)
            for name in trained_modules:
                model.get_submodule(name).requires_grad_(requires_grad=True)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"the model can't be trained so: {one_line(error)}") from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("no weight of the model is trainable; give a peft_config or unfreeze some")
    if args.activation_checkpointing and isinstance(model, PeftModel):
        # Without it the first checkpointed layer sees no input that needs a gradient and lora_B stays zero.
        model.enable_input_require_grads()
    return model
