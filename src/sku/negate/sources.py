"""Where the files of a model lie, without loading it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sku.config import EMBEDDED
from sku.errors import ModelError, one_line

_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*")


def model_folder(source: str) -> Path:
    """The folder of a model; one of the hub is fetched, without weights in other formats.

    Args:
        source: Local folder, hub id or ``embedded``, as ``sku.load_model`` takes it.

    Returns:
        A folder, which need not exist where a local one was named.

    Raises:
        ModelError: The hub can't be reached or has no such model.
    """
    if source == EMBEDDED:
        return Path(str(resources.files("sku") / "world" / "model"))
    folder = Path(source).expanduser()
    # A hub id never begins like this: what is missing here must not be asked of the hub.
    if folder.exists() or source.startswith(("/", ".", "~")):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = one_line(error)
        raise ModelError(f"model {source} can't be loaded: {reason}") from error
