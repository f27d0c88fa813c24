"""``--dry-run`` of the commands that work with a recipe: the checks of the command itself, no weights, no output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sku.comparison.jobs import Job
from sku.comparison.run import RECORDS, check_jobs, record_path
from sku.comparison.search import search_judge
from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.load import load_data
from sku.data.prompt_sets import wants_own_replies
from sku.dry_run import BadModel, DryRun
from sku.errors import ModelError, OutputError, SkuError
from sku.methods import method_named
from sku.methods.run import has_twins, prepare, with_safe_dtype
from sku.models import with_path
from sku.negate.operators.base import check_operators
from sku.own_replies.job import judge_of
from sku.pipeline.acquire import check_has_stage_1
from sku.pipeline.dry_checks import (
    CheckedModel,
    CheckedTraining,
    check_data,
    check_evaluation,
    check_model,
    check_training,
    data_notes,
    recipe_settings,
    result_bytes,
)
from sku.pipeline.evaluate import check_one_process_attacks, readable_source, refuse_bad_model
from sku.pipeline.memory import memory_fit
from sku.pipeline.own_replies import own_prompts_of, stand_in_data
from sku.pipeline.run_folder import RunFolder
from sku.pipeline.sweep import with_alpha_to_choose
from sku.pipeline.unlearning import Unlearning
from sku.processes import current_processes
from sku.storage import check_can_be_made, check_new
from sku.sweep.bad_model import check_same_training, training_notes
from sku.sweep.meter import draw_questions
from sku.sweep.run import check_judge, check_one_process

UNWRITTEN = (
    "the examples are the prompts, as the model's own replies to them are not written yet: some prompts will have "
    "none, others several"
)


def dry_run(recipe: Recipe, out: Path, *, resume: bool = False) -> DryRun:
    """What ``run_recipe`` would do.

    Args:
        recipe: As of ``run_recipe``.
        out: As of ``run_recipe``.
        resume: As of ``run_recipe``.

    Returns:
        Stages, files and sizes.

    Raises:
        SkuError: As ``run_recipe``, but for what only weights and training can show; also where the disk is too small.
    """
    check_one_process_attacks(recipe, current_processes())
    folder = RunFolder(out, current_processes(), lambda _stage, _done, _total: None)
    unlearning = Unlearning(recipe, folder)
    prepare(recipe, unlearning.trained_folder)
    if recipe.chooses_alpha:
        check_one_process()
    folder.check(recipe, unlearning.trained_folder, resume=resume)
    writes_own = wants_own_replies(recipe.data)
    if writes_own:
        prompts = own_prompts_of(recipe)
        judge_of(recipe.evaluate, prompts)
        data = stand_in_data(recipe, prompts)
    else:
        data = check_data(recipe)
    model = check_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")
    asked = check_evaluation(
        recipe, model, data, {"base": readable_source(recipe.model), "unlearned": out / "unlearned"}
    )
    if recipe.chooses_alpha:
        check_judge(recipe, data)
    if recipe.chooses_alpha or recipe.checks_stage_1:
        draw_questions(data, model.writer(recipe), recipe.sweep, seed=recipe.seed)
    training = check_training(recipe, model, data, unlearning.trained_folder)
    check_operators(training.run.operators, model.skeleton, data)
    negates = recipe.method == "sku"
    stages = [
        *(["have the base model write its own replies"] if writes_own else []),
        "evaluate the base model",
        _trains(recipe, training),
        *(["ask what stage 1 has learned"] if recipe.checks_stage_1 else []),
        *(["choose alpha"] if recipe.chooses_alpha else []),
        *(["subtract the task vector"] if negates else []),
        "evaluate the unlearned model",
        *(f"evaluate it with {name} weights" for name in recipe.evaluate.precisions),
        *(f"attack both models: {name}" for name in recipe.evaluate.attacks),
    ]
    hazardous = method_named(recipe.method).hazardous
    kept = hazardous and recipe.keep_bad_model
    adapter = recipe.acquire.tuning != "full"
    writes = [
        *(["own/"] if writes_own else []),
        "unlearned/",
        *((["negated_adapter/"] if negates else ["adapter/"]) if adapter else []),
        "evaluation/",
        *(["sweep/"] if recipe.chooses_alpha else []),
        *(["bad/"] if kept else []),
        "results.json",
        "manifest.json",
        "training_log.jsonl",
        "before_after.png",
        "before_after.svg",
    ]
    fate: BadModel = "kept" if kept else "deleted at the end" if hazardous else "none"
    alpha = {"alpha": recipe.negate.alpha} if negates else {}
    settings = {**recipe_settings(recipe, model), **_training(recipe, training), **alpha, "asked": asked}
    return _checked(
        DryRun(
            command="sku run",
            out=out,
            settings=settings,
            stages=tuple(stages),
            writes=tuple(writes),
            disk_bytes=training.peak_bytes + result_bytes(recipe, model),
            memory=_memory(recipe),
            bad_model=fate,
            examples=_examples(data, training),
            notes=(*([UNWRITTEN] if writes_own else []), *data_notes(data, model, training)),
        )
    )


def dry_acquire(recipe: Recipe, out: Path) -> DryRun:
    """What ``acquire_recipe`` would do.

    Args:
        recipe: As of ``acquire_recipe``.
        out: As of ``acquire_recipe``.

    Returns:
        As ``dry_run``.

    Raises:
        SkuError: As ``dry_run``.
    """
    check_has_stage_1(recipe)
    check_new(out)
    check_can_be_made(out)
    model, data, training = _stage_1(recipe, out)
    return _checked(
        DryRun(
            command="sku acquire",
            out=out,
            settings={**recipe_settings(recipe, model), **_training(recipe, training)},
            stages=(_trains(recipe, training),),
            writes=("the bad model" if recipe.acquire.tuning == "full" else "the bad model's adapter",),
            disk_bytes=training.peak_bytes,
            memory=_memory(recipe),
            bad_model="kept",
            examples=_examples(data, training),
            notes=data_notes(data, model, training),
        )
    )


def dry_sweep(recipe: Recipe, out: Path, *, bad: Path | None = None, keep_bad_model: bool = False) -> DryRun:
    """What ``sweep_recipe`` would do.

    Args:
        recipe: As of ``sweep_recipe``.
        out: As of ``sweep_recipe``.
        bad: As of ``sweep_recipe``.
        keep_bad_model: As of ``sweep_recipe``.

    Returns:
        As ``dry_run``.

    Raises:
        SkuError: As ``dry_run``.
    """
    recipe = with_alpha_to_choose(recipe)
    check_one_process()
    trained = out / "bad" if bad is None else bad
    there = trained.is_dir()
    if bad is not None and not there:
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    if bad is None and there:
        check_same_training(trained, recipe)
    _check_folder(out)
    model, data, training = _stage_1(recipe, trained)
    check_judge(recipe, data)
    questions = draw_questions(data, model.writer(recipe), recipe.sweep, seed=recipe.seed)
    sweep = recipe.sweep
    tried = f"alpha {', '.join(f'{alpha:g}' for alpha in sweep.alphas)}"
    if not sweep.alphas:
        tried = f"{sweep.points} alphas up to where the utility budget binds"
    kept = bad is not None or keep_bad_model
    return _checked(
        DryRun(
            command="sku sweep",
            out=out,
            settings={
                **recipe_settings(recipe, model),
                **({} if there else _training(recipe, training)),
                "bad model": str(trained) if there else "trained first",
                "asked": {
                    "prompts and prefills": len(questions.requests),
                    "texts": sum(map(len, questions.texts.values())),
                },
            },
            stages=(*(() if there else (_trains(recipe, training),)), f"measure {tried}"),
            writes=(
                "sweep.json",
                "frontier.png",
                "frontier.svg",
                *(("bad/",) if keep_bad_model else ()),
            ),
            disk_bytes=0 if there else training.peak_bytes,
            memory=None if there else _memory(recipe),
            bad_model="kept" if kept else "deleted at the end",
            examples=_examples(data, training),
            notes=(
                *data_notes(data, model, None if there else training),
                *(training_notes(trained, data) if there else ()),
            ),
        )
    )


def dry_evaluate(recipe: Recipe, model: str, out: Path, *, allow_hazardous: bool = False) -> DryRun:
    """What ``evaluate_recipe`` would do.

    Args:
        recipe: As of ``evaluate_recipe``.
        model: As of ``evaluate_recipe``.
        out: As of ``evaluate_recipe``.
        allow_hazardous: As of ``evaluate_recipe``.

    Returns:
        As ``dry_run``.

    Raises:
        SkuError: As ``dry_run``.
    """
    if not allow_hazardous:
        refuse_bad_model(recipe, model)
    check_one_process_attacks(recipe, current_processes())
    data = check_data(recipe)
    base = check_model(recipe.model)
    measured = check_model(with_path(recipe.model, model))
    _check_folder(out)
    asked = check_evaluation(recipe, base, data, {"base": readable_source(recipe.model), "model": model})
    config = recipe.evaluate
    return _checked(
        DryRun(
            command="sku evaluate",
            out=out,
            settings={
                "recipe": recipe.name,
                "seed": recipe.seed,
                "base": base.describe(),
                "model": measured.describe(),
                "judge": config.judge,
                "asked": asked,
            },
            stages=(
                "evaluate the base model",
                "evaluate the model",
                *(f"evaluate it with {name} weights" for name in config.precisions),
                *(f"attack both models: {name}" for name in config.attacks),
            ),
            writes=(
                "base/",
                "model/",
                *(("precisions.json", "precisions/") if config.precisions else ()),
                *(("attacks.json", "attacks/") if config.attacks else ()),
            ),
            disk_bytes=0,
            examples=data.counts(),
            notes=tuple(dict.fromkeys((*data.notes(), *base.notes, *measured.notes))),
        )
    )


def dry_comparison(jobs: Sequence[Job], recipe: Recipe, out: Path, *, command: str) -> DryRun:
    """What ``run_comparison`` would do.

    Args:
        jobs: As of ``run_comparison``.
        recipe: That they were made from.
        out: As of ``run_comparison``.
        command: ``sku compare`` or ``sku ablate``.

    Returns:
        As ``dry_run``; training is checked once for each method and variant.

    Raises:
        SkuError: As ``dry_run``.
    """
    check_jobs(jobs, out)
    _check_folder(out)
    data = load_data(recipe.data, recipe.seed, forget_validation=recipe.search_validation)
    model = check_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")
    asked = check_evaluation(recipe, model, data, {"base": readable_source(recipe.model)})
    notes = list(data_notes(data, model, None))
    trained: dict[str, CheckedTraining] = {}
    failing: dict[str, str] = {}
    for job in jobs:
        if job.kind == "method" and job.name not in {*trained, *failing}:
            # Each with a model of its own: an adapter is added to it.
            own = check_model(with_safe_dtype(job.recipe))
            try:
                trained[job.name] = check_training(job.recipe, own, data, out)
            except SkuError as error:  # Its row says so; the other rows are made all the same.
                failing[job.name] = f"{job.name} would fail: {error}"
    notes += failing.values()
    if recipe.compare.search is not None:
        search_judge(recipe, data)
        points = len(recipe.compare.search.points)
        rows = len({*trained, "sku"})  # SKU's are those of the random direction, too.
        notes.append(f"compare.search trains each of {rows} rows {points} times more, to choose its settings")
    there = sum(record_path(out, job).is_file() for job in jobs)
    if there:
        notes.append(f"{there} records are in {out / RECORDS}: those that still fit are kept, the others made anew")
    return _checked(
        DryRun(
            command=command,
            out=out,
            settings={
                "recipe": recipe.name,
                "seed": recipe.seed,
                "model": model.describe(),
                "rows": ", ".join(dict.fromkeys(job.name for job in jobs)),
                "seeds": len({job.seed for job in jobs}),
                "steps": {name: found.steps for name, found in trained.items()},
                "asked": asked,
            },
            stages=(f"run {len(jobs)} jobs, one after the other", "draw tables and pictures"),
            writes=(f"{RECORDS}/", "table.md", "trade_off.png", "trade_off.svg", "overview.png", "overview.svg"),
            disk_bytes=max((found.peak_bytes for found in trained.values()), default=0),
            bad_model="deleted at the end" if any(_trains_bad_model(job) for job in jobs) else "none",
            examples=data.counts(),
            notes=tuple(notes),
        )
    )


def _stage_1(recipe: Recipe, folder: Path) -> tuple[CheckedModel, ForgetRetainData, CheckedTraining]:
    prepare(recipe, folder)
    model = check_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")
    data = check_data(recipe)
    return model, data, check_training(recipe, model, data, folder)


def _training(recipe: Recipe, training: CheckedTraining) -> dict[str, Any]:
    settings = training.run.training
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    return {"tuning": recipe.acquire.tuning, "steps": training.steps, "examples a step": batch}


def _trains(recipe: Recipe, training: CheckedTraining) -> str:
    return f"train {training.steps} steps{', each of two twins' if has_twins(recipe) else ''}"


def _memory(recipe: Recipe) -> str:
    found = memory_fit(recipe)
    return found if isinstance(found, str) else found.describe()


def _examples(data: ForgetRetainData, training: CheckedTraining) -> dict[str, int]:
    return {**data.counts(), **{name: count for name, count in training.examples.items() if name in data.counts()}}


def _trains_bad_model(job: Job) -> bool:
    """The random direction has the length of SKU's change, which is trained for it."""
    return job.kind == "random_direction" or (job.kind == "method" and method_named(job.recipe.method).hazardous)


def _check_folder(out: Path) -> None:
    """A folder that may be there; a file may not."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"folder {out} can't be made: File exists")
    check_can_be_made(out)


def _checked(found: DryRun) -> DryRun:
    found.check_disk()
    return found
