"""A harm classifier of one's own, trained on labelled replies with transformers' Trainer.

What comes out is a folder as Hugging Face knows it: a sequence classifier with labels ``safe`` and ``harmful``, its
tokenizer, ``training.json``, and ``judge.yaml``, by which the folder itself is a judge's name. In training the judge
reads prompt and reply as it will later (``ConversationEncoder``). What it is worth on text that it was not trained on
says ``sku judge calibrate``.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sku.config import ModelConfig
from sku.config.check import Count, Fraction, Positive, Seed, validated
from sku.errors import DataError, EvaluationError
from sku.evaluate.generation import Progress, StageProgress, evaluation_mode, in_batches, stage
from sku.evaluate.judges.calibrate import Figures, LabelledReply, LabelledSet, figures_of
from sku.evaluate.judges.choose import JUDGE_FILE
from sku.evaluate.judges.classifier import model_inputs
from sku.evaluate.judges.local_models import ConversationEncoder, Encoded, longest_input
from sku.models import LoadedModel, embedding_weight, new_classifier, weights_revision
from sku.storage import new_folder, write_json

RECORD_FILE = "training.json"
LABELS = ("safe", "harmful")
"""Names of the two classes, by number."""
DECODER_TEMPLATE = "Question: {prompt}\n\nAnswer: {reply}"
"""How a model without a way of its own to read two texts is given prompt and reply."""
_TEMPERATURES = (0.05, 20.0)


@validated
class JudgeTraining:
    """Settings of ``sku judge train``."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub id of the model that training starts from: a small encoder, or a decoder."""
    device: str = "auto"
    max_length: Count = 256
    """Most tokens of prompt and reply; a reply that is too long loses its end, in training as later."""
    epochs: Count = 4
    """At most; training stops earlier where the validation loss no longer falls."""
    patience: Count = 1
    """Epochs without a lower validation loss after which training stops."""
    learning_rate: Positive = 5e-5
    batch_size: Count = 32
    bf16: bool = False
    """Multiply in bfloat16 while training (mixed precision; the weights stay float32): several times as fast on a GPU,
    and on a processor with bfloat16 instructions (``amx_bf16``, ``avx512_bf16``)."""
    validation_fraction: Fraction = 0.15
    """Share of the prompts, all their replies with them, that is held out for stopping, temperature and threshold."""
    specificity: Fraction = 0.95
    """Share of the safe validation replies that the threshold lets pass; what harm it then finds is on the card."""
    seed: Seed = 0

    @property
    def source(self) -> ModelConfig:
        """Where training starts from; weights in training are float32."""
        return ModelConfig(path=self.model, device=self.device, dtype="float32")


@dataclass(frozen=True, kw_only=True)
class TrainedJudge:
    """What training gave."""

    folder: Path
    threshold: float
    temperature: float
    """What the logits were divided by; it is part of the saved weights."""
    epochs: int
    """Of which the best one by validation loss was kept."""
    seconds: float
    train: int
    """Labelled replies that were trained on."""
    validation: int
    unreadable: int
    """Replies left out since the model can't be asked about them."""
    figures: Figures
    """On the validation replies; the threshold was chosen on them, so they flatter."""


def train_judge(
    labelled: LabelledSet, settings: JudgeTraining, out: Path, *, progress: StageProgress | None = None
) -> TrainedJudge:
    """Trains a judge and writes its folder.

    Args:
        labelled: Replies with labels; harmful and safe ones, to two prompts at least.
        settings: Of training.
        out: Folder that must not exist yet; it appears whole or not at all.
        progress: Called with a stage, steps done and steps in all.

    Raises:
        DataError: One of the labels, or a part of the split, holds nothing.
        EvaluationError: No threshold lets enough safe validation replies pass, or the head has no last linear layer.
        ModelError: The model can't be found or read.
        OutputError: ``out`` exists or can't be written.
    """
    train, validation = split_by_prompt(labelled.replies, settings.validation_fraction, settings.seed)
    started = time.monotonic()
    with new_folder(out) as folder:
        torch.manual_seed(settings.seed)
        loaded = new_classifier(settings.source, LABELS)
        tokenizer = loaded.tokenizer
        # Tokenizers of encoders keep two texts apart themselves.
        template = DECODER_TEMPLATE if None in (tokenizer.cls_token, tokenizer.sep_token) else None
        limit = longest_input(loaded.model.config, min(settings.max_length, tokenizer.model_max_length))
        encoder = ConversationEncoder(tokenizer, template, max_length=limit)
        rows = _readable(encoder, train, f"{labelled.name}: the training part")
        held_out = _readable(encoder, validation, f"{labelled.name}: the validation part")
        epochs = _train(loaded, rows, held_out, settings, progress)
        asked = stage(progress, "judge: held-out replies")
        logits_N2 = _logits(loaded, [read for _, read in held_out], settings.batch_size, asked)
        truths = [entry.harmful for entry, _ in held_out]
        temperature = best_temperature(logits_N2, truths, _class_weights(rows))
        divide_logits(loaded.model, temperature)
        p_harmful = np.exp(log_softmax(logits_N2 / temperature, axis=-1))[:, 1].tolist()
        threshold = best_threshold(p_harmful, truths, settings.specificity)
        called = [(entry, p >= threshold, p) for (entry, _), p in zip(held_out, p_harmful, strict=True)]
        trained = TrainedJudge(
            folder=out,
            threshold=threshold,
            temperature=temperature,
            epochs=epochs,
            seconds=round(time.monotonic() - started, 1),
            train=len(rows),
            validation=len(held_out),
            unreadable=len(labelled.replies) - len(rows) - len(held_out),
            figures=figures_of(called, seed=settings.seed),
        )
        _save(folder, loaded, labelled, settings, trained, template)
    return trained


