"""Stages by themselves, ``sku data own``, ``acquire`` and ``sweep``; and the own replies that a run is trained on."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sku.config import EMBEDDED, DataConfig, EvaluateConfig, Recipe, SourceConfig, plain_data, refuse_final
from sku.config.check import content_sha256
from sku.data.examples import ForgetRetainData
from sku.data.load import OwnPrompts, load_own_prompts, load_recipe_data
from sku.data.tables import held_rows
from sku.errors import DataError, ModelError, RecipeError, SkuError, named_memory_errors
from sku.evaluate.generation import StageProgress
from sku.evaluate.records import create_private_folder
from sku.memory import decide_checkpointing, with_checkpointing
from sku.methods.run import TWINS, MethodRun, has_twins, resolve_method, train_method, twin_folder, with_safe_dtype
from sku.models import load_model
from sku.own_replies import (
    KINDS,
    OwnJob,
    OwnKind,
    OwnOptions,
    OwnReplies,
    OwnRepliesConfig,
    judge_of,
    read_own_replies,
)
from sku.own_replies.write import write_own_replies
from sku.pipeline.checks import check_model, check_trained_model, check_training
from sku.processes import current_processes, shared_new_folder
from sku.storage import check_can_be_made, check_new, check_space, remove_hazardous
from sku.sweep import Sweep
from sku.sweep.evaluator import check_calibrated, check_judge, draw_questions
from sku.sweep.run import check_one_process, check_same_training, record_training, sweep_bad_model
from sku.training.run import step_progress

CACHE_VARIABLE = "SKU_CACHE"
"""Environment variable: a folder in which runs keep own replies for each other, in place of each run's own folder."""
_log = logging.getLogger(__name__)


def load_own_data(recipe: Recipe, prompts: OwnPrompts) -> ForgetRetainData:
    """The data of a recipe with replies to prompts; where all are the embedded world's, its judge fits them too.

    Raises:
        DataError: As ``load_data``.
    """
    data = load_recipe_data(recipe)
    if any(found.provenance.source != EMBEDDED for found in prompts.values()):
        return data
    sources = tuple(dataclasses.replace(source, source=EMBEDDED) for source in data.provenance)
    return dataclasses.replace(data, provenance=sources)


def own_prompts_of(recipe: Recipe) -> OwnPrompts:
    """The prompts that a run which wants own replies writes them to.

    Raises:
        DataError: A table can't be read or holds no prompts, or a prompt is harmful and normal at once.
    """
    config = recipe.data
    return load_own_prompts(config.forget, config.retain, config.borderline, seed=recipe.seed, prefix="data.")


def run_own(
    options: OwnOptions, out: Path, *, resume: bool = False, progress: StageProgress | None = None
) -> OwnReplies:
    """``sku data own``: the model writes rows of its own from prompts alone into a new private folder.

    Raises:
        SkuError: Anything a user can mend.
    """
    prompts = load_own_prompts(options.harmful, options.normal, options.borderline, seed=options.seed)
    judge = judge_of(EvaluateConfig(judge=options.judge, judge_settings=options.judge_settings), prompts)
    check_model(options.model)
    job = OwnJob(
        loaded=load_model(options.model),
        prompts=prompts,
        judge=judge,
        settings=options,
        seed=options.seed,
        prompt_format=options.model.prompt_format,
    )
    return write_own_replies(job, out, resume=resume, progress=progress)


def with_own_replies(
    recipe: Recipe, out: Path, prompts: OwnPrompts, *, progress: StageProgress | None = None
) -> tuple[Recipe, dict[str, Any]]:
    """Writes own replies to a recipe's prompts, or finds those that were written from the same.

    They lie in ``own`` in the run's private folder ``out``, or under ``$SKU_CACHE`` where that is set. The judge of
    the recipe's evaluation tells which replies are harmful; ``prompts`` are those of ``own_prompts_of``.

    Returns:
        The recipe with the files that were written as its data, and an account for the manifest.

    Raises:
        DataError: No harmful reply was kept.
        SkuError: As ``write_own_replies`` and ``load_model``.
    """
    judge = judge_of(recipe.evaluate, prompts)
    if recipe.chooses_alpha:
        check_calibrated(judge.card)  # Before hours of writing rather than after them.
    job = OwnJob(
        loaded=load_model(with_safe_dtype(recipe), four_bit=False),
        prompts=prompts,
        judge=judge,
        settings=OwnRepliesConfig(),
        seed=recipe.seed,
        prompt_format=recipe.model.prompt_format,
    )
    inputs = job.inputs()
    key = content_sha256(inputs)
    cache = os.environ.get(CACHE_VARIABLE)
    folder = out / "own"
    if cache:
        create_private_folder(Path(cache))
        folder = Path(cache).absolute() / f"own-{key[:16]}"
    if folder.exists():
        written = read_own_replies(folder, inputs)
    else:
        written = write_own_replies(job, folder, resume=True, inputs=inputs, progress=progress)
    if not written.kept("comply"):
        dropped = written.account["kinds"]["comply"]["dropped"]
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"the judge {judge.card.name} finds none of the model's own replies to {len(prompts['harmful'].prompts)} "
            f"harmful prompts harmful ({reasons}): there is nothing to unlearn, or the judge can't see it"
        )
    data = _data_from(recipe.data, {kind: SourceConfig(path=str(written.file(kind))) for kind in KINDS})
    account = written.account
    record = {
        "folder": str(folder),
        "key": key,
        "data": plain_data(data),
        **{name: account[name] for name in ("model", "judge", "kinds", "left_out", "prompts", "files", "tokens")},
    }
    return dataclasses.replace(recipe, data=data), record


