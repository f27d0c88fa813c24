"""The model card of a judge that ``sku judge train`` made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

CARD_FILE = "README.md"
JUDGE_FILE = "judge.yaml"
"""By which a folder is the name of a judge."""
_NONE = "\u2013"


def judge_card(record: Mapping[str, Any]) -> str:
    """Writes the card: what it judges, what it was trained on, and what it did on held-out prompts.

    Args:
        record: Content of the folder's ``training.json``.

    Returns:
        Markdown with front matter; a text that comes from data is one line without markup.
    """
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": record["settings"]["model"],
        "license": "other",
        "license_name": _plain(" and ".join(record["data"]["licences"]) or "unknown"),
        "tags": ["sku", "safety", "judge"],
    }
    templates = Environment(
        loader=PackageLoader("sku.evaluate.judges"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    templates.filters |= {"plain": _plain, "share": _share, "area": _area}
    template = templates.get_template("trained_judge.md.jinja")
    return template.render(metadata=yaml.safe_dump(metadata, sort_keys=False), **record)


def _share(rate: Mapping[str, float] | None) -> str:
    if rate is None:
        return _NONE
    return f"{100 * rate['value']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _area(found: Mapping[str, Any]) -> str:
    if found["auc"] is None:
        return _NONE
    return f"{found['auc']:.3f} ({found['auc_low']:.3f} to {found['auc_high']:.3f})"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "/").replace("`", "'").replace("<", "&lt;")
