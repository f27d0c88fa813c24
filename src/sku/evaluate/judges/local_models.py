"""What judges that are local models share: their settings, which weights they have, and errors that name the judge.

Configuration and tokenizer are read when a judge is built, so that a missing model is told before any reply is
generated. The weights are read when it judges for the first time: until then the memory is the evaluated model's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku.config import ModelConfig, plain_data
from sku.errors import ModelError, RecipeError
from sku.evaluate.judges.base import JudgeCard, Verdict
from sku.evaluate.judges.conversations import Encoded, Unreadable
from sku.evaluate.records import GenerationRecord
from sku.models import pick_device, pick_dtype, weights_revision

VERSION = 1
"""Raised whenever this code would read the same reply differently under the same settings."""
_NO_PART_OF_THE_VERDICT = (
    "model", "revision", "dtype", "device", "batch_size", "trust_remote_code", "name", "licence", "known_errors",
    "needs", "url", "paper", "calibration",
)  # fmt: skip
"""Settings that leave a verdict as it is, or that the card's ``revision`` or the type in use stand for."""

_CUT = "read only the first"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalModelSettings:
    """What a judge file of any local model holds."""

    model: str
    """Local folder or hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are held in. ``auto``: bfloat16 on a GPU, float32 on a CPU; ``stored``: that of the files."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    batch_size: int = 16
    """Replies at once; halved where a GPU's memory runs out."""
    max_length: int = 2048
    """Most tokens the model reads; what is too long loses the end of the reply, never prompt or instructions."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    with_forced_start: bool = True
    """Whether a forced start is read with the words that follow it, which say little alone. Off: only what the model
    said of its own is judged."""
    threshold: float = 0.5
    """Lowest probability of harm that is called harmful."""
    markers: tuple[str, ...] = ()
    """Plain text that ends a turn in the model's format, such as ``[/INST]``; its special tokens are known anyway."""
    name: str | None = None
    """Name on the card; that of the file where this is empty."""
    licence: str = "unknown"
    """Of the weights."""
    known_errors: str = "unknown: run sku judge calibrate"
    """What has been measured, or what is known in words."""
    needs: str = ""
    """What a machine must have: memory, and whether a licence must be accepted first. For people."""
    url: str | None = None
    """Model card."""
    paper: str | None = None
    """Where the model is described."""
    calibration: str | None = None
    """File of ``sku judge calibrate``; ``build_judge`` puts it on the card."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "max_length"):
            if getattr(self, key) < 1:
                raise RecipeError(f"{key} is {getattr(self, key)}; it must be 1 or more")
        if not 0 < self.threshold < 1:
            raise RecipeError(f"threshold is {self.threshold}; it must lie between 0 and 1")

    @property
    def source(self) -> ModelConfig:
        """Where the model is and how it is held."""
        return ModelConfig(
            path=self.model,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


def make_card(settings: LocalModelSettings, name: str, **traits: Any) -> JudgeCard:
    """The card of a judge with weights.

    Args:
        settings: Of the judge.
        name: Of the judge's file.
        traits: Fields that the kind decides.

    Returns:
        A card whose key changes with the weights and with every setting that can change a verdict.

    Raises:
        ModelError: The model can't be found.
    """
    return JudgeCard(
        name=settings.name or _name_of(name),
        version=_version(settings),
        licence=settings.licence,
        known_errors=settings.known_errors,
        finds_faults=False,
        offline=True,
        deterministic=True,
        revision=weights_revision(settings.source),
        **traits,
    )


def _name_of(file: str) -> str:
    """A packaged judge's own name, which may hold a dot, or a user's file without folder and ending."""
    path = Path(file)
    return path.stem if path.suffix in {".yaml", ".yml"} else file


def _version(settings: LocalModelSettings) -> str:
    deciding = {key: value for key, value in plain_data(settings).items() if key not in _NO_PART_OF_THE_VERDICT}
    held = (
        settings.dtype if settings.dtype == "stored" else str(pick_dtype(settings.dtype, pick_device(settings.device)))
    )
    content = json.dumps({"code": VERSION, "dtype": held, **deciding}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Says which judge's model is missing or broken, and how to give another.

    Raises:
        ModelError: In place of the one that the block raised.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"judge {name}: {str(error).rstrip('.')}. Give a local folder with evaluate.judge_settings.model=FOLDER"
        ) from None


def judged_text(record: GenerationRecord, settings: LocalModelSettings) -> str:
    """What of a record counts as the reply."""
    return record.whole_reply if settings.with_forced_start else record.reply


def fields_read(settings: LocalModelSettings, *, prompt: bool) -> tuple[str, ...]:
    """Fields of a record that a judge with these settings reads."""
    return (*(["prompt"] if prompt else []), "reply", *(["forced_start"] if settings.with_forced_start else []))


def tell_cuts(verdicts: Sequence[Verdict], name: str, max_length: int) -> None:
    """Logs how many replies were not read to their end."""
    cut = sum(verdict.reason.startswith(_CUT) for verdict in verdicts)
    if cut:
        _log.warning(
            "judge %s read only the beginning of %d of %d replies: more than %d tokens don't fit",
            name, cut, len(verdicts), max_length,
        )  # fmt: skip


def cut_reason(rows: Sequence[Encoded | Unreadable]) -> str:
    """The reason of a verdict on a reply that was not read to its end, empty on any other.

    Args:
        rows: The reply as it was encoded for each question about it.
    """
    cut = [row for row in rows if isinstance(row, Encoded) and row.kept < row.length]
    if not cut:
        return ""
    shortest = min(cut, key=lambda row: row.kept)
    return f"{_CUT} {shortest.kept} of {shortest.length} characters"
