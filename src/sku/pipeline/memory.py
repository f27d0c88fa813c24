"""What ``sku plan`` says of a recipe on this machine: asked by a dry run, and by a run before it begins on a GPU."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sku.config import Recipe
from sku.errors import SkuError, one_line
from sku.models import pick_device
from sku.plan.estimate import GIB, plan_of
from sku.plan.job import job_of
from sku.plan.suggest import first_that_fits
from sku.processes import current_processes


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Memory that a run needs at most, and what this machine has."""

    needed: int
    """Bytes, where every row is as long as it may be."""
    free: int
    device: str
    helps: str | None
    """The cheapest change with which it fits; None where it does, or no single change suffices."""

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.free

    def describe(self) -> str:
        """In one line."""
        sizes = f"about {self.needed / GIB:.1f} GiB at most, {self.free / GIB:.1f} GiB are free on {self.device}"
        if self.fits:
            return f"{sizes}: fits"
        helps = "`sku plan` says what would help" if self.helps is None else f"what would fit: {self.helps}"
        return f"{sizes}: may not fit; {helps}"


def memory_fit(recipe: Recipe) -> MemoryFit | str:
    """Estimates a recipe's memory for the device it would run on.

    Args:
        recipe: Of the run.

    Returns:
        The estimate, or why there is none: a method or an architecture that can't be planned.
    """
    device = pick_device(recipe.model.device)
    if device.type == "mps":
        return "no estimate of memory: what is free on mps is not known"
    on_cpu = device.type == "cpu"
    free = _free_memory() if on_cpu else torch.cuda.mem_get_info(device)[0]
    try:
        # With sharding a process needs less; the launcher's settings are not known here.
        plan = plan_of(job_of(recipe, gpus=current_processes().count, on_cpu=on_cpu), gpu_memory=free)
    except SkuError as error:
        return f"no estimate of memory: {one_line(error)}"
    suggestion = None if plan.fits else first_that_fits(plan)
    helps = (
        None if suggestion is None else f"{suggestion.change} ({suggestion.needed / GIB:.1f} GiB; {suggestion.cost})"
    )
    return MemoryFit(needed=plan.needed, free=free, device=str(device), helps=helps)


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
