"""Training as one call: checkpoints, resume, and errors that a user can mend."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from sku.config.data import PromptFormatName
from sku.config.stages import AcquireConfig, Tuning
from sku.data.examples import ForgetRetainData
from sku.data.joint import JointDataset
from sku.data.tokens import TokenizationReport
from sku.errors import OutputError, SkuError, one_line
from sku.models import LoadedModel
from sku.processes import current_processes, lost_processes_named
from sku.training.config import UnlearningConfig
from sku.training.objective import Objective
from sku.training.trainer import UnlearningTrainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What training leaves."""

    model: PreTrainedModel | PeftModel
    """With its adapter, or fully trained."""
    log: list[dict[str, Any]]
    """One entry per logged step, with every loss term under its name."""
    reports: dict[str, TokenizationReport]
    seconds: float
    save: Callable[[Path], None]
    """Writes the trained weights, gathered from all processes, into a folder; every process must call it with the
    same one."""


def train(
    loaded: LoadedModel,
    data: ForgetRetainData | JointDataset,
    objective: Objective,
    settings: UnlearningConfig,
    *,
    tuning: Tuning,
    adapter: PeftConfig | None = None,
    trained_modules: Sequence[str] | None = None,
    folder: Path,
    prompt_format: PromptFormatName = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    hazardous: bool = False,
) -> Trained:
    """Minimises an objective, going on from the last whole checkpoint in the folder.

    Args:
        loaded: The original model. With an adapter its own weights stay as they are; with full fine-tuning they are
            trained in place.
        data: Splits, of which ``forget_train`` and ``retain_train`` are used; or joint examples of them.
        objective: What is minimised.
        settings: Of the trainer; its ``output_dir`` is ``folder``.
        tuning: What is trained.
        adapter: For every tuning but ``full``.
        trained_modules: Modules whose weights full fine-tuning trains; all if None.
        folder: Private folder for checkpoints.
        prompt_format: How prompts are written.
        callbacks: For progress.
        hazardous: The trained model answers harmful prompts on purpose: it is marked, and all that is saved of it.

    Returns:
        The trained model and its log.

    Raises:
        RecipeError: An impossible setting.
        NonFiniteLossError: A loss term or the gradient is NaN or infinite.
        OutputError: A checkpoint can't be written.
    """
    model, use_cache = loaded.model, getattr(loaded.model.config, "use_cache", None)
    settings = copy.copy(settings)
    settings.output_dir = str(folder)
    if tuning == "qlora":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(settings.activation_checkpointing)
        )
    elif tuning == "full":
        model.requires_grad_(requires_grad=True)
    trainer = UnlearningTrainer(
        model,
        settings,
        data,
        objective=objective,
        processing_class=loaded.tokenizer,
        peft_config=adapter,
        trained_modules=trained_modules,
        prompt_format=prompt_format,
        hazardous=hazardous,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # The log is kept and shown by the caller, not printed line by line.
    processes = current_processes()
    last = processes.run_on_rank0(lambda: _last_checkpoint(folder, processes.count))
    with _named_checkpoint_errors(folder), lost_processes_named():
        result = trainer.train(resume_from_checkpoint=last)
    if use_cache is not None:
        # The trainer switches it off in the configuration, which goes with the weights to whoever generates.
        loaded.model.config.use_cache = use_cache
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.eval()
    joint = trainer.train_dataset
    assert isinstance(joint, JointDataset)
    return Trained(
        model=trained,
        log=[entry for entry in trainer.state.log_history if "loss" in entry],
        reports=dict(joint.reports),
        seconds=float(result.metrics["train_runtime"]),
        save=lambda target: save_trained(trainer, target),
    )


def save_trained(trainer: UnlearningTrainer, target: Path) -> None:
    """Writes the trained weights and the tokenizer; with several processes all call it, and the first one writes.

    Args:
        trainer: After training.
        target: Folder.

    Raises:
        ProcessError: Another process died.
    """
    if trainer.args.world_size > 1:
        with lost_processes_named():
            trainer.save_model(str(target))
        return
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.save_pretrained(str(target))
    trainer.processing_class.save_pretrained(target)  # type: ignore[union-attr]


def adapter_settings(config: AcquireConfig, modules: Sequence[str] | None = None) -> PeftConfig | None:
    """The adapter of a tuning, None for full fine-tuning; ``modules`` are those that a method trains instead."""
    if config.tuning == "full":
        return None
    targets = config.lora.target_modules if modules is None else list(modules)
    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def step_progress(progress: Callable[[str, int, int], None] | None) -> list[TrainerCallback]:
    """The callback that tells a progress function of each step (stage, done, total); none without a function."""
    return [] if progress is None else [_StepProgress(progress)]


class _StepProgress(TrainerCallback):
    """Tells the progress of training step by step."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self._progress("acquire: steps", state.global_step, state.max_steps)


def _last_checkpoint(folder: Path, processes: int) -> str | None:
    """The last whole checkpoint. One whose writing was cut short is removed, since the trainer can't start from it."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not _is_whole(checkpoint, processes):
            shutil.rmtree(checkpoint)
    last = get_last_checkpoint(str(folder))
    return None if last is None else str(last)


def _is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether the trainer's state, which the first process writes last, and that of every generator are there."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return all(zipfile.is_zipfile(checkpoint / state) for state in states)  # Not one that was cut off.


_OF_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
)  # fmt: skip
"""A disk that is full, broken, read-only or forbidden."""
_FAILED_WRITE = re.compile("(?!.*Reader).*(I/O error|inline_container)", re.DOTALL)


@contextlib.contextmanager
def _named_checkpoint_errors(folder: Path) -> Iterator[None]:
    """Other errors pass: a service of ``report_to`` that can't be reached is an OSError too."""
    try:
        yield
    except SkuError:
        raise  # OutputError is an OSError too, and says more.
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch hide the system's error in one of their own.
        of_disk = error.errno in _OF_DISK if isinstance(error, OSError) else _FAILED_WRITE.match(str(error))
        if not of_disk:
            raise
        raise OutputError(
            f"a checkpoint can't be written to {folder}: {one_line(error)}; is the disk full?"
        ) from error
