"""A model's files: where they are, whether they may be read, and what goes wrong when they are."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sku.config.data import EMBEDDED, ModelConfig
from sku.errors import ModelError, SkuError, first_line

_GGUF = ".gguf"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
INDEX_FILE = "model.safetensors.index.json"
_SECONDS = 4.0
"""That one request to the hub may take: its own clients try five times, most of a minute."""
_CONVERT_MODEL = "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"

_log = logging.getLogger(__name__)


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
        ModelError: A local folder holds nothing that can be loaded, or pickled weights only; or a hub model is
            neither on this machine nor within reach.
    """
    folder = embedded_model_path() if config.path == EMBEDDED else Path(config.path).expanduser()
    is_local = config.path == EMBEDDED or is_path(config.path)
    config = with_gguf_file(config)
    if is_local:
        _check_folder(folder, config.gguf_file)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    if config.gguf_file is not None:
        if find_spec("gguf") is None:
            raise ModelError(
                f'model {config.path}: a GGUF file needs the package gguf: pip install "sku-unlearning[gguf]"'
            )
        options["gguf_file"] = config.gguf_file
    why = None if is_local else out_of_reach()
    if why is not None:
        if not is_cached(config.path, config.gguf_file or "config.json", config.revision):
            raise ModelError(
                f"model {config.path} can't be loaded: there is no such folder (looked in {Path.cwd()}), this machine "
                f"holds no copy of a hub model of that name, and {why}"
            )
        options["local_files_only"] = True
    return str(folder) if is_local else config.path, options


def with_gguf_file(config: ModelConfig) -> ModelConfig:
    """The same model with the one GGUF file of its folder named; said once, as it decides what is loaded.

    Args:
        config: Of a model.

    Returns:
        As it came where a file is named already, or the folder holds safetensors or no GGUF file, or is none.

    Raises:
        ModelError: The folder holds several GGUF files and no safetensors, so that one must be named.
    """
    folder = Path(config.path).expanduser()
    if config.gguf_file is not None or config.path == EMBEDDED or not folder.is_dir():
        return config
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"model {folder} can't be read: {error.strerror}") from None
    found = [name for name in names if name.endswith(_GGUF)]
    if not found or any(name.endswith(".safetensors") for name in names):
        return config
    if len(found) > 1:
        raise ModelError(
            f"model {folder} holds {len(found)} GGUF files ({', '.join(found)}): name one, such as "
            f"model.gguf_file={found[0]}"
        )
    _log.warning("model %s holds one GGUF file and no safetensors: %s is taken (gguf_file)", folder, found[0])
    return dataclasses.replace(config, gguf_file=found[0])


def is_path(name: str) -> bool:
    """Whether a model's name means a folder of this machine: what is missing there must not be asked of the hub.

    A hub id is a name, or an owner and a name: it never begins like a path, has no second slash, and no folder here
    is its owner.
    """
    path = Path(name).expanduser()
    return (
        path.exists()
        or name.startswith(("/", ".", "~"))
        or name.rstrip("/").count("/") > 1
        or (path.parent != Path() and path.parent.is_dir())
    )


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if not folder.exists():
        raise ModelError(f"model {folder} can't be loaded: there is no such folder (looked in {Path.cwd()})")
    if not folder.is_dir():
        raise ModelError(f"model {folder} is a file; give the folder, and the file's name as model.gguf_file for GGUF")
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"model {folder} holds no file {gguf_file} (model.gguf_file)")
    elif not (folder / "config.json").is_file():
        raise ModelError(f"model {folder} holds no config.json: it is no Hugging Face model folder")
    elif (folder / INDEX_FILE).is_file():
        shards(folder / INDEX_FILE)
    elif not any(folder.glob("model*.safetensors")):
        check_no_pickles(folder)


def shards(index: Path) -> dict[str, str]:
    """Which file of a folder holds each weight, by the index of its shards.

    Args:
        index: The file.

    Returns:
        Name of a weight -> name of a file, which lies in the same folder: transformers takes any path.

    Raises:
        ModelError: It is no index, or names other files.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        place, about = content["weight_map"], content.get("metadata", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of shards; fetch it again") from error
    if not (isinstance(place, dict) and isinstance(about, dict)) or not all(map(_is_weight_file, place.values())):
        raise ModelError(f"{index} names shards that are no safetensors files of this folder; fetch it again")
    return place


def _is_weight_file(name: object) -> bool:
    """Whether it is the name of a weight file in a folder, and leads nowhere else."""
    if not isinstance(name, str) or "\0" in name or "\\" in name:
        return False
    return Path(name).name == name and name.endswith(".safetensors")


def check_not_quantized(config: Any, name: str) -> None:
    """Refuses a model whose configuration says that its weights are quantized.

    Args:
        config: Of the model, or what its ``config.json`` holds.
        name: Of the model, for the message.

    Raises:
        ModelError: It does.
    """
    key = "quantization_config"
    settings = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    if settings is not None:
        key = "quant_method"
        method = settings.get(key) if isinstance(settings, dict) else getattr(settings, key, settings)
        raise ModelError(
            f"model {name} is quantized ({method}): a task vector needs full-precision weights. Use the original "
            "model, or QLoRA (tuning qlora) on it"
        )


def check_stored_types(folder: Path) -> None:
    """Refuses quantized weights that the configuration doesn't name: transformers would take their codes for values.

    Args:
        folder: Local folder, or none, where a model of the hub is meant; only the headers of its files are read.

    Raises:
        ModelError: With the first weight that is stored in integers or in one byte.
        SafetensorError: A file is damaged.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(name).get_dtype()
                if name.endswith("weight") and dtype not in _PLAIN_TYPES:
                    raise ModelError(
                        f"model {folder} is quantized: {name} is stored as {dtype}. A task vector needs "
                        "full-precision weights. Use the original model"
                    )


def check_no_pickles(folder: Path, stem: str = "*model", convert: str = _CONVERT_MODEL) -> None:
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
    except SkuError:
        raise
    except ImportError as error:
        raise ModelError(f"model {path} needs a package that is missing: {first_line(error)}") from error
    except Exception as error:
        # Of every kind: tokenizers raises Exception itself, and a configuration of odd types whatever comes of it.
        if "cannot be loaded with `safetensors`" in str(error):
            raise ModelError(_pickled(f"model {path}", _CONVERT_MODEL)) from error
        raise ModelError(f"model {path} can't be loaded: {first_line(error)}") from error


@functools.cache
def out_of_reach() -> str | None:
    """Why the hub can't be asked, for a message; None where it can, as far as one request tells."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # noqa: BLE001 - of httpx or httpx2, as the hub's client has it
        return f"the hub can't be reached: {first_line(error)}"
    return None


def is_cached(repository: str, file: str, revision: str | None) -> bool:
    """Whether a file of a hub model is in the cache of this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(repository, file, revision=revision), str)
    except HFValidationError:
        return False
