"""From a recipe's job to the memory of each GPU, the disk and the time of a run.

And what to change where it doesn't fit: what suffices first, the cheapest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sku.errors import SkuError
from sku.plan.job import Job, Weights, disk_bytes, weights_of
from sku.plan.trace import StepTrace, trace_step

GIB = 2**30
CONTEXT_BYTES = int(0.6 * GIB)
"""Assumed for what CUDA and its libraries take on each GPU; no tensor of ours."""
FRAGMENTATION = 0.05
"""Assumed share of memory that the allocator holds and can't use."""
STREAM_BYTES = int(0.45 * GIB)
"""Most that ``sku negate`` took from file to file, the interpreter included, whatever the model (docs/stage2.md)."""
BF16_TFLOPS, FP32_TFLOPS = 989.0, 67.0
"""Of an H100 SXM by its data sheet, dense."""
EFFICIENCY = 0.3
"""Assumed share of them that a step reaches."""
_BATCH = "--set acquire.training.per_device_train_batch_size"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU at the fullest moment of stage 1, from the second step on."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    """With logits, losses and the pass of the reference."""
    communication: int
    """Buckets of DDP, or the parts that are whole for a moment under FSDP2 and ZeRO-3."""
    logits: int
    """Scores alone, in the type of the model: a part of ``activations``."""

    @property
    def total(self) -> int:
        """Of tensors."""
        return self.weights + self.reference + self.gradients + self.optimizer + self.activations + self.communication


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs."""

    job: Job
    weights: Weights
    step: StepTrace
    stage_1: Memory
    loading: int
    """Bytes on each GPU before anything is sharded: each process reads the whole model."""
    stage_2: int
    """Bytes on the first GPU of the original and the unlearned model, which evaluation holds on every GPU."""
    stage_2_host: int
    """Bytes of the task vector in the computer's memory, float32."""
    disk: int
    """Bytes of checkpoints, trained and unlearned weights, all of a run at once."""
    step_flops: int
    """Of one optimizer step on one GPU."""
    tflops: float
    """Of a GPU at its best, in the type of the matrix products."""
    efficiency: float
    gpu_memory: float
    """Bytes of each GPU."""

    @property
    def needed(self) -> int:
        """Bytes that each GPU must have, with what is assumed for CUDA and for memory that can't be used."""
        most = max(self.stage_1.total, self.loading, self.stage_2)
        return round(most * (1 + FRAGMENTATION)) + CONTEXT_BYTES

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.gpu_memory

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step, without the time of communication."""
        return self.step_flops / (self.tflops * 1e12 * self.efficiency)

    @property
    def seconds(self) -> float | None:
        """Of stage 1, None where the recipe counts epochs."""
        return None if self.job.steps is None else self.job.steps * self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; bytes and seconds."""
        apart = ("config", "lora", "dtype", "autocast")
        job = {name: value for name, value in vars(self.job).items() if name not in apart}
        return {
            "job": job
            | {
                "dtype": str(self.job.dtype).removeprefix("torch."),
                "autocast": None if self.job.autocast is None else str(self.job.autocast).removeprefix("torch."),
                "lora": None if self.job.tuning == "full" else dataclasses.asdict(self.job.lora),
                "rows": self.job.rows,
            },
            "weights": dataclasses.asdict(self.weights),
            "stage_1_bytes": dataclasses.asdict(self.stage_1) | {"total": self.stage_1.total},
            "loading_bytes": self.loading,
            "stage_2_bytes": {"gpu": self.stage_2, "host": self.stage_2_host, "streamed": STREAM_BYTES},
            "disk_bytes": self.disk,
            "needed_bytes": self.needed,
            "gpu_bytes": int(self.gpu_memory),
            "fits": self.fits,
            "step_flops": self.step_flops,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "assumed": {
                "tflops": self.tflops,
                "efficiency": self.efficiency,
                "context_bytes": CONTEXT_BYTES,
                "fragmentation": FRAGMENTATION,
            },
        }


def estimated(
    job: Job,
    *,
    gpu_memory: float = 80 * GIB,
    tflops: float | None = None,
    efficiency: float = EFFICIENCY,
    step: StepTrace | None = None,
) -> Estimate:
    """Estimates a job.

    Args:
        job: What is trained, on how many GPUs.
        gpu_memory: Bytes of each.
        tflops: Of each at its best; those of an H100 in the type of the products if None.
        efficiency: Share of them that is reached.
        step: Of this job, where it was traced before.

    Returns:
        Memory, disk and time.

    Raises:
        ModelError: The architecture can't be built or traced without content.
        RecipeError: The adapter doesn't fit.
    """
    weights, step = weights_of(job), trace_step(job) if step is None else step
    model_bytes = weights.parameters * job.dtype.itemsize
    in_float32 = (job.autocast or job.dtype) == torch.float32
    return Estimate(
        job=job,
        weights=weights,
        step=step,
        stage_1=memory_of(job, weights, step),
        loading=weights.held_bytes + (model_bytes if job.copies_reference else 0),
        stage_2=2 * model_bytes,
        stage_2_host=4 * weights.adapted,
        disk=disk_bytes(
            trained=weights.trainable_bytes,
            state_bytes=job.state_bytes,
            checkpoints=job.checkpoints,
            adapter=job.tuning != "full",
            model=model_bytes,
        ),
        step_flops=step.flops * job.accumulation,
        tflops=(FP32_TFLOPS if in_float32 else BF16_TFLOPS) if tflops is None else tflops,
        efficiency=efficiency,
        gpu_memory=gpu_memory,
    )


def memory_of(job: Job, weights: Weights, step: StepTrace) -> Memory:
    """The memory of stage 1 on each GPU.

    Args:
        job: How it is sharded.
        weights: Of the model.
        step: Of one process.

    Returns:
        The fullest moment. Without accumulation and sharding it is that of the trace, in which gradients and
        activations do not all lie in memory at once.
    """
    sharded = job.sharding != "ddp" and job.gpus > 1
    parts = job.gpus if sharded else 1
    gradients = weights.trainable_bytes
    if not sharded and job.accumulation == 1:
        # Gradients come while activations go.
        gradients = max(0, step.peak_bytes - step.activation_bytes)
    if job.gpus == 1:
        communication = 0
    elif sharded:
        communication = weights.unit_bytes
    else:
        communication = weights.trainable_bytes
    copy = weights.parameters * job.dtype.itemsize if job.copies_reference else 0
    if job.copies_head:
        text = job.config.get_text_config()
        copy = text.vocab_size * text.hidden_size * job.dtype.itemsize
    return Memory(
        weights=-(-weights.held_bytes // parts),
        reference=-(-copy // (parts if job.sharding == "fsdp2" else 1)),
        gradients=-(-gradients // parts),
        optimizer=-(-round(weights.trainable_bytes / 4 * job.state_bytes) // parts),
        activations=step.activation_bytes,
        communication=communication,
        logits=job.rows * job.answer_tokens * job.config.get_text_config().vocab_size * job.dtype.itemsize,
    )


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change of the recipe or the command."""

    change: str
    """As it is written."""
    cost: str
    needed: int
    """Bytes of each GPU with it."""
    fits: bool


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
