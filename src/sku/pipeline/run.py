"""A whole run, from data to the comparison of before and after."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.attacks.kinds import check_attacks
from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.load import OwnPrompts, load_recipe_data
from sku.errors import NoAlphaError, OutputError, ProcessError, SkuError, named_memory_errors
from sku.evaluate.records import create_private_folder
from sku.memory import Checkpointing, decide_checkpointing, memory_fit, with_checkpointing
from sku.methods import method_named
from sku.methods.run import MethodRun, check_rows, has_twins, resolve_method, visited_examples, with_safe_dtype
from sku.models import LoadedModel, load_model, own_license
from sku.own_replies import judge_of
from sku.pipeline import CommandPlan, Progress
from sku.pipeline.checks import (
    CheckedModel,
    CheckedTraining,
    check_evaluation,
    check_trained_model,
    check_training,
)
from sku.pipeline.evaluate import MeasuredPair, Measuring, check_one_process_attacks
from sku.pipeline.run_folder import RunFolder
from sku.pipeline.stages import load_own_data, own_prompts_of, stand_in_data, with_own_replies
from sku.pipeline.unlearning import Unlearning
from sku.processes import current_processes
from sku.report.card import write_cards
from sku.report.tables import before_after_rows
from sku.storage import RECORD_VERSION, bytes_in, check_place, new_folder, remove_hazardous, write_json
from sku.sweep.evaluator import check_judge, draw_questions
from sku.sweep.run import check_one_process

_log = logging.getLogger(__name__)
_BASE = Path("evaluation", "base")
UNWRITTEN = (
    "the examples are the prompts, as the model's own replies to them are not written yet: some prompts will have "
    "none, others several"
)


@dataclass(frozen=True, kw_only=True)
class FinishedRun(MeasuredPair):
    """What a run gives back."""

    folder: Path
    manifest: dict[str, Any]


def run_recipe(recipe: Recipe, out: Path, *, resume: bool = False, progress: Progress | None = None) -> FinishedRun:
    """Runs a recipe from data to the before/after comparison.

    Under ``accelerate launch`` or ``torchrun`` every process must call this with the same arguments: they share
    training and evaluation, the first one does the rest and writes, and all return the same.

    Args:
        recipe: From ``load_recipe``.
        out: New folder, or with ``resume`` the folder of an interrupted run of the same recipe.
        resume: Go on where an interrupted run stopped; the result equals that of an uninterrupted one.
        progress: For progress bars.

    Returns:
        Folder, comparison and manifest.

    Raises:
        NoAlphaError: ``negate.alpha`` is ``auto`` and no alpha will do: the folder stays, with the sweep in it.
        SkuError: Anything else a user can mend, in one line. A folder that this call made is removed then, unless
            another process failed: then it can be resumed.
    """
    return plan_run(recipe, out, resume=resume).execute(progress)


def plan_run(
    recipe: Recipe, out: Path, *, resume: bool = False, base_of: Path | None = None
) -> CommandPlan[FinishedRun]:
    """Checks all of a run but what only weights and training show, and plans it.

    Args:
        recipe: As in ``run_recipe``.
        out: As in ``run_recipe``.
        resume: As in ``run_recipe``.
        base_of: Folder of another run, whose evaluation of the base model is taken over as far as it fits.

    Raises:
        SkuError: As ``run_recipe``; also where the disk is too small.
    """
    processes = current_processes()
    check_one_process_attacks(recipe, processes)
    check_place(out)
    if base_of is not None and not (base_of / _BASE).is_dir():
        raise OutputError(f"{base_of} holds no evaluation of a base model: give the folder of another run")
    hazardous = method_named(recipe.method).negates
    if recipe.chooses_alpha:
        check_one_process()
    folder = RunFolder(out, processes)
    begun = processes.run_on_rank0(lambda: folder.check(recipe, resume=resume))
    decided = processes.run_on_rank0(lambda: _checkpointing(recipe, begun))
    run = resolve_method(with_checkpointing(recipe, decided))
    there = processes.run_on_rank0(lambda: bytes_in(out))
    prompts = processes.run_on_all_ranks(lambda: own_prompts_of(recipe)) if recipe.data.own_replies else None
    data, model, training, asked = processes.run_on_all_ranks(lambda: _checked(recipe, run, prompts))
    kept = hazardous and recipe.keep_bad_model is True
    settings = {
        "recipe": recipe.name, "method": recipe.method, "seed": recipe.seed, "model": model.describe(),
        "tuning": recipe.acquire.tuning, "steps": training.steps, "examples a step": training.batch,
        **({"twins": "each trained"} if has_twins(recipe) else {}),
        **({"activation checkpointing": decided.line} if decided else {}),
        "alpha": recipe.negate.alpha,
        "asked": asked,
    }  # fmt: skip
    planned = _Run(
        recipe=recipe, folder=folder, run=training.run, data=data if prompts is None else prompts, base_of=base_of,
        resume=resume, decided=decided,
    )  # fmt: skip
    return CommandPlan(
        command="sku run",
        out=out,
        settings=settings,
        execute=planned.execute,
        disk_bytes=training.peak_bytes + model.bytes(),
        disk_there=there,
        memory=lambda: memory_fit(with_checkpointing(recipe, decided)),
        bad_model="kept" if kept else "deleted at the end" if hazardous else "none",
        examples=training.examples,
        notes=(*([UNWRITTEN] if prompts else []), *data.notes(), *training.notes, *model.notes),
    )


def _checkpointing(recipe: Recipe, manifest: Mapping[str, Any]) -> Checkpointing | None:
    """What is decided now, or was when the run began: less memory may be free where it is resumed."""
    before = manifest.get("activation_checkpointing")
    return decide_checkpointing(recipe) if before is None else Checkpointing(**before)


def _checked(
    recipe: Recipe, run: MethodRun, prompts: OwnPrompts | None
) -> tuple[ForgetRetainData, CheckedModel, CheckedTraining, dict[str, int]]:
    """Data, model and training, and what is asked; with prompts the data are those of replies to come."""
    if prompts is not None:
        judge_of(recipe.evaluate, prompts)
        data = stand_in_data(recipe, prompts)
    else:
        data = load_recipe_data(recipe)
    _check_data(recipe, data)
    model = check_trained_model(recipe)
    asked = check_evaluation(recipe, model, data)
    if recipe.chooses_alpha or recipe.checks_stage_1:
        # The check of stage 1 asks no prefills, and what they begin with is not written yet where the model writes it.
        draw_questions(data, model.encoder(recipe), recipe, prefilled=recipe.chooses_alpha and prompts is None)
    return data, model, check_training(recipe, model, data, run), asked


def _check_data(recipe: Recipe, data: ForgetRetainData) -> None:
    """Refuses data with which a later stage of a run could not work, before any model is looked at."""
    check_attacks(recipe, data)
    check_judge(recipe, data)
    check_rows(recipe, data)


def _take_over(source: Path, target: Path) -> None:
    """Copies an evaluation; rows in it that don't fit are made anew."""
    if not target.exists():
        create_private_folder(target.parent)
        with new_folder(target, private=True) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)


