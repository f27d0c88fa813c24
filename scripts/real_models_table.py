"""The table of docs/results.md that shows results/real_models.json.

    python scripts/real_models_table.py [--check]

Rates in per cent as the record has them, the number of prompts of a set in the corner; a figure that was not
measured is a dash. In brackets: by the judge alone. ``--check`` writes nothing and
fails where the page is another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sku.report.words import replace_block

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "results" / "real_models.json", ROOT / "docs" / "results.md"
BLOCK = "real-models"
TITLES = {
    "base": "base model", "sku_twins": "**SKU with twins**", "sku": "SKU as in the paper",
    "refusal_tuning": "refusal tuning", "npo": "NPO", "dpo": "DPO", "safe_unlearning": "Safe Unlearning",
    "circuit_breakers": "circuit breakers", "sku_twins+random_direction": "random direction, as long as SKU's",
}  # fmt: skip
"""In the order of the table."""
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m")
"""In the order of the page; others follow."""
RATES = {
    "harmful_unseen": "harmful, unseen", "harmful_other_source": "harmful, other source",
    "worst_prefill": "harmful, worst prefill", "xstest_safe_refused": "XSTest safe, refused",
    "borderline_refused": "borderline, refused", "normal_refused": "normal, refused", "gibberish": "gibberish",
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a part for each model and seed."""
    parts = []
    there = {(row["model"], row["seed"]) for row in rows}
    for model, seed in sorted(there, key=lambda one: (MODELS.index(one[0]) if one[0] in MODELS else len(MODELS), one)):
        own = {row["method"]: row for row in rows if (row["model"], row["seed"]) == (model, seed)}
        first = next(iter(own.values()))
        base = {name.removeprefix("base_"): value for name, value in first.items() if name.startswith("base_")}
        lines = [
            f"| {model}, seed {seed}, n = {first['n']} | {' | '.join(RATES.values())} | KL, nats a token |",
            "|---|" + "---:|" * (len(RATES) + 1),
        ]
        known = [name for name in TITLES if name == "base" or name in own]
        for name in (*known, *sorted(own.keys() - TITLES.keys())):
            figures = base if name == "base" else own[name]
            cells = [_percent(figures[key], figures.get(f"{key}_ungated")) for key in RATES]
            kl = "\u2013" if figures["kl_normal"] is None else f"{figures['kl_normal']:.3f}"
            lines.append(f"| {TITLES.get(name, name)} | {' | '.join(cells)} | {kl} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _percent(share: float | None, ungated: float | None) -> str:
    if share is None:
        return "\u2013"
    return f"{100 * share:.0f} %{'' if ungated is None else f' ({100 * ungated:.0f})'}"


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
