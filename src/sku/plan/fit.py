"""Whether a run fits the memory of this machine, and whether activations are computed twice so that it does.

``acquire.training.activation_checkpointing: auto`` is off where stage 1 fits without it, else on, and on where there
is no estimate. It changes time and memory, no number; a run keeps what it began with all the same.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sku.config.recipe import Recipe
from sku.errors import SkuError, one_line
from sku.models import pick_device
from sku.plan import MemoryFit
from sku.plan.estimate import GIB, Estimate, estimated, first_that_fits
from sku.plan.job import Job, job_of
from sku.processes import current_processes

_KEY = "activation_checkpointing"


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """What ``activation_checkpointing: auto`` comes to."""

    on: bool
    why: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{'on' if self.on else 'off'}: {self.why}"


def leaves_open(recipe: Recipe) -> bool:
    """Whether a recipe's ``acquire.training.activation_checkpointing`` is ``auto``."""
    return recipe.acquire.training.get(_KEY) == "auto"


def with_checkpointing(recipe: Recipe, decided: Checkpointing | None) -> Recipe:
    """The recipe with what was decided; as it is where nothing was to decide."""
    if decided is None:
        return recipe
    training = {**recipe.acquire.training, _KEY: decided.on}
    return dataclasses.replace(recipe, acquire=dataclasses.replace(recipe.acquire, training=training))


def decided_job(job: Job, recipe: Recipe, gpu_memory: float) -> Job:
    """A recipe's job with activation checkpointing only where it is needed, if the recipe leaves that open.

    Args:
        job: Of the recipe.
        recipe: Says whether it is open.
        gpu_memory: Bytes of each GPU.

    Raises:
        SkuError: As ``estimated``.
    """
    if not leaves_open(recipe):
        return job
    without = dataclasses.replace(job, checkpointing=False)
    return without if estimated(without, gpu_memory=gpu_memory).fits else dataclasses.replace(job, checkpointing=True)


def decide_checkpointing(recipe: Recipe) -> Checkpointing | None:
    """Decides by the estimate for the device that the recipe would run on, every row as long as it may be.

    Args:
        recipe: What is trained.

    Returns:
        The decision; None where the recipe leaves nothing open.
    """
    if not leaves_open(recipe):
        return None
    found = _estimate(with_checkpointing(recipe, Checkpointing(on=False, why="")))
    if isinstance(found, str):
        return Checkpointing(on=True, why=found)
    plan, sizes = found
    return Checkpointing(on=not plan.fits, why=f"without it stage 1 takes {sizes}")


def told_checkpointing(decided: Checkpointing | None) -> dict[str, str]:
    """The line of a plan that says what was decided; none where nothing was."""
    return {} if decided is None else {"activation checkpointing": decided.line}


def memory_fit(recipe: Recipe) -> MemoryFit:
    """Estimates a recipe's memory for the device it would run on, every row as long as it may be."""
    found = _estimate(recipe)
    if isinstance(found, str):
        return MemoryFit(fits=False, text=found)
    plan, sizes = found
    if plan.fits:
        return MemoryFit(fits=True, text=f"{sizes}: fits")
    better = first_that_fits(plan)
    helps = "`sku plan` says what would help"
    if better is not None:
        helps = f"what would fit: {better.change} ({better.needed / GIB:.1f} GiB; {better.cost})"
    return MemoryFit(fits=False, text=f"{sizes}: may not fit; {helps}")


def _estimate(recipe: Recipe) -> tuple[Estimate, str] | str:
    """The estimate with its sizes in words, or why there is none."""
    device = pick_device(recipe.model.device)
    if device.type == "mps":
        return "no estimate of memory: what is free on mps is not known"
    on_cpu = device.type == "cpu"
    free = _free_memory() if on_cpu else torch.cuda.mem_get_info(device)[0]
    try:
        # With sharding a process needs less; the launcher's settings are not known here.
        plan = estimated(job_of(recipe, gpus=current_processes().count, on_cpu=on_cpu), gpu_memory=free)
    except SkuError as error:
        return f"no estimate of memory: {one_line(error)}"
    return plan, f"about {plan.needed / GIB:.1f} GiB at most, {free / GIB:.1f} GiB are free on {device}"


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
