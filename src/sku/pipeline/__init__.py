"""One file a command: it plans (all checks, what is done and written), and the plan is executed or printed.

The only part that knows all stages. A run folder, private to its owner because the base model's harmful replies lie
in it::

    manifest.json        recipe, seeds, data hashes, versions, hardware, timings, what became of the bad model
    training_log.jsonl   every loss term of every logged step
    bad/                 checkpoints of the bad model; deleted at the end unless it is kept on purpose
    trained/             in its place for methods that train no bad model; always deleted at the end
    own/                 the model's own replies that it was trained on, where the recipe wants them (data.own_replies)
    unlearned/           the model to use, with its tokenizer and model card
    negated_adapter/     the same without merging, for LoRA and QLoRA; adapter/ for methods that don't negate
    sweep/               sweep.json and frontier.png, .svg: the choice of alpha where negate.alpha is auto
    evaluation/base/, evaluation/unlearned/
    evaluation/attacks.json, evaluation/attacks/   where evaluate.attacks names some
    results.json         before and after, with intervals; the attacks too, where there are any
    before_after.png, before_after.svg

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
    execute: Callable[[Progress | None], T]
    """Does it."""
    disk_bytes: int = 0
    """Estimate of what lies on the disk at the fullest moment, replies and figures not counted."""
    disk_there: int = 0
    """Bytes of it that an interrupted call has written already."""
    memory: Callable[[], tuple[bool, str]] | None = None
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
        memory = None if self.memory is None else self.memory()[1]
        return {**told, "out": str(self.out), "memory": memory, "free_bytes": free_bytes(self.out), "wrote": False}
