"""A model's files: where they are, whether they may be read, and what goes wrong when they are."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from sku.config import EMBEDDED, ModelConfig
from sku.errors import ModelError, first_line

_QUANTIZED_FILES = (".gguf", ".gptq", ".awq")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CONVERT_MODEL = "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
LOADING_ERRORS = (
    OSError, ValueError, KeyError, IndexError, RuntimeError, HfHubHTTPError, HFValidationError,
    SafetensorError, struct.error,
)  # fmt: skip
"""What loaders raise for files that are missing, cut off or of another kind."""


def embedded_model_path() -> Path:
    """Folder of the model that ships inside the package."""
    return Path(str(resources.files("sku") / "world" / "model"))


def locate_model(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for: a checked local folder or a hub id, and the options that go with it.

    Args:
        config: Of the model.

    Returns:
        Name, and the options of ``from_pretrained``.

    Raises:
        ModelError: A local folder holds nothing that can be loaded, or pickled weights only.
    """
    folder = embedded_model_path() if config.path == EMBEDDED else Path(config.path).expanduser()
    # A hub id never begins like this: what is missing here must not be asked of the hub.
    is_local = folder.exists() or config.path == EMBEDDED or config.path.startswith(("/", ".", "~"))
    if is_local:
        _check_folder(folder, config.gguf_file)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.gguf_file is not None:
        if find_spec("gguf") is None:
            raise ModelError(
                f'model {config.path}: a GGUF file needs the package gguf: pip install "sku-unlearning[gguf]"'
            )
        options["gguf_file"] = config.gguf_file
    return str(folder) if is_local else config.path, options


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if not folder.exists():
        raise ModelError(f"model {folder} can't be loaded: there is no such folder")
    if not folder.is_dir():
        raise ModelError(f"model {folder} is a file; give the folder, and the file's name as model.gguf_file for GGUF")
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"model {folder} holds no file {gguf_file} (model.gguf_file)")
    elif not (folder / "config.json").is_file():
        quantized = sorted(path.name for path in folder.iterdir() if path.suffix in _QUANTIZED_FILES)
        if quantized:
            raise ModelError(
                f"model {folder} holds only quantized files; name one to dequantize it: model.gguf_file={quantized[0]}"
            )
        raise ModelError(f"model {folder} holds no config.json: it is no Hugging Face model folder")
    elif not any(folder.glob("model*.safetensors")):
        check_no_pickles(folder, "*model", _CONVERT_MODEL)


def check_no_pickles(folder: Path, stem: str, convert: str) -> None:
    """Refuses a folder whose weights are pickled only: reading a pickle can run code that somebody put into it.

    Args:
        folder: Local folder.
        stem: How its weight files begin, such as ``adapter_model``.
        convert: The code that converts them, for the message.

    Raises:
        ModelError: With the first such file.
    """
    pickled = sorted(path.name for path in folder.glob(f"{stem}*") if path.suffix in PICKLED_SUFFIXES)
    if pickled and not any(folder.glob(f"{stem}*.safetensors")):
        raise ModelError(_pickled(f"{folder}", convert, pickled[0]))


def _pickled(what: str, convert: str, file: str = "") -> str:
    named = f" ({file})" if file else ""
    return (
        f"{what} holds pickled weights{named}, which can run code when they are read; SKU reads safetensors only. "
        f"If you trust their source, convert them: {convert}"
    )


@contextmanager
def naming_the_model(path: str) -> Iterator[None]:
    """Turns what loaders raise into one line that names the model.

    Args:
        path: Of the model, for the message.

    Yields:
        Nothing.

    Raises:
        ModelError: In place of what was raised inside.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Loaders of single architectures warn of their own internals.
            yield
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"model {path} needs a package that is missing: {first_line(error)}") from error
    except LOADING_ERRORS as error:
        if "cannot be loaded with `safetensors`" in str(error):
            raise ModelError(_pickled(f"model {path}", _CONVERT_MODEL)) from error
        raise ModelError(f"model {path} can't be loaded: {first_line(error)}") from error
