"""The trainer of stage 1: transformers' Trainer with the three losses of SKU.

Shapes: B = joint examples of a batch, R = rows, T = tokens, N = kept positions (whose next token counts),
V = vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from sku.acquire.config import SkuConfig
from sku.acquire.guided_distortion import guided_distortion_loss
from sku.acquire.preservation_divergence import preservation_divergence_loss
from sku.acquire.random_disassociation import random_disassociation_loss
from sku.config import PromptFormatName
from sku.data.collation import JointCollator
from sku.data.examples import ForgetRetainData
from sku.data.joint import GUIDED, MISMATCHED, RETAIN, JointDataset
from sku.data.prompts import resolve_prompt_format
from sku.errors import ModelError, NonFiniteLossError, RecipeError
from sku.losses import IGNORE_INDEX
from sku.models import ensure_pad_token, plain_model

TERMS = ("guided_distortion", "random_disassociation", "preservation_divergence")
"""Names of the three modules, as in the log (``loss/<name>``)."""


class SkuTrainer(Trainer):
    """Trains the bad model. Everything but the loss is transformers' Trainer: resume, accelerate, logging, callbacks.

    The frozen reference of preservation divergence is the model with its adapter switched off; with full fine-tuning
    it is a copy, made only if that module is on.
    """

    # compute_loss divides by the examples of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SkuConfig,
        train_dataset: ForgetRetainData | JointDataset,
        *,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
        prompt_format: PromptFormatName = "auto",
        **trainer_options: Any,
    ) -> None:
        """Prepares the model and the joint examples.

        Args:
            model: The original model. With ``peft_config`` its weights stay as they are; without one and without an
                adapter of its own all weights are trained in place.
            args: Settings.
            train_dataset: Splits, tokenized here with the settings of ``args``; or joint examples made before.
            processing_class: Tokenizer of the model.
            peft_config: Adapter to add, such as ``LoraConfig``.
            prompt_format: How prompts are written when ``train_dataset`` holds splits.
            **trainer_options: As of ``transformers.Trainer``: callbacks, optimizers, ...

        Raises:
            DataError: As ``JointDataset``.
            ModelError: No usable pad token or prompt format, or a model without trainable weights.
            RecipeError: Several GPUs in one process, or an adapter that doesn't fit the model.
        """
        if args.n_gpu > 1:
            raise RecipeError(
                f"{args.n_gpu} GPUs in one process would split joint examples apart; start one process a GPU with "
                "accelerate launch, or show one with CUDA_VISIBLE_DEVICES=0"
            )
        ensure_pad_token(processing_class, plain_model(model))
        if isinstance(train_dataset, ForgetRetainData):
            train_dataset = JointDataset(
                train_dataset,
                processing_class,
                resolve_prompt_format(prompt_format, processing_class),
                num_random_answers=args.mismatched_answers,
                guided=args.guided_distortion_weight > 0,
                preservation=args.preserves,
                max_length=args.max_length,
                max_answer_tokens=args.max_answer_tokens,
                seed=args.seed,
            )
        self._reference: PreTrainedModel | None = None
        # The adapter's first weights are drawn here, before Trainer seeds the rest.
        set_seed(args.seed)
        if peft_config is not None:
            try:
                model = get_peft_model(model, peft_config)
            except ValueError as error:
                raise RecipeError(f"the adapter can't be added: {' '.join(str(error).split())}") from error
        elif not isinstance(model, PeftModel) and args.preserves:
            self._reference = copy.deepcopy(model).requires_grad_(requires_grad=False)
            self._reference.eval()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ModelError("no weight of the model is trainable; give a peft_config or unfreeze some")
        if args.activation_checkpointing and isinstance(model, PeftModel):
            # Without it the first checkpointed layer sees no input that needs a gradient and lora_B stays zero.
            model.enable_input_require_grads()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=JointCollator(int(processing_class.pad_token_id)),
            **trainer_options,
        )
        self.settings = args
        self._logged_terms: dict[str, Tensor] = {}
        self._logged_examples = 0
        if self._reference is not None:
            nn.Module.to(self._reference, self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collects the batches of one optimizer step and counts their joint examples over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.tensor(sum(len(batch["forget_index"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the three losses, each a mean over the joint examples of the optimizer step.

        Args:
            model: Possibly wrapped for distributed training.
            inputs: A batch of ``JointCollator``.
            return_outputs: Return the model's outputs as well.
            num_items_in_batch: Joint examples of the optimizer step over all processes; those of ``inputs`` if None.

        Returns:
            Scalar loss in nats per token, or it and the outputs.

        Raises:
            NonFiniteLossError: A term is NaN or infinite. Raised before backward, so no weight has seen it.
        """
        kept_RT = self._kept_positions(inputs)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=kept_RT,
            use_cache=False,
        )
        terms = self._terms(model, inputs, kept_RT, outputs.logits)
        num_examples = len(inputs["forget_index"])
        self._check_finite(terms, inputs)
        weights = self._weights()
        total = torch.stack([weights[name] * losses_B.sum() for name, losses_B in terms.items()]).sum()
        if model.training:
            self._note_terms(terms, num_examples)
        # Data-parallel training averages gradients over processes; each holds its part of the sum.
        if num_items_in_batch is None:
            loss = total / num_examples
        else:
            loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each loss term, averaged since the last line, under ``loss/<name>``."""
        if self._logged_examples and "loss" in logs:
            count = self.accelerator.gather(torch.tensor(float(self._logged_examples), device=self.args.device)).sum()
            for name, total in self._logged_terms.items():
                logs[f"loss/{name}"] = float(self.accelerator.gather(total).sum() / count)
            self._logged_terms, self._logged_examples = {}, 0
        super().log(logs, *args, **kwargs)

    def _weights(self) -> dict[str, float]:
        settings = self.settings
        return {name: float(getattr(settings, f"{name}_weight")) for name in TERMS}

    def _kept_positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """``[R, T]`` bool: positions whose next token is learned or compared."""
        following = inputs["labels"][:, 1:] != IGNORE_INDEX
        if self.settings.preservation_tokens == "all":
            is_retain = (inputs["row_module"] == RETAIN)[:, None]
            following = following | (is_retain & (inputs["attention_mask"][:, 1:] == 1))
        return nn.functional.pad(following, (0, 1), value=False)

    def _terms(
        self, model: nn.Module, inputs: dict[str, Tensor], kept_RT: Tensor, logits_NV: Tensor
    ) -> dict[str, Tensor]:
        """Loss of each active module, ``[B]``, in nats per token."""
        num_examples = len(inputs["forget_index"])
        row_N, position_N = kept_RT.nonzero(as_tuple=True)
        targets_N = inputs["input_ids"][row_N, position_N + 1]
        module_N = inputs["row_module"][row_N]
        example_N = inputs["row_example"][row_N]
        terms: dict[str, Tensor] = {}
        weights = self._weights()
        if weights["guided_distortion"]:
            guided = module_N == GUIDED
            terms["guided_distortion"] = guided_distortion_loss(
                logits_NV[guided], targets_N[guided], example_N[guided], num_examples
            )
        if weights["random_disassociation"]:
            mismatched = module_N == MISMATCHED
            rows_M = (inputs["row_module"] == MISMATCHED).nonzero(as_tuple=True)[0]
            terms["random_disassociation"] = random_disassociation_loss(
                logits_NV[mismatched],
                targets_N[mismatched],
                torch.searchsorted(rows_M, row_N[mismatched]),
                inputs["row_example"][rows_M],
                num_examples,
            )
        if weights["preservation_divergence"]:
            retain = module_N == RETAIN
            terms["preservation_divergence"] = preservation_divergence_loss(
                self._reference_logits(model, inputs, kept_RT),
                logits_NV[retain],
                example_N[retain],
                num_examples,
                mode=self.settings.preservation_mode,
                cap=self.settings.preservation_cap,
            )
        return terms

    def _reference_logits(self, model: nn.Module, inputs: dict[str, Tensor], kept_RT: Tensor) -> Tensor:
        """The original model's scores at the kept positions of the normal rows, without gradient."""
        rows = inputs["row_module"] == RETAIN
        attention_RT = inputs["attention_mask"][rows]
        longest = int(attention_RT.sum(1).max())
        reference = model if self._reference is None else self._reference
        with torch.no_grad(), self._original(model):
            logits_NV: Tensor = reference(
                input_ids=inputs["input_ids"][rows][:, :longest],
                attention_mask=attention_RT[:, :longest],
                logits_to_keep=kept_RT[rows][:, :longest],
                use_cache=False,
            ).logits
        return logits_NV

    @contextmanager
    def _original(self, model: nn.Module) -> Iterator[None]:
        """The frozen reference: adapter off and dropout off, as the original model is used."""
        unwrapped = self.accelerator.unwrap_model(model)
        adapter_off: AbstractContextManager[None] = (
            unwrapped.disable_adapter() if isinstance(unwrapped, PeftModel) else nullcontext()
        )
        # Four-bit layers stay as they are: in evaluation mode bitsandbytes repacks their weights on a CPU for a kernel
        # that has no backward.
        switched = [module for module in model.modules() if module.training and not hasattr(module, "quant_state")]
        try:
            for module in switched:
                module.training = False
            with adapter_off:
                yield
        finally:
            for module in switched:
                module.training = True

    def _check_finite(self, terms: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        # One transfer for all terms: a synchronisation a step is the price of never training on NaN.
        sums = torch.stack([losses_B.detach().sum() for losses_B in terms.values()]).tolist()
        for (name, losses_B), value in zip(terms.items(), sums, strict=True):
            if not math.isfinite(value):
                bad_B = ~losses_B.detach().isfinite()
                batch = {key: inputs[key][bad_B].tolist() for key in ("forget_index", "retain_index")}
                raise NonFiniteLossError(
                    f"loss term {name} is {value} at step {self.state.global_step + 1}, "
                    f"forget examples {batch['forget_index']}, retain examples {batch['retain_index']}; no optimizer "
                    "step was taken with it. Lower the learning rate, or set a preservation_cap"
                )

    def _note_terms(self, terms: dict[str, Tensor], num_examples: int) -> None:
        for name, losses_B in terms.items():
            value = losses_B.detach().sum()
            self._logged_terms[name] = self._logged_terms[name] + value if name in self._logged_terms else value
        self._logged_examples += num_examples
