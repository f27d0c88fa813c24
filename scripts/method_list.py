"""Writes ``src/sku/methods/listed.json``, from which ``sku init`` and the shell's completion read.

Run after a change of a method's name, title, paper or settings: python scripts/method_list.py
"""

from __future__ import annotations

import json
from pathlib import Path

import sku.methods
from sku.cli.init import described

if __name__ == "__main__":
    path = Path(sku.methods.__file__).parent / "listed.json"
    path.write_text(json.dumps(described(sku.methods.METHODS), indent=1) + "\n", encoding="utf-8")