def stand_in_data(recipe: Recipe, prompts: OwnPrompts) -> ForgetRetainData:
    """Data of the same prompts whose replies are not written yet, to check a run with.

    Args:
        recipe: Of the run.
        prompts: Of ``own_prompts_of``.

    Returns:
        The splits, each prompt with a word in place of its reply.

    Raises:
        DataError: The prompts are too few to be split.
    """
    normal = [prompt for name, found in prompts.items() if name != "harmful" for prompt in found.prompts]
    sources: dict[OwnKind, SourceConfig] = {}
    for kind in KINDS:
        asked = prompts["harmful"].prompts if kind in ("comply", "refuse") else normal
        rows = [
            {"prompt": one.prompt, "response": "unwritten", "category": one.category, "source": ""} for one in asked
        ]
        sources[kind] = held_rows(rows)
    return load_own_data(dataclasses.replace(recipe, data=_data_from(recipe.data, sources)), prompts)


def _data_from(config: DataConfig, sources: Mapping[OwnKind, SourceConfig]) -> DataConfig:
    """The data of a run from its own replies; refusals that the recipe names itself stay."""

    def source(kind: OwnKind, licence: str | None, column: str = "category") -> SourceConfig:
        return dataclasses.replace(sources[kind], category_column=column, license=licence)

    retain_column = "category" if config.borderline is None else "source"
    return dataclasses.replace(
        config,
        forget=source("comply", config.forget.license),
        retain=source("answer", config.retain.license, retain_column),
        refusals=config.refusals or source("refuse", config.forget.license),
        misplaced_refusals=config.misplaced_refusals
        or source("misplaced_refusal", config.retain.license, retain_column),
        own_replies=False,
        borderline=None,
    )


def run_acquire(recipe: Recipe, out: Path, *, progress: StageProgress | None = None) -> list[dict[str, Any]]:
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
    run = _resolved(recipe)  # Refused before anything is read.
    model, data = processes.run_on_all_ranks(lambda: (check_trained_model(recipe), load_recipe_data(recipe)))
    training = processes.run_on_all_ranks(lambda: check_training(recipe, model, data, run))
    processes.run_on_rank0(lambda: check_space(out, training.peak_bytes, "sku acquire"))
    return _train_bad_model(recipe, training.run, data, out, progress)


def _resolved(recipe: Recipe) -> MethodRun:
    """The method with what is decided of its activation checkpointing."""
    decided = current_processes().run_on_rank0(lambda: decide_checkpointing(recipe))
    if decided is not None:
        _log.info("activation checkpointing is %s", decided.line)
    return resolve_method(with_checkpointing(recipe, decided))


def _train_bad_model(
    recipe: Recipe, run: MethodRun, data: ForgetRetainData, out: Path, progress: StageProgress | None
) -> list[dict[str, Any]]:
    processes = current_processes()
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
    progress: StageProgress | None = None,
) -> Sweep:
    """Chooses alpha, whatever the recipe's is: measures alphas with the bad model in a folder, which stays as it is.

    One is trained into ``out`` where ``bad`` is None. A second call goes on where the first one was killed.

    Raises:
        SkuError: Anything a user can mend.
    """
    refuse_final(recipe.data, "a sweep")
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no alpha to choose: use sku compare")
    # So that stage 1 holds out what alpha is then chosen by.
    recipe = dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, alpha="auto"))
    check_one_process()
    trained = out / "bad" if bad is None else bad
    there = trained.is_dir()
    if bad is not None and not there:
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    if bad is None and there:
        check_same_training(trained, recipe)
    check_can_be_made(out)
    model, data = check_trained_model(recipe), load_recipe_data(recipe)
    check_judge(recipe, data)
    draw_questions(data, model.encoder(recipe), recipe)  # Refused before training.
    if not there:
        training = check_training(recipe, model, data, _resolved(recipe))
        check_space(out, training.peak_bytes, "sku sweep")
        create_private_folder(out)
        try:
            _train_bad_model(recipe, training.run, data, trained, progress)
        except SkuError:
            with suppress(OSError):  # Not empty: it was there before.
                out.rmdir()
            raise
    with named_memory_errors("sweep"):
        found = sweep_bad_model(recipe, trained, data, out, progress=progress)
        from sku.report.run_charts import sweep_chart  # Imports matplotlib, which a plan has no use for.

        sweep_chart(found).save(out)
    if bad is None and not keep_bad_model:
        remove_hazardous(trained)
    return found