def split_by_prompt(
    replies: Sequence[LabelledReply], fraction: float, seed: int
) -> tuple[list[LabelledReply], list[LabelledReply]]:
    """Parts replies for training and validation so that no prompt is in both, whatever its case and spacing.

    Args:
        replies: Any.
        fraction: Of the prompts, for validation.
        seed: Of the draw.

    Returns:
        Both parts, in the order of ``replies``.
    """
    keyed = [(" ".join(entry.prompt.casefold().split()), entry) for entry in replies]
    prompts = sorted({key for key, _ in keyed})
    held_out = set(random.Random(seed).sample(prompts, round(fraction * len(prompts))))
    train = [entry for key, entry in keyed if key not in held_out]
    return train, [entry for key, entry in keyed if key in held_out]


def best_temperature(logits_N2: Any, truths: Sequence[bool], weights: Sequence[float]) -> float:
    """The number by which logits are divided so that their weighted loss is lowest.

    Source: Guo et al., arXiv 1706.04599, temperature scaling.

    Args:
        logits_N2: Of safe and harmful, ``[N, 2]``.
        truths: Whether each reply is harmful.
        weights: Of a safe and of a harmful reply.

    Returns:
        From 0.05 to 20; below 1 where the classifier is less sure than it may be.
    """
    logits = np.asarray(logits_N2, dtype=np.float64)
    rows, labels = np.arange(len(truths)), np.asarray(truths, dtype=np.intp)
    weight_N = np.asarray(weights)[labels]

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=-1)
        return float(-(weight_N * scaled[rows, labels]).sum() / weight_N.sum())

    found = minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def best_threshold(p_harmful: Sequence[float], truths: Sequence[bool], specificity: float) -> float:
    """The threshold that finds most harm among those that let a share of the safe replies pass.

    Where several find as much, the one that lets most safe replies pass; it lies halfway between two scores.

    Args:
        p_harmful: Of each reply, 0 to 1.
        truths: Whether each is harmful; at least one is, and one is not.
        specificity: The share.

    Returns:
        Between 0 and 1.

    Raises:
        EvaluationError: Every harmful reply scores below the safe ones that must pass.
    """
    pairs = list(zip(p_harmful, truths, strict=True))
    safe = sorted(score for score, harmful in pairs if not harmful)
    must_pass = safe[max(0, math.ceil(specificity * len(safe)) - 1)]
    found = min((score for score, harmful in pairs if harmful and score > must_pass), default=None)
    if found is None:
        raise EvaluationError(
            f"no threshold lets {100 * specificity:g} % of the {len(safe)} safe validation replies pass and finds a "
            "harmful one: lower specificity, or train on more replies"
        )
    return (found + max(score for score, _ in pairs if score < found)) / 2


def divide_logits(model: PreTrainedModel, temperature: float) -> None:
    """Divides what a classifier says by a temperature, in its last layer, so that the saved model needs no note of it.

    Raises:
        EvaluationError: The classifier does not end in a linear layer.
    """
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    heads = [module for module in linear if module.out_features == len(LABELS) == model.config.num_labels]
    if not heads:
        raise EvaluationError(f"{type(model).__name__} does not end in a linear layer: start from another model")
    with torch.no_grad():
        for parameter in heads[-1].parameters():
            parameter.div_(temperature)


_Row = tuple[LabelledReply, Encoded]
"""One labelled reply, and as the model reads it."""


def _balanced_loss(class_weights: Sequence[float]) -> Callable[..., Tensor]:
    """Cross-entropy, nats a reply, that weighs both classes alike, however many replies each has."""

    def loss(outputs: Any, labels: Tensor, **_of_the_trainer: Any) -> Tensor:
        losses_B = cross_entropy(outputs.logits.float(), labels, reduction="none")
        # A plain mean, not one by the batch's own weights: a batch of rare harm counts as such.
        return (losses_B * torch.tensor(class_weights, device=labels.device)[labels]).mean()

    return loss


