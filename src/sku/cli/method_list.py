"""The methods of the package as ``listed.json`` has them: ``sku.methods`` itself loads torch, which takes seconds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sku.methods.base import AnyMethod


def listed_methods() -> list[dict[str, Any]]:
    """Name, title, paper, whether it negates, and settings with their defaults of each method, in its order."""
    text = (resources.files("sku") / "methods" / "listed.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert isinstance(found, list)
    return found


def described(methods: Iterable[AnyMethod]) -> list[dict[str, Any]]:
    """The same of methods themselves: ``scripts/method_list.py`` writes it, and a test compares."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper_url,
            "negates": method.negates,
            # Those of SKU are acquire and negate of the recipe.
            "settings": {} if method.name == "sku" else dataclasses.asdict(method.settings()),
        }
        for method in methods
    ]
