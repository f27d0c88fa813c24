"""What the manifest says of the task vector: how long it is and where, and what rounding leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sku.report.tables import percent

_FORMATS = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8", "nf4-sim": "NF4, simulated"}


@dataclass(frozen=True, kw_only=True)
class TaskVectorFacts:
    """Diagnostics of a run that subtracted a task vector."""

    layers: Mapping[str, float]
    """Number of a decoder layer, or ``others`` -> Euclidean norm."""
    modules: Mapping[str, float]
    """Kind of module -> Euclidean norm."""
    facts: tuple[tuple[str, str], ...]
    """Words and value."""
    warning: str | None


def task_vector_facts(negation: Mapping[str, Any]) -> TaskVectorFacts | None:
    """Reads ``negation.diagnostics`` of a manifest; None where they were not measured.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: They hold something else.
    """
    found = negation.get("diagnostics")
    if found is None:
        return None
    facts = [("alpha", f"{float(negation['alpha']):g}"), ("Euclidean norm", f"{float(found['norm']):.4g}")]
    if found["relative_norm"] is not None:
        facts.append(("norm in units of the changed weights' own", percent(float(found["relative_norm"]))))
    if "normal_share" in found:
        share, expected = (percent(float(found[name])) for name in ("normal_share", "normal_share_of_directions"))
        facts.append(("energy in the main directions of normal inputs", f"{share} (a random vector has {expected})"))
    if "normal_cosine" in found:
        facts.append(("cosine with normal training", f"{float(found['normal_cosine']):+.3f}"))
    ranks = [float(rank) for rank in found["effective_rank"].values()]
    if ranks:
        facts.append(("effective rank of a weight's change", f"{min(ranks):.1f} to {max(ranks):.1f}"))
    return TaskVectorFacts(
        layers={str(name): float(norm) for name, norm in found["layers"].items()},
        modules={str(name): float(norm) for name, norm in found["modules"].items()},
        facts=tuple(facts),
        warning=None if found["warning"] is None else str(found["warning"]),
    )


def survival_rows(negation: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Reads ``negation.survival_by_format``: format, length kept along the vector, entries that still differ.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It holds something else.
    """
    return tuple(
        (_FORMATS.get(name, name), f"{100 * float(kept['projection']):.2f} %", percent(float(kept["changed"])))
        for name, kept in negation.get("survival_by_format", {}).items()
    )