def _remove_made(folder: RunFolder, missing: list[Path]) -> None:
    """Removes a run's folder and those above it that were missing, but not what another call made meanwhile."""
    if folder.is_new:
        remove_hazardous(folder.path)
    for parent in missing:
        with suppress(OSError):  # Not empty: another run has begun there.
            parent.rmdir()


@dataclass(kw_only=True)
class _Run:
    """The stages of one run, each of which finds what an interrupted run left."""

    recipe: Recipe
    folder: RunFolder
    run: MethodRun
    data: ForgetRetainData | OwnPrompts
    """Prompts where the model's own replies to them are written first."""
    base_of: Path | None
    resume: bool
    decided: Checkpointing | None

    def execute(self, progress: Progress | None) -> FinishedRun:
        """Does what was planned; what fails in a way that a user can mend leaves nothing of a new run."""
        folder, out, processes = self.folder, self.folder.path, self.folder.processes
        folder.progress = progress or folder.progress
        missing = processes.run_on_rank0(lambda: [place for place in out.parents if not place.exists()])
        try:
            folder.open(self.recipe, resume=self.resume)
            if self.base_of is not None:
                source = self.base_of / _BASE
                processes.run_on_rank0(lambda: _take_over(source, out / _BASE))
            if self.decided is not None:
                _log.info("activation checkpointing is %s", self.decided.line)
                folder.note(activation_checkpointing=dataclasses.asdict(self.decided))
            try:
                with named_memory_errors():  # Outside the stages too: what can be mended leaves no folder.
                    return self.finish()
            except NoAlphaError:  # The sweep stays for the user to look at, the bad model as after any run.
                self.unlearning.remove_trained()
                folder.note(bad_model={"kept": (out / "bad").exists()}, status="no_alpha")
                raise
            except BaseException:
                if processes.is_main and self.recipe.keep_bad_model == "never":
                    self.unlearning.remove_trained()
                raise
        except (NoAlphaError, ProcessError):  # The folder stays: with the sweep in it, or to be gone on with.
            raise
        except SkuError:
            if processes.is_main:
                _remove_made(folder, missing)
            raise
        finally:
            folder.close()

    @property
    def unlearning(self) -> Unlearning:
        """Stages 1 and 2, as far as they are known."""
        return Unlearning(self.recipe, self.folder, self.run)

    def finish(self) -> FinishedRun:
        """All stages, in order."""
        folder, processes = self.folder, self.folder.processes
        data = self.data if isinstance(self.data, ForgetRetainData) else self._own_replies(self.data)
        recipe = self.recipe
        with folder.timed("load"):
            data, loaded = processes.run_on_all_ranks(lambda: self._load(data))
        folder.note(
            data={
                "splits": data.counts(),
                "sources": [dataclasses.asdict(source) for source in data.provenance],
                "notes": list(data.notes()),
            },
            model={
                "name": loaded.name,
                "revision": loaded.revision,
                "license": own_license(recipe.model),
                "parameters": loaded.model.num_parameters(),
                "trainable": loaded.model.num_parameters(only_trainable=True),
            },
        )
        measuring = Measuring(recipe, loaded.tokenizer, data, folder.path / "evaluation", folder.progress)
        with folder.timed("evaluate_base"):
            before = measuring.evaluated("base", loaded.model, loaded.model)
        if processes.run_on_rank0(self.unlearning.unlearned_folder.exists):
            base, unlearned = loaded.model, self.unlearning.unlearned()
        else:
            held = [loaded]
            del loaded  # So that its memory is free for the models that are read anew.
            base, unlearned = self.unlearning.models(held, data)
        # The unlearned model stands: nothing needs the bad one any more.
        processes.run_on_rank0(self.unlearning.remove_trained)
        with folder.timed("evaluate_unlearned"):
            after = measuring.evaluated("unlearned", unlearned, base, starts=before.starts)
        measured = measuring.compared(before, after, base, unlearned, folder.timed)
        return processes.run_on_rank0(lambda: self._report(measured))

    def _own_replies(self, prompts: OwnPrompts) -> ForgetRetainData:
        """Data that the first process has the original model write; the recipe becomes one of these files."""
        folder, processes = self.folder, self.folder.processes
        with folder.timed("own_replies"):
            self.recipe, record = processes.run_on_rank0(
                lambda: with_own_replies(self.recipe, folder.path, prompts, progress=folder.progress)
            )
        folder.note(own_replies=record)
        return processes.run_on_all_ranks(lambda: load_own_data(self.recipe, prompts))

    def _load(self, data: ForgetRetainData) -> tuple[ForgetRetainData, LoadedModel]:
        """The data with what training visits of them, and the model."""
        loaded = load_model(with_safe_dtype(self.recipe), four_bit=False)
        if data is not self.data:  # Not what the plan saw.
            _check_data(self.recipe, data)
            self.run = self.run.tokenized(self.recipe, data, loaded.tokenizer, loaded.model)
        assert self.run.joint is not None
        visited = visited_examples(self.run.joint, self.run.training, processes=self.folder.processes.count)
        return dataclasses.replace(data, visited=visited), loaded

    def _report(self, measured: MeasuredPair) -> FinishedRun:
        """Writes ``results.json`` and its figure, with the manifest as it is when the run is complete."""
        from sku.report.figures import before_after_figure  # Imports matplotlib, which a plan has no use for.

        folder, out = self.folder, self.folder.path
        folder.note(bad_model={"kept": (out / "bad").exists()})
        for suffix in ("png", "svg"):
            before_after_figure(measured.comparison, out / f"before_after.{suffix}")
        plain = measured.comparison.to_dict()
        results = {
            "schema_version": RECORD_VERSION,
            "verdict": plain.pop("verdict"),
            "table": [dataclasses.asdict(row) for row in before_after_rows(measured.comparison)],
            **plain,
            **measured.reports(),
            "manifest": {**folder.manifest, "status": "complete"},
        }
        write_json(out / "results.json", results)
        write_cards(out, within_run=True)
        folder.note(status="complete")
        return FinishedRun(folder=out, manifest=folder.manifest, **vars(measured))
