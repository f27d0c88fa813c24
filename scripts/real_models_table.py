"""The tables of docs/results.md that show results/real_models.json.

    python scripts/real_models_table.py [--check]

Rates in per cent. Of a harmful rate the judge's own word stands first and the rules' count behind it in brackets; a
figure that was not measured is a dash. ``--check`` writes nothing and fails where the page is another. Rows of a model
and seed whose bases differ were asked other prompts, or judged by another judge: the script stops.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sku.report.real_models import FIGURES
from sku.report.words import replace_block

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "results" / "real_models.json", ROOT / "docs" / "results.md"
BLOCK = "real-models"
NOTHING = "No model has been measured by the present rules yet."
NONE = "\u2013"
COLUMNS = {
    "harmful_final": "harmful, final", "harmful_unseen": "harmful, unseen", "worst_prefill": "worst prefill",
    "xstest_unsafe": "XSTest unsafe", "sampled_any4": "any of 4", "worst_template": "worst template",
    "benign_final_refused": "final benign, refused", "xstest_safe_refused": "XSTest safe, refused",
    "borderline_refused": "borderline, refused", "normal_refused": "normal, refused", "gibberish": "gibberish",
}  # fmt: skip
"""Rates; the others of the table are no rates."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a part for each model and seed.

    Raises:
        SystemExit: Bases differ.
    """
    parts = []
    for model, seed in sorted({(row["model"], row["seed"]) for row in rows}):
        own = [row for row in rows if (row["model"], row["seed"]) == (model, seed)]
        base = {name: own[0][f"base_{name}"] for name in FIGURES}
        for row in own:
            other = [name for name in FIGURES if row[f"base_{name}"] != base[name]]
            if other:
                raise SystemExit(
                    f"{model}, seed {seed}: the base of {row['method']} differs from that of {own[0]['method']} in "
                    f"{', '.join(other)}: evaluate both on the same prompts, with the same judge and base evaluation"
                )
        names = [f"{model}, seed {seed}, n = {base['n']}", *COLUMNS.values(), "KL", "perplexity", "relearning"]
        lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(COLUMNS) + 3), _line("base model", base)]
        lines += [_line(row["method"], row) for row in sorted(own, key=lambda row: str(row["method"]))]
        parts.append("\n".join([*lines, "", *(f"- {row['method']}: {row['verdict']}" for row in own)]))
    return "\n\n".join(parts) or NOTHING


def _line(name: str, row: dict[str, Any]) -> str:
    cells = [_rate(row[key], row.get(f"{key}_judge")) for key in COLUMNS]
    kl, ratio, steps = row["kl_normal"], row["perplexity_ratio"], row["relearn_half_steps"]
    cells += [NONE if kl is None else f"{kl:.3f}", NONE if ratio is None else f"\u00d7{ratio:.2f}"]
    return f"| {name} | {' | '.join([*cells, NONE if steps is None else f'{steps} steps'])} |"


def _rate(share: float | None, judge: float | None) -> str:
    if share is None:
        return NONE
    return f"{100 * share:.0f} %" if judge is None else f"{100 * judge:.0f} % ({100 * share:.0f})"


def main() -> int:
    """Writes the page, or compares."""
    page = PAGE.read_text(encoding="utf-8")
    made = replace_block(page, BLOCK, table(json.loads(RECORD.read_text(encoding="utf-8"))), str(PAGE))
    if "--check" in sys.argv:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
