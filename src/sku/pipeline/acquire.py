"""Stage 1 alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import RecipeError, named_memory_errors
from sku.methods.run import TWINS, has_twins, prepare, train_method, twin_folder, with_safe_dtype
from sku.models import load_model
from sku.pipeline.checks import check_trained_model, check_training, data_notes, load_recipe_data, recipe_settings
from sku.plan import Plan, Progress
from sku.plan.suggest import memory_fit
from sku.processes import current_processes, shared_new_folder
from sku.storage import check_can_be_made, check_new, mark_hazardous
from sku.sweep.bad_model import record_training
from sku.training.run import step_progress


def plan_acquire(recipe: Recipe, out: Path) -> Plan[list[dict[str, Any]]]:
    """Stage 1 alone: trains the bad model of a recipe into a new private, marked folder.

    Args:
        recipe: From ``load_recipe``.
        out: New folder: an adapter, or a whole model for full fine-tuning. With ``acquire.twin: good`` it holds what
            stage 2 subtracts, bad minus good, as an adapter or a task vector, and each twin in a folder inside it.

    Raises:
        SkuError: Anything a user can mend.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no stage 1: use sku run")
    processes = current_processes()
    processes.on_main(lambda: check_new(out))
    processes.on_main(lambda: check_can_be_made(out))
    prepare(recipe, out)  # Refused before anything is read.
    model, data = processes.everywhere(lambda: (check_trained_model(recipe), load_recipe_data(recipe)))
    training = processes.everywhere(lambda: check_training(recipe, model, data, out))
    return Plan(
        command="sku acquire",
        out=out,
        settings={**recipe_settings(recipe, model), **training.settings(recipe)},
        stages=(training.stage,),
        writes=("the bad model" if recipe.acquire.tuning == "full" else "the bad model's adapter",),
        execute=lambda progress: train_bad_model(recipe, data, out, progress),
        disk_bytes=training.peak_bytes,
        memory=lambda: memory_fit(recipe),
        bad_model="kept",
        examples=training.examples,
        notes=data_notes(data, model, training),
    )


def train_bad_model(
    recipe: Recipe, data: ForgetRetainData, out: Path, progress: Progress | None
) -> list[dict[str, Any]]:
    """Trains and saves the bad model; gives the training log."""
    processes = current_processes()
    with shared_new_folder(processes, out, private=True) as temporary:
        checkpoints = temporary / "checkpoints"
        with named_memory_errors("load"):
            loaded = load_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")
        with named_memory_errors("acquire"):
            acquired = train_method(recipe, loaded, data, checkpoints, step_progress(progress))
        for twin in TWINS if has_twins(recipe) else ():
            (twin_folder(checkpoints, twin) / "final").rename(twin_folder(temporary, twin))
        processes.on_main(lambda: shutil.rmtree(checkpoints))
        processes.on_main(lambda: mark_trained(temporary, recipe, data))
        acquired.save(temporary)
    return acquired.log


def mark_trained(folder: Path, recipe: Recipe, data: ForgetRetainData) -> None:
    """Marks the folder of a bad model before there is anything to find, and says what it is trained on."""
    mark_hazardous(folder)
    record_training(folder, recipe, data)
