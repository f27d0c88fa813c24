"""Stage 1 alone, and the choice of alpha alone, for a bad model that is there or trained first."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from sku.config import Recipe, refuse_final
from sku.data.examples import ForgetRetainData
from sku.errors import ModelError, RecipeError, SkuError, named_memory_errors
from sku.evaluate.records import create_private_folder
from sku.methods.run import TWINS, has_twins, prepare, train_method, twin_folder, with_safe_dtype
from sku.models import load_model
from sku.pipeline.checks import (
    check_trained_model,
    check_training,
    data_notes,
    load_recipe_data,
    recipe_settings,
)
from sku.plan import Plan, Progress
from sku.plan.fit import Checkpointing, decide_checkpointing, memory_fit, told_checkpointing, with_checkpointing
from sku.processes import current_processes, shared_new_folder
from sku.storage import check_can_be_made, check_new, remove_hazardous
from sku.sweep.bad_model import check_same_training, record_training, sweep_bad_model, training_notes
from sku.sweep.meter import check_judge, draw_questions
from sku.sweep.result import Sweep
from sku.sweep.run import check_one_process
from sku.training.run import step_progress

_log = logging.getLogger(__name__)


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
    decided = processes.on_main(lambda: decide_checkpointing(recipe))
    return Plan(
        command="sku acquire",
        out=out,
        settings={**recipe_settings(recipe, model), **training.settings(recipe), **told_checkpointing(decided)},
        stages=(training.stage,),
        writes=("the bad model" if recipe.acquire.tuning == "full" else "the bad model's adapter",),
        execute=lambda progress: train_bad_model(recipe, data, out, decided, progress),
        disk_bytes=training.peak_bytes,
        memory=lambda: memory_fit(with_checkpointing(recipe, decided)),
        bad_model="kept",
        examples=training.examples,
        notes=data_notes(data, model, training),
    )


def train_bad_model(
    recipe: Recipe, data: ForgetRetainData, out: Path, decided: Checkpointing | None, progress: Progress | None
) -> list[dict[str, Any]]:
    """Trains and saves the bad model; gives the training log."""
    processes = current_processes()
    if decided is not None:
        _log.info("activation checkpointing is %s", decided.line)
    with shared_new_folder(processes, out) as temporary:
        checkpoints = temporary / "checkpoints"
        with named_memory_errors("load"):
            loaded = load_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")
        with named_memory_errors("acquire"):
            trained = with_checkpointing(recipe, decided)
            acquired = train_method(trained, loaded, data, checkpoints, step_progress(progress))
        for twin in TWINS if has_twins(recipe) else ():
            (twin_folder(checkpoints, twin) / "final").rename(twin_folder(temporary, twin))
        processes.on_main(lambda: shutil.rmtree(checkpoints))
        processes.on_main(lambda: record_training(temporary, recipe, data))
        acquired.save(temporary)
    return acquired.log


def plan_sweep(recipe: Recipe, out: Path, *, bad: Path | None = None, keep_bad_model: bool = False) -> Plan[Sweep]:
    """Chooses alpha, whatever the recipe's is: measures alphas with the bad model in a folder, which stays as it is.

    One is trained into ``out`` where ``bad`` is None. A second call goes on where the first one was killed.

    Raises:
        SkuError: Anything a user can mend.
    """
    refuse_final(recipe.data, "a sweep")
    # So that stage 1 holds out what alpha is then chosen by.
    recipe = dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, alpha="auto"))
    if not recipe.chooses_alpha:
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no alpha to choose: use sku compare")
    check_one_process()
    trained = out / "bad" if bad is None else bad
    there = trained.is_dir()
    if bad is not None and not there:
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    if bad is None and there:
        check_same_training(trained, recipe)
    check_can_be_made(out)
    prepare(recipe, trained)
    model, data = check_trained_model(recipe), load_recipe_data(recipe)
    check_judge(recipe, data)
    questions = draw_questions(data, model.writer(recipe), recipe.sweep, seed=recipe.seed)
    texts = sum(map(len, questions.texts.values()))
    training = None if there else check_training(recipe, model, data, trained)
    decided = None if there else decide_checkpointing(recipe)
    tried = f"alpha {', '.join(f'{alpha:g}' for alpha in recipe.sweep.alphas)}"
    if not recipe.sweep.alphas:
        tried = f"{recipe.sweep.points} alphas up to where the utility budget binds"

    def execute(progress: Progress | None) -> Sweep:
        from sku.report.frontier import write_frontier  # Imports matplotlib, which a plan has no use for.

        if not there:
            create_private_folder(out)
            try:
                train_bad_model(recipe, data, trained, decided, progress)
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
            **told_checkpointing(decided),
            "bad model": str(trained) if there else "trained first",
            "asked": {"prompts and prefills": len(questions.requests), "texts": texts},
        },
        stages=(*(() if training is None else (training.stage,)), f"measure {tried}"),
        writes=("sweep.json", "frontier.png", "frontier.svg", *(("bad/",) if keep_bad_model else ())),
        execute=execute,
        disk_bytes=0 if training is None else training.peak_bytes,
        memory=None if training is None else lambda: memory_fit(with_checkpointing(recipe, decided)),
        bad_model="kept" if bad is not None or keep_bad_model else "deleted at the end",
        examples=data.counts() if training is None else training.examples,
        notes=(*data_notes(data, model, training), *(training_notes(trained, data) if there else ())),
    )
