"""A recipe's job, whether it fits, and what to change where it doesn't: what suffices first, the cheapest first."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from sku.acquire.objective import sku_objective
from sku.config import ModelConfig, Recipe
from sku.errors import ModelError, RecipeError, SkuError, one_line
from sku.methods.run import prepare, with_safe_dtype
from sku.models import load_config, pick_device
from sku.plan import MemoryFit
from sku.plan.disk import STATE_BYTES, checkpoints_at_once
from sku.plan.estimate import GIB, Estimate, estimated
from sku.plan.weights import Job, Sharding
from sku.processes import current_processes
from sku.training.config import UnlearningConfig
from sku.training.optimizer import check_optimizer

_BATCH = "--set acquire.training.per_device_train_batch_size"


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change of the recipe or the command."""

    change: str
    """As it is written."""
    cost: str
    needed: int
    """Bytes of each GPU with it."""
    fits: bool


def job_of(
    recipe: Recipe,
    *,
    gpus: int = 1,
    sharding: Sharding = "ddp",
    row_tokens: int | None = None,
    answer_tokens: int | None = None,
    on_cpu: bool = False,
) -> Job:
    """The job that a recipe describes; by default rows are as long as they may be.

    ``sharding`` says what the processes, each with a GPU of its own, divide: nothing, or weights, gradients and
    optimizer. With ``on_cpu`` weights have the type that ``auto`` means on a CPU.

    Raises:
        RecipeError: Another method, an unknown optimizer, or numbers that make no sense.
        ModelError: The model's configuration can't be read.
    """
    if recipe.method != "sku":
        raise RecipeError(f"sku plan knows stage 1 of sku, and the recipe's method is {recipe.method}")
    row_tokens = recipe.data.max_length if row_tokens is None else row_tokens
    answer_tokens = min(recipe.data.max_answer_tokens, row_tokens) if answer_tokens is None else answer_tokens
    if gpus < 1 or not 1 <= answer_tokens <= row_tokens:
        raise RecipeError(
            f"{gpus} GPUs, rows of {row_tokens} tokens with {answer_tokens} of the answer can't be planned: all must "
            "be 1 or more, and the answer is a part of its row"
        )
    training, optimizer = _training_and_optimizer(recipe, on_cpu=on_cpu)
    objective = sku_objective(recipe.acquire)
    config, shipped = _config_of(recipe.model)
    model = with_safe_dtype(recipe)
    if model.dtype == "auto":
        dtype = torch.float32 if on_cpu else torch.bfloat16
    elif model.dtype == "stored":
        dtype = getattr(config, "dtype", None) or torch.float32
    else:
        dtype = getattr(torch, model.dtype)
    return Job(
        name=recipe.model.path,
        config=config,
        tuning=recipe.acquire.tuning,
        lora=recipe.acquire.lora,
        dtype=dtype,
        autocast=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
        checkpointing=bool(training.activation_checkpointing),
        optimizer=optimizer,
        examples=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        steps=training.max_steps * (2 if recipe.acquire.twin == "good" else 1) if training.max_steps > 0 else None,
        forget=objective.rows.forget,
        mismatched=objective.rows.mismatched,
        retain=objective.rows.retain,
        reference=training.reference,
        row_tokens=row_tokens,
        answer_tokens=answer_tokens,
        checkpoints=checkpoints_at_once(training),
        gpus=gpus,
        sharding=sharding,
        shipped_shape=shipped,
    )


def _config_of(model: ModelConfig) -> tuple[PreTrainedConfig, bool]:
    """Of the model's own files; where they are out of reach, the shape that this package knows of the recipes' models.

    Returns:
        The configuration, and whether it is the shipped shape.
    """
    try:
        return load_config(model), False
    except ModelError:
        shapes = json.loads((resources.files("sku") / "plan" / "shapes.json").read_text(encoding="utf-8"))
        shape = shapes.get(model.path)
        if shape is None:
            raise
        return AutoConfig.for_model(**shape), True


def _training_and_optimizer(recipe: Recipe, *, on_cpu: bool) -> tuple[UnlearningConfig, str]:
    """The trainer's settings, made as on a CPU: the GPU that is planned for may be another machine's."""
    settings = dict(recipe.acquire.training)
    optim = str(settings.get("optim"))
    paged = optim.startswith("paged_") and not on_cpu
    if paged:  # Refused without a GPU.
        del settings["optim"]
    if settings.get("bf16") == "auto" and not on_cpu:
        settings["bf16"] = True
    acquire = dataclasses.replace(recipe.acquire, training=settings)
    training = prepare(dataclasses.replace(recipe, acquire=acquire), Path("planned"), device="cpu").training
    if paged:
        check_optimizer(optim, stochastic_rounding=training.stochastic_rounding, on_gpu=True)
    else:
        optim = str(getattr(training.optim, "value", training.optim))
    if optim not in STATE_BYTES:
        raise RecipeError(
            f"the memory of acquire.training.optim={optim} is not known here; known: {', '.join(sorted(STATE_BYTES))}"
        )
    return training, optim


