"""A bad model that was kept: a sweep with it, and what it was trained on, so that alpha is not chosen by the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sku.config import Recipe
from sku.data.examples import ForgetRetainData, content_hash
from sku.errors import ModelError, OutputError
from sku.evaluate.batching import StageProgress
from sku.methods.run import resolve_method, with_safe_dtype
from sku.models import load_model
from sku.negate.run import task_vector_of, transformed
from sku.storage import mark_hazardous, write_json
from sku.sweep.result import Sweep
from sku.sweep.run import sweep

TRAINING_FILE = "sku_training.json"
_DECIDES_TRAINING = ("model", "data", "acquire", "seed")
UNKNOWN_TRAINING = (
    "what the bad model was trained on is not recorded beside it: where it saw prompts of forget_validation, their "
    "harm is easier to remove than that of others"
)
TRAINED_ON = (
    "the bad model was trained with other splits than these, which held out no forget_validation or another one: "
    "prompts of it may have been trained on, and their harm is easier to remove than that of others"
)


def record_training(folder: Path, recipe: Recipe, data: ForgetRetainData) -> None:
    """Marks the folder of a bad model, before there is one to find, and writes what it is trained on.

    That is the recipe, and a hash in place of prompts.

    Raises:
        OutputError: The file can't be written.
    """
    mark_hazardous(folder)
    content = {"recipe": recipe.to_dict(), "unlearned_sha256": content_hash(data.forget_train)}
    write_json(folder / TRAINING_FILE, content)


def read_training(folder: Path) -> Mapping[str, Any] | None:
    """What ``record_training`` wrote; None where there is none.

    Raises:
        ModelError: The file is damaged.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["recipe"], dict) or not isinstance(content["unlearned_sha256"], str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{path} is damaged: remove it and name the recipe of the bad model") from None
    found: Mapping[str, Any] = content
    return found


def check_same_training(folder: Path, recipe: Recipe) -> None:
    """Refuses the bad model of another recipe, where a sweep goes on in its folder.

    Raises:
        ModelError: As ``read_training``.
        OutputError: It was trained with another model, data, seed or settings of stage 1.
    """
    recorded, now = read_training(folder), json.loads(json.dumps(recipe.to_dict()))
    before = {} if recorded is None else recorded["recipe"]
    shares = before.get("negate", {}).get("twin")
    if any(before.get(name) != now[name] for name in _DECIDES_TRAINING) or shares != now["negate"]["twin"]:
        raise OutputError(f"{folder} holds the bad model of another recipe; choose another --out")


def training_notes(folder: Path, data: ForgetRetainData) -> list[str]:
    """A sentence where prompts of ``forget_validation`` may have been trained on; none where none was.

    Args:
        folder: Of the bad model.
        data: The splits that a sweep reads.

    Raises:
        ModelError: As ``read_training``.
    """
    recorded = read_training(folder)
    if recorded is None:
        return [UNKNOWN_TRAINING]
    return [] if recorded["unlearned_sha256"] == content_hash(data.forget_train) else [TRAINED_ON]


def sweep_bad_model(
    recipe: Recipe, bad: Path, data: ForgetRetainData, out: Path, *, progress: StageProgress | None = None
) -> Sweep:
    """Chooses alpha for a bad model, its adapter or its task vector.

    Args:
        recipe: Its model is the original; ``negate.transform`` is applied as in a run.
        bad: Folder of one of the three. It is not changed.
        data: With ``forget_validation``.
        out: As in ``sweep``.
        progress: As in ``sweep``.

    Returns:
        The sweep. Its notes say so where the bad model may have been trained on what alpha is chosen by.

    Raises:
        ModelError: There is no such folder, or it holds no model.
        SkuError: As ``sweep`` and ``transformed``.
    """
    if not bad.is_dir():
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    resolve_method(recipe, out)
    notes = [*data.notes(), *training_notes(bad, data)]
    loaded = load_model(with_safe_dtype(recipe))
    vector = transformed(recipe, task_vector_of(loaded.model, bad), loaded.model, loaded.tokenizer, data)
    return sweep(loaded.model, vector, loaded.tokenizer, data, recipe, out, notes=notes, progress=progress)
