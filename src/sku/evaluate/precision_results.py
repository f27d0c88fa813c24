"""What rounding the weights does to an unlearned model, as it stands in ``precisions.json``. No torch here.

Keys of the file:

- ``schema_version``: of this file.
- ``model``: ``name``, ``dtype`` and ``fingerprint`` of the model as it was evaluated; ``base`` the same of the
  original model, which is never rounded.
- ``measured``: the model as it was evaluated, ``Measured``.
- ``results``: one entry a precision, ``PrecisionResult``, in the order asked for.
- ``notes``: sentences that a reader of the numbers needs; those that warn say where a precision brings harm back.

A rate is ``count``, ``total``, ``value``, ``low``, ``high`` (Wilson, 95 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku.config import plain_data
from sku.evaluate.changes import PerplexityChange, RateChange
from sku.evaluate.metrics import Rate
from sku.evaluate.record_files import from_plain, read_json_object, write_json_object

SCHEMA_VERSION = 2
"""Of ``precisions.json``."""
RESULT_FILE = "precisions.json"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a model says and how likely it finds given answers, at one precision."""

    replies: Mapping[str, Mapping[str, Rate]]
    """Split -> rate name -> rate of the free replies."""
    prefill: Mapping[str, Mapping[str, Rate]]
    """The same after a prefill, at the length that is the worst for this model; empty where there are no prefills."""
    perplexity: Mapping[str, PerplexityChange]
    """Split -> from the original model, never rounded, to this one."""
    worst_prefill: Mapping[str, int] = field(default_factory=dict)
    """Split -> tokens of that prefill."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What is left between the two models of the change that unlearning made, once both are rounded."""

    entries: int
    """Weights that unlearning changed and the precision rounds."""
    changed: float
    """Share of these that still differ."""
    projection: float
    """``<applied, wanted> / <wanted, wanted>``: 1 where nothing is lost, 0 where nothing is left."""
    tensors: Mapping[str, float]
    """The projection by weight."""
    not_rounded: int
    """Tensors that unlearning changed and the precision leaves as they are."""


@dataclass(frozen=True, kw_only=True)
class PrecisionResult:
    """The model at one precision."""

    precision: str
    """As in ``evaluate.precisions``."""
    scheme: str
    """What is rounded, and how."""
    rounded_by: str
    """``torch``, ``sku`` or ``bitsandbytes VERSION``."""
    rounded: int
    """Weights that were rounded."""
    moved: int
    """Those of them whose value changed. Where there is none, the model is the one that was evaluated."""
    overflowed: int
    """Weights that the precision can't hold; then nothing was measured."""
    measured: Measured | None
    harmful: Mapping[str, Mapping[str, RateChange]]
    """``replies`` and ``prefill`` -> split -> the harmful rate, from the model as evaluated to the rounded one; after
    a prefill at the length that is the worst for the rounded one."""
    brings_back: tuple[str, ...]
    """Those of them, as ``replies/unseen``, that rose with the whole 95 % interval of the difference above 0."""
    survival: Survival | None
    """None where the two models can't be compared weight by weight."""


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """An unlearned model at several precisions. The fields are the keys listed above."""

    model: Mapping[str, str]
    base: Mapping[str, str]
    measured: Measured
    results: tuple[PrecisionResult, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"schema_version": SCHEMA_VERSION, **plain_data(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = RESULT_FILE) -> PrecisionReport:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Another schema version, or keys that don't fit it.
        """
        return from_plain(cls, content, where, version=SCHEMA_VERSION)

    def certificate(self) -> dict[str, Any]:
        """The figures in short, for a manifest: by precision the rates, perplexities, change kept and what returns."""
        return {result.precision: _in_short(result) for result in self.results}


def write_precisions(folder: Path, report: PrecisionReport) -> None:
    """Writes ``precisions.json``.

    Raises:
        OutputError: The folder can't be written.
    """
    write_json_object(folder / RESULT_FILE, report.to_dict())


def read_precisions(folder: Path) -> PrecisionReport:
    """Reads ``precisions.json``.

    Raises:
        EvaluationError: The file is missing or broken.
    """
    path = folder / RESULT_FILE
    return PrecisionReport.from_dict(read_json_object(path, "evaluate again"), str(path))


def _in_short(result: PrecisionResult) -> dict[str, Any]:
    measured = result.measured
    kinds = {} if measured is None else {"replies": measured.replies, "prefill": measured.prefill}
    perplexity = {} if measured is None else measured.perplexity
    return {
        "scheme": result.scheme,
        "rounded_by": result.rounded_by,
        "overflowed": result.overflowed,
        "harmful": {
            kind: {split: rates["harmful"].value for split, rates in splits.items() if "harmful" in rates}
            for kind, splits in kinds.items()
        },
        "gibberish": {split: rates["gibberish"].value for split, rates in kinds.get("replies", {}).items()},
        "perplexity_ratio": {split: change.ratio for split, change in perplexity.items()},
        "change_kept": None if result.survival is None else result.survival.projection,
        "brings_back": list(result.brings_back),
    }
