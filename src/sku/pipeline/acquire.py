"""Stage 1 alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import RecipeError
from sku.evaluate.run import Progress
from sku.memory_errors import named_memory_errors
from sku.methods.run import check_rows, has_twins, prepare, train_method, with_safe_dtype
from sku.methods.twins import TWINS, twin_folder
from sku.models import load_model
from sku.pipeline.recipe_data import load_recipe_data
from sku.processes import current_processes, shared_new_folder
from sku.storage import mark_hazardous
from sku.sweep.bad_model import record_training
from sku.training.run import step_progress


def acquire_recipe(recipe: Recipe, out: Path, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Stage 1 alone: trains the bad model of a recipe into a new private, marked folder.

    Args:
        recipe: From ``load_recipe``.
        out: New folder: an adapter, or a whole model for full fine-tuning. With ``acquire.twin: good`` it holds what
            stage 2 subtracts, bad minus good, as an adapter or a task vector, and each twin in a folder inside it.
        progress: For progress bars.

    Returns:
        The training log, one entry a logged step.

    Raises:
        SkuError: Anything a user can mend.
    """
    check_has_stage_1(recipe)
    config = with_safe_dtype(recipe)
    processes = current_processes()
    with shared_new_folder(processes, out, private=True) as temporary:
        checkpoints = temporary / "checkpoints"
        prepare(recipe, checkpoints)  # Refused before anything is loaded.
        data = load_recipe_data(recipe)
        check_rows(recipe, data)
        with named_memory_errors("load"):
            loaded = load_model(config, four_bit=recipe.acquire.tuning == "qlora")
        with named_memory_errors("acquire"):
            acquired = train_method(recipe, loaded, data, checkpoints, step_progress(progress))
        for twin in TWINS if has_twins(recipe) else ():
            (twin_folder(checkpoints, twin) / "final").rename(twin_folder(temporary, twin))
        processes.on_main(lambda: shutil.rmtree(checkpoints))
        processes.on_main(lambda: mark_trained(temporary, recipe, data))
        acquired.save(temporary)
    return acquired.log


def check_has_stage_1(recipe: Recipe) -> None:
    """Refuses recipes of other methods.

    Raises:
        RecipeError: The method is not SKU.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no stage 1: use sku run")


def mark_trained(folder: Path, recipe: Recipe, data: ForgetRetainData) -> None:
    """Marks the folder of a bad model before there is anything to find, and says what it is trained on."""
    mark_hazardous(folder)
    record_training(folder, recipe, data)
