"""The file of a model card, and what its front matter says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from sku.errors import OutputError

CARD_FILE = "README.md"
TAG = "sku"
"""Among the tags of every card that SKU writes."""


def read_card(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's card.

    Args:
        folder: Of a model or adapter.

    Returns:
        Keys and values.

    Raises:
        OutputError: There is none, or it is not one of a model.
    """
    path = folder / CARD_FILE
    try:
        card = ModelCard.load(path, ignore_metadata_errors=False)
        metadata = card.data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OutputError(f"{folder} has no model card that can be read ({error}): write it with sku card") from error
    assert isinstance(metadata, dict)
    return metadata
