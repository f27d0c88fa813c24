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
from sku.memory import Checkpointing, decide_checkpointing, with_checkpointing
from sku.methods.run import TWINS, MethodRun, has_twins, resolve_method, train_method, twin_folder, with_safe_dtype
from sku.models import load_model
from sku.pipeline.checks import check_trained_model, check_training, load_recipe_data
from sku.plan import Progress
from sku.processes import current_processes, shared_new_folder
from sku.report.run_charts import sweep_chart
from sku.storage import check_can_be_made, check_new, check_space, remove_hazardous
from sku.sweep import Sweep
from sku.sweep.evaluator import check_judge, draw_questions
from sku.sweep.run import check_one_process, check_same_training, record_training, sweep_bad_model
from sku.training.run import step_progress

_log = logging.getLogger(__name__)


def run_acquire(recipe: Recipe, out: Path, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Stage 1 alone: trains the bad model of a recipe into a new private, marked folder.

    Args:
        recipe: From ``load_recipe``.
        out: New folder: an adapter, or a whole model for full fine-tuning. With ``acquire.twin: good`` it holds what
            stage 2 subtracts, bad minus good, as an adapter or a task vector, and each twin in a folder inside it.
        progress: For progress bars.

    Returns:
        The training log.

    Raises:
        SkuError: Anything a user can mend.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no stage 1: use sku run")
    processes = current_processes()
    processes.run_on_rank0(lambda: check_new(out))
    processes.run_on_rank0(lambda: check_can_be_made(out))
    decided = processes.run_on_rank0(lambda: decide_checkpointing(recipe))
    run = resolve_method(with_checkpointing(recipe, decided), out)  # Refused before anything is read.
    model, data = processes.run_on_all_ranks(lambda: (check_trained_model(recipe), load_recipe_data(recipe)))
    training = processes.run_on_all_ranks(lambda: check_training(recipe, model, data, run))
    processes.run_on_rank0(lambda: check_space(out, training.peak_bytes, "sku acquire"))
    return _train_bad_model(recipe, training.run, data, out, decided, progress)


def _train_bad_model(
    recipe: Recipe,
    run: MethodRun,
    data: ForgetRetainData,
    out: Path,
    decided: Checkpointing | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    processes = current_processes()
    if decided is not None:
        _log.info("activation checkpointing is %s", decided.line)
    with shared_new_folder(processes, out) as temporary:
        checkpoints = temporary / "checkpoints"
        with named_memory_errors("load"):
            loaded = load_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")
        with named_memory_errors("acquire"):
            acquired = train_method(recipe, loaded, data, checkpoints, step_progress(progress), run)
        for twin in TWINS if has_twins(recipe) else ():
            (twin_folder(checkpoints, twin) / "final").rename(twin_folder(temporary, twin))
        processes.run_on_rank0(lambda: shutil.rmtree(checkpoints))
        processes.run_on_rank0(lambda: record_training(temporary, recipe, data))
        acquired.save(temporary)
    return acquired.log


def run_sweep(
    recipe: Recipe,
    out: Path,
    *,
    bad: Path | None = None,
    keep_bad_model: bool = False,
    progress: Progress | None = None,
) -> Sweep:
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
    decided = None if there else decide_checkpointing(recipe)
    run = resolve_method(with_checkpointing(recipe, decided), trained)
    model, data = check_trained_model(recipe), load_recipe_data(recipe)
    check_judge(recipe, data)
    draw_questions(data, model.encoder(recipe), recipe)  # Refused before training.
    if not there:
        training = check_training(recipe, model, data, run)
        check_space(out, training.peak_bytes, "sku sweep")
        create_private_folder(out)
        try:
            _train_bad_model(recipe, training.run, data, trained, decided, progress)
        except SkuError:
            with suppress(OSError):  # Not empty: it was there before.
                out.rmdir()
            raise
    with named_memory_errors("sweep"):
        found = sweep_bad_model(recipe, trained, data, out, progress=progress)
        sweep_chart(found).save(out)
    if bad is None and not keep_bad_model:
        remove_hazardous(trained)
    return found
