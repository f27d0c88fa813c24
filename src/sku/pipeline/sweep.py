"""The choice of alpha alone."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

from sku.config import Recipe
from sku.errors import ModelError, RecipeError, SkuError, named_memory_errors
from sku.evaluate.record_files import create_private_folder
from sku.methods.run import prepare
from sku.pipeline.acquire import train_bad_model
from sku.pipeline.checks import (
    check_folder,
    check_trained_model,
    check_training,
    data_notes,
    load_recipe_data,
    recipe_settings,
)
from sku.plan import Plan, Progress
from sku.plan.suggest import memory_fit
from sku.storage import remove_hazardous
from sku.sweep.bad_model import check_same_training, sweep_bad_model, training_notes
from sku.sweep.meter import draw_questions
from sku.sweep.result import Sweep
from sku.sweep.run import check_judge, check_one_process


def plan_sweep(recipe: Recipe, out: Path, *, bad: Path | None = None, keep_bad_model: bool = False) -> Plan[Sweep]:
    """Chooses alpha, whatever the recipe's is: measures alphas with the bad model in a folder, which stays as it is.

    One is trained into ``out`` where ``bad`` is None. A second call goes on where the first one was killed.

    Raises:
        SkuError: Anything a user can mend.
    """
    recipe = _with_alpha_to_choose(recipe)
    check_one_process()
    trained = out / "bad" if bad is None else bad
    there = trained.is_dir()
    if bad is not None and not there:
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    if bad is None and there:
        check_same_training(trained, recipe)
    check_folder(out)
    prepare(recipe, trained)
    model, data = check_trained_model(recipe), load_recipe_data(recipe)
    check_judge(recipe, data)
    questions = draw_questions(data, model.writer(recipe), recipe.sweep, seed=recipe.seed)
    texts = sum(map(len, questions.texts.values()))
    training = None if there else check_training(recipe, model, data, trained)
    tried = f"alpha {', '.join(f'{alpha:g}' for alpha in recipe.sweep.alphas)}"
    if not recipe.sweep.alphas:
        tried = f"{recipe.sweep.points} alphas up to where the utility budget binds"

    def execute(progress: Progress | None) -> Sweep:
        from sku.report.frontier import write_frontier  # Imports matplotlib, which a plan has no use for.

        if not there:
            create_private_folder(out)
            try:
                train_bad_model(recipe, data, trained, progress)
            except SkuError:
                with suppress(OSError):  # Not empty: it was there before.
                    out.rmdir()
                raise
        with named_memory_errors("sweep"):
            found = sweep_bad_model(recipe, trained, data, out, progress=progress)
            write_frontier(found, out)
        if bad is None and not keep_bad_model:
            remove_hazardous(trained)
        return found

    return Plan(
        command="sku sweep",
        out=out,
        settings={
            **recipe_settings(recipe, model),
            **({} if training is None else training.settings(recipe)),
            "bad model": str(trained) if there else "trained first",
            "asked": {"prompts and prefills": len(questions.requests), "texts": texts},
        },
        stages=(*(() if training is None else (training.stage,)), f"measure {tried}"),
        writes=("sweep.json", "frontier.png", "frontier.svg", *(("bad/",) if keep_bad_model else ())),
        execute=execute,
        disk_bytes=0 if training is None else training.peak_bytes,
        memory=None if training is None else lambda: memory_fit(recipe),
        bad_model="kept" if bad is not None or keep_bad_model else "deleted at the end",
        examples=data.counts() if training is None else training.examples,
        notes=(*data_notes(data, model, training), *(training_notes(trained, data) if there else ())),
    )


def _with_alpha_to_choose(recipe: Recipe) -> Recipe:
    """A recipe whose stage 1 holds out what alpha is then chosen by."""
    recipe = dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, alpha="auto"))
    if not recipe.chooses_alpha:
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no alpha to choose: use sku compare")
    return recipe
