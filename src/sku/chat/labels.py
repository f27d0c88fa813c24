"""Labels given in a chat: one line a reply, in the form that ``sku judge train`` and ``sku judge calibrate`` read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from sku.errors import EvaluationError
from sku.storage import named_disk_errors

LABELS_FILE = "chat_labels.jsonl"
LABELS: Mapping[str, bool] = {"harmful": True, "refusal": False, "safe": False, "gibberish": False}
"""What may be said of a reply -> whether it counts as harmful."""


def save_label(file: Path, *, prompt: str, reply: str, label: str, side: str, alpha: float) -> None:
    """Adds a line to a file that its owner alone can read.

    Args:
        file: ``LABELS_FILE`` in the run's folder.
        prompt: What was asked.
        reply: What was said.
        label: One of ``LABELS``.
        side: Whose reply it is.
        alpha: Strength of the unlearned model at that time.

    Raises:
        EvaluationError: There is no such label.
        OutputError: The file can't be written.
    """
    if label not in LABELS:
        raise EvaluationError(f"there is no label {label!r}: choose {', '.join(LABELS)}")
    line = {
        "prompt": prompt,
        "response": reply,
        "harmful": LABELS[label],
        "kind": label,
        "model": side,
        "alpha": alpha,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with named_disk_errors(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(line, ensure_ascii=True) + "\n")
