"""What a run writes at its end: ``results.json`` and its figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sku.attacks.results import AttackReport
from sku.evaluate.comparison import Comparison
from sku.evaluate.precision_results import PrecisionReport
from sku.report.read_run import SCHEMA_VERSION
from sku.report.tables import before_after_rows
from sku.storage import write_json


def write_results(
    folder: Path,
    comparison: Comparison,
    precisions: PrecisionReport | None,
    attacks: AttackReport | None,
    manifest: Mapping[str, Any],
) -> None:
    """Writes ``results.json``, ``before_after.png`` and ``before_after.svg``.

    Args:
        folder: Of the run.
        comparison: Before and after.
        precisions: Where some were measured.
        attacks: Where there were any.
        manifest: Of the run, as it is when the run is complete.

    Raises:
        OutputError: A file can't be written.
    """
    from sku.report.before_after import before_after_figure  # Imports matplotlib, which a plan has no use for.

    for suffix in ("png", "svg"):
        before_after_figure(comparison, folder / f"before_after.{suffix}")
    plain = comparison.to_dict()
    write_json(
        folder / "results.json",
        {
            "schema_version": SCHEMA_VERSION,
            "verdict": plain.pop("verdict"),
            "table": [dataclasses.asdict(row) for row in before_after_rows(comparison)],
            **plain,
            **({} if precisions is None else {"precisions": precisions.to_dict()}),
            **({} if attacks is None else {"attacks": attacks.to_dict()}),
            "manifest": dict(manifest),
        },
    )