def memory_fit(recipe: Recipe) -> MemoryFit:
    """Estimates a recipe's memory for the device it would run on, every row as long as it may be."""
    device = pick_device(recipe.model.device)
    if device.type == "mps":
        return MemoryFit(fits=False, text="no estimate of memory: what is free on mps is not known")
    on_cpu = device.type == "cpu"
    free = _free_memory() if on_cpu else torch.cuda.mem_get_info(device)[0]
    try:
        # With sharding a process needs less; the launcher's settings are not known here.
        plan = estimated(job_of(recipe, gpus=current_processes().count, on_cpu=on_cpu), gpu_memory=free)
    except SkuError as error:
        return MemoryFit(fits=False, text=f"no estimate of memory: {one_line(error)}")
    sizes = f"about {plan.needed / GIB:.1f} GiB at most, {free / GIB:.1f} GiB are free on {device}"
    if plan.fits:
        return MemoryFit(fits=True, text=f"{sizes}: fits")
    found = first_that_fits(plan)
    helps = "`sku plan` says what would help"
    if found is not None:
        helps = f"what would fit: {found.change} ({found.needed / GIB:.1f} GiB; {found.cost})"
    return MemoryFit(fits=False, text=f"{sizes}: may not fit; {helps}")


def _free_memory() -> int:
    """Of the computer, within the limit of its container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # "max" where there is no limit.
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def suggestions(plan: Estimate) -> list[Suggestion]:
    """Changes that make a job smaller: alone, and where none suffices one on top of the other until they do.

    Args:
        plan: Of the job as it is.

    Returns:
        Those that fit, cheapest first; then those that help and don't suffice. None where the job fits.
    """
    if plan.fits:
        return []
    found = [suggestion for change, cost, job in _changes(plan.job) for suggestion in _tried(plan, change, cost, job)]
    if not any(suggestion.fits for suggestion in found):
        together, names = plan.job, list[str]()
        for change, _, _ in _changes(plan.job):
            joined = _again(together, change)
            if joined is None:
                continue
            together, names = joined, [*names, change]
            tried = _tried(plan, " ".join(names), "all of these together", together) if len(names) > 1 else []
            if any(suggestion.fits for suggestion in tried):
                found += tried
                break
    return sorted(found, key=lambda suggestion: not suggestion.fits)


def first_that_fits(plan: Estimate) -> Suggestion | None:
    """The cheapest single change that makes a job fit; the dearer ones are not estimated.

    Args:
        plan: Of the job as it is, which doesn't fit.

    Returns:
        The change; None where no single one suffices.
    """
    tried = (found for change, cost, job in _changes(plan.job) for found in _tried(plan, change, cost, job))
    return next((found for found in tried if found.fits), None)


def _tried(plan: Estimate, change: str, cost: str, job: Job) -> list[Suggestion]:
    try:
        same_step = dataclasses.replace(job, sharding=plan.job.sharding, optimizer=plan.job.optimizer) == plan.job
        other = estimated(
            job,
            gpu_memory=plan.gpu_memory,
            tflops=plan.tflops,
            efficiency=plan.efficiency,
            step=plan.step if same_step else None,
        )
    except SkuError:
        return []  # Not a way for this model.
    if other.needed >= plan.needed:
        return []
    return [Suggestion(change=change, cost=cost, needed=other.needed, fits=other.fits)]


def _again(job: Job, change: str) -> Job | None:
    """The same change on top of others, where it still is one."""
    return next((changed for name, _, changed in _changes(job) if name.split("=")[0] == change.split("=")[0]), None)


def _changes(job: Job) -> Iterator[tuple[str, str, Job]]:
    """From those that change nothing but time to those that change what is learned."""
    if job.gpus > 1 and job.sharding == "ddp":
        yield (
            "--sharding fsdp2",
            "weights travel between the GPUs in every step (accelerate's fsdp2.yaml)",
            dataclasses.replace(job, sharding="fsdp2"),
        )
    if not job.checkpointing:
        yield (
            "--set acquire.training.activation_checkpointing=true",
            "a third to a half more work",
            dataclasses.replace(job, checkpointing=True),
        )
    if job.examples > 1:
        yield (
            f"{_BATCH}=1 --set acquire.training.gradient_accumulation_steps={job.examples * job.accumulation}",
            "the same steps in smaller pieces, slower on a large GPU",
            dataclasses.replace(job, examples=1, accumulation=job.examples * job.accumulation),
        )
    if job.autocast is None and (job.dtype == torch.float32 or job.tuning == "lora"):
        yield (
            "--set acquire.training.bf16=true",
            f"products in bfloat16, {'weights' if job.dtype == torch.float32 else 'the adapter'} in float32",
            dataclasses.replace(job, autocast=torch.bfloat16),
        )
    if job.state_bytes > 2 and job.tuning == "full":
        yield (
            "--set acquire.training.optim=adamw_bnb_8bit",
            "needs bitsandbytes; states in eight bits",
            dataclasses.replace(job, optimizer="adamw_bnb_8bit"),
        )
    if job.tuning == "full":
        yield (
            "--set acquire.tuning=lora --set model.dtype=bfloat16",
            "another kind of training: an adapter; set its learning rate",
            dataclasses.replace(job, tuning="lora", dtype=torch.bfloat16),
        )
    if job.tuning == "lora":
        yield (
            "--set acquire.tuning=qlora",
            "needs bitsandbytes; trains on a four-bit base, slower",
            dataclasses.replace(job, tuning="qlora"),
        )
    if job.mismatched > 1:
        yield (
            "--set acquire.random_answers=1",
            "fewer random answers: another objective",
            dataclasses.replace(job, mismatched=1),
        )
