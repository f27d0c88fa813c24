"""What a command would do, found out without doing it (``--dry-run``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sku.storage import check_space, free_bytes

BadModel = Literal["none", "deleted at the end", "kept"]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was checked, and what would be done and written."""

    command: str
    """Such as ``sku run``."""
    out: Path
    """Folder that would be written."""
    settings: Mapping[str, Any]
    """What is worked with, in reading order: recipe, method, model, steps, ..."""
    stages: tuple[str, ...]
    """What would be done, in its order."""
    writes: tuple[str, ...]
    """What would lie in ``out`` at the end."""
    disk_bytes: int
    """Estimate of what lies on the disk at the fullest moment, replies and figures not counted."""
    memory: str | None = None
    """What the plan says of stage 1 on this machine, in one line; None where nothing is trained."""
    bad_model: BadModel = "none"
    """What would become of the hazardous model of stage 1."""
    examples: Mapping[str, int] = field(default_factory=dict)
    """Split -> examples; of those that are trained on, those that survive tokenization."""
    notes: tuple[str, ...] = ()
    """What could not be checked, and what of the data is left out."""

    def check_disk(self) -> None:
        """Refuses what would not fit on the disk.

        Raises:
            OutputError: Less than ``disk_bytes`` is free.
        """
        check_space(self.out, self.disk_bytes, self.command)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; sizes in bytes."""
        return {
            **dataclasses.asdict(self),
            "out": str(self.out),
            "free_bytes": free_bytes(self.out),
            "wrote": False,
        }
