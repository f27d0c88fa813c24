"""What a command will do and need, found out before it is done: ``--dry-run`` prints it, the command executes it.

Nothing here imports torch: ``sku negate`` from file to file needs neither its time nor its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from sku.storage import check_space, free_bytes

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
BadModel = Literal["none", "deleted at the end", "kept"]


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Whether stage 1 fits this machine's memory."""

    fits: bool
    """False where there is no estimate."""
    text: str
    """In one line."""


@dataclass(frozen=True, kw_only=True)
class CommandPlan(Generic[T]):
    """What was checked, and what will be done and written; what would not fit on the disk is no plan.

    Raises:
        OutputError: Less than ``disk_bytes`` is free.
    """

    command: str
    """Such as ``sku run``."""
    out: Path
    """Folder that is written."""
    settings: Mapping[str, Any]
    """What is worked with, in reading order: recipe, method, model, steps, ..."""
    stages: tuple[str, ...]
    """What is done, in its order."""
    writes: tuple[str, ...]
    """What lies in ``out`` at the end."""
    execute: Callable[[Progress | None], T]
    """Does it."""
    disk_bytes: int = 0
    """Estimate of what lies on the disk at the fullest moment, replies and figures not counted."""
    disk_there: int = 0
    """Bytes of it that an interrupted call has written already."""
    memory: Callable[[], MemoryFit] | None = None
    """Estimates stage 1 on this machine; None where nothing is trained."""
    bad_model: BadModel = "none"
    """What becomes of the hazardous model of stage 1."""
    examples: Mapping[str, int] = field(default_factory=dict)
    """Split -> examples; of those that are trained on, those that survive tokenization."""
    notes: tuple[str, ...] = ()
    """What could not be checked, and what of the data is left out."""

    def __post_init__(self) -> None:
        check_space(self.out, self.disk_bytes - self.disk_there, self.command)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; sizes in bytes."""
        told = {name: value for name, value in vars(self).items() if name not in ("execute", "disk_there")}
        memory = None if self.memory is None else self.memory().text
        return {**told, "out": str(self.out), "memory": memory, "free_bytes": free_bytes(self.out), "wrote": False}
