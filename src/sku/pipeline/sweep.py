"""The choice of alpha alone."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

from sku.config import Recipe
from sku.errors import RecipeError, SkuError
from sku.evaluate.record_files import create_private_folder
from sku.evaluate.run import Progress
from sku.memory_errors import named_memory_errors
from sku.pipeline.acquire import acquire_recipe
from sku.pipeline.recipe_data import load_recipe_data
from sku.report.frontier import FIGURES, frontier_figure
from sku.storage import remove_hazardous
from sku.sweep.bad_model import check_same_training, sweep_bad_model
from sku.sweep.result import Sweep
from sku.sweep.run import check_judge, check_one_process


def sweep_recipe(
    recipe: Recipe,
    out: Path,
    *,
    bad: Path | None = None,
    keep_bad_model: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Chooses alpha: trains a bad model or takes one, and measures alphas with it.

    Args:
        recipe: ``sweep`` says how. Its alpha is not read.
        out: Private folder for ``sweep.json`` and the figures. A second call goes on where the first one was killed.
        bad: Folder of a bad model that is there; it is not changed. One is trained into ``out`` where this is None.
        keep_bad_model: Keep that one.
        progress: For progress bars.

    Returns:
        The sweep; ``Sweep.alpha`` says what to take.

    Raises:
        SkuError: Anything a user can mend.
    """
    recipe = with_alpha_to_choose(recipe)
    check_one_process()
    data = load_recipe_data(recipe)
    check_judge(recipe, data)
    trained = out / "bad" if bad is None else bad
    if bad is None and trained.exists():
        check_same_training(trained, recipe)
    elif bad is None:
        create_private_folder(out)
        try:
            acquire_recipe(recipe, trained, progress=progress)
        except SkuError:
            with suppress(OSError):  # Not empty: it was there before.
                out.rmdir()
            raise
    with named_memory_errors("sweep"):
        found = sweep_bad_model(recipe, trained, data, out, progress=progress)
        for name in FIGURES:
            frontier_figure(found, out / name)
    if bad is None and not keep_bad_model:
        remove_hazardous(trained)
    return found


def with_alpha_to_choose(recipe: Recipe) -> Recipe:
    """A recipe whose stage 1 holds out what alpha is then chosen by.

    Raises:
        RecipeError: Its method has no alpha.
    """
    recipe = dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, alpha="auto"))
    if not recipe.chooses_alpha:
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no alpha to choose: use sku compare")
    return recipe