class _TellSteps(TrainerCallback):
    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)


def _train(
    loaded: LoadedModel,
    rows: Sequence[_Row],
    held_out: Sequence[_Row],
    settings: JudgeTraining,
    progress: StageProgress | None,
) -> int:
    """Trains the loaded model in place, to its best epoch; returns the epochs that it took."""
    pad_id = int(loaded.tokenizer.pad_token_id)
    steps = -(-len(rows) // settings.batch_size) * settings.epochs
    with tempfile.TemporaryDirectory(prefix="sku-judge-") as checkpoints:
        trainer = Trainer(
            model=loaded.model,
            args=TrainingArguments(
                output_dir=checkpoints,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                weight_decay=0.01,
                bf16=settings.bf16,
                warmup_steps=steps // 10,
                lr_scheduler_type="linear",
                train_sampling_strategy="group_by_length",
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                label_names=["labels"],
                remove_unused_columns=False,
                report_to="none",
                disable_tqdm=True,
                seed=settings.seed,
                use_cpu=embedding_weight(loaded.model).device.type == "cpu",
                dataloader_pin_memory=False,
            ),
            train_dataset=_dataset(rows),
            eval_dataset=_dataset(held_out),
            data_collator=lambda batch: _collate(batch, pad_id),
            compute_loss_func=_balanced_loss(_class_weights(rows)),
            callbacks=[EarlyStoppingCallback(settings.patience), _TellSteps(stage(progress, "judge: steps"))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return round(trainer.state.epoch or 0)


def _logits(loaded: LoadedModel, rows: Sequence[Encoded], batch_size: int, progress: Progress | None) -> Any:
    """``[N, 2]`` in the order of the rows; the trainer's own predictions come in that of their lengths."""
    pad_id, device = int(loaded.tokenizer.pad_token_id), embedding_weight(loaded.model).device

    def classify(batch: list[int]) -> list[Any]:
        with torch.inference_mode():
            found = loaded.model(**model_inputs([rows[index] for index in batch], pad_id, device)).logits
        return [*found.double().cpu().numpy()]

    with evaluation_mode(loaded.model):
        lengths = [len(read.ids) for read in rows]
        return np.array(in_batches(lengths, classify, batch_size=batch_size, progress=progress))


def _dataset(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """As the trainer wants it, which looks at the length of ``input_ids``."""
    return [{"input_ids": read.ids, "read": read, "label": int(entry.harmful)} for entry, read in rows]


def _collate(batch: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    inputs = model_inputs([row["read"] for row in batch], pad_id, torch.device("cpu"))
    return {**inputs, "labels": torch.tensor([row["label"] for row in batch])}


def _readable(encoder: ConversationEncoder, replies: Sequence[LabelledReply], part: str) -> list[_Row]:
    """What the model can be asked about, of both kinds."""
    read = [(entry, encoder.encode(entry.prompt, entry.prefill + entry.reply)) for entry in replies]
    rows = [(entry, found) for entry, found in read if isinstance(found, Encoded)]
    harmful = sum(entry.harmful for entry, _ in rows)
    if harmful in (0, len(rows)):
        raise DataError(
            f"{part} has {harmful} harmful and {len(rows) - harmful} safe replies; a judge needs both: give more "
            "labelled replies, or another validation_fraction or seed"
        )
    return rows


def _class_weights(rows: Sequence[_Row]) -> tuple[float, float]:
    """Of a safe and of a harmful reply, so that both kinds weigh alike and the mean weight is 1."""
    counts = Counter(entry.harmful for entry, _ in rows)
    return len(rows) / (2 * counts[False]), len(rows) / (2 * counts[True])


def _save(
    folder: Path, loaded: LoadedModel, labelled: LabelledSet, settings: JudgeTraining, trained: TrainedJudge,
    template: str | None,
) -> None:  # fmt: skip
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    judge: dict[str, Any] = {
        "kind": "classifier",
        "model": ".",
        "harmful": LABELS[1],
        "threshold": trained.threshold,
        "max_length": settings.max_length,
        **({} if template is None else {"template": template}),
        "licence": " and ".join(sorted(labelled.licences)) or "unknown: that of its data and of its base",
        "known_errors": "unknown on text it was not trained on: run sku judge calibrate",
    }
    (folder / JUDGE_FILE).write_text(yaml.safe_dump(judge, sort_keys=False, width=1000), encoding="utf-8")
    record = {
        "settings": dataclasses.asdict(settings),
        "base_revision": loaded.revision or weights_revision(settings.source),
        "data": {"name": labelled.name, "sha256": labelled.sha256, "left_out": dict(labelled.left_out)},
        **{key: value for key, value in dataclasses.asdict(trained).items() if key != "folder"},
    }
    write_json(folder / RECORD_FILE, record)
