"""A whole run, from data to the comparison of before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.results import AttackReport
from sku.attacks.run import check_attacks, run_attacks
from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.prompt_sets import wants_own_replies
from sku.errors import NoAlphaError, ProcessError, SkuError
from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.precision_results import PrecisionReport
from sku.evaluate.records import Start
from sku.evaluate.results import EvaluationResult
from sku.evaluate.run import Progress
from sku.memory_errors import named_memory_errors
from sku.methods.run import check_rows, prepare, with_safe_dtype
from sku.methods.visits import with_visited
from sku.models import LoadedModel, describe_parameters, load_model, own_license
from sku.negate.operators.base import check_operators
from sku.pipeline.evaluate import (
    check_one_process_attacks,
    evaluate_one,
    measure_recipe_precisions,
    readable_source,
)
from sku.pipeline.own_replies import OwnData, with_own_replies
from sku.pipeline.recipe_data import load_recipe_data
from sku.pipeline.results import write_results
from sku.pipeline.run_folder import RunFolder
from sku.pipeline.unlearning import Unlearning
from sku.processes import Processes, current_processes
from sku.report.card import write_cards
from sku.storage import check_place, remove_hazardous
from sku.sweep.run import check_judge, check_one_process


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run gives back."""

    folder: Path
    comparison: Comparison
    manifest: dict[str, Any]
    attacks: AttackReport | None = None
    """Where ``evaluate.attacks`` names some."""
    precisions: PrecisionReport | None = None
    """Where ``evaluate.precisions`` names some."""


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
    processes = current_processes()
    check_one_process_attacks(recipe, processes)
    check_place(out)
    missing = processes.on_main(lambda: [folder for folder in out.parents if not folder.exists()])
    run = _Run(recipe, out, progress or (lambda _stage, _done, _total: None), processes)
    try:
        run.open_folder(resume=resume)
        try:
            with named_memory_errors():  # Outside the stages too: what can be mended leaves no folder.
                return run.finish()
        except NoAlphaError:
            run.give_up()
            raise
        except BaseException:
            if processes.is_main:
                run.remove_after_failure()
            raise
    except (NoAlphaError, ProcessError):  # The folder stays: with the sweep in it, or to be gone on with.
        raise
    except SkuError:
        if processes.is_main:
            _remove_made(run.folder, missing)
        raise
    finally:
        run.folder.close()


def _remove_made(folder: RunFolder, missing: list[Path]) -> None:
    """Removes a run's folder and those above it that were missing, but not what another call made meanwhile."""
    if folder.is_new:
        remove_hazardous(folder.path)
    for parent in missing:
        with suppress(OSError):  # Not empty: another run has begun there.
            parent.rmdir()


class _Run:
    """The stages of one run, each of which finds what an interrupted run left."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress, processes: Processes) -> None:
        self.recipe, self.out, self.progress, self.processes = recipe, out, progress, processes
        self.folder = RunFolder(out, processes, progress)
        self.unlearning = Unlearning(recipe, self.folder)
        self.own: OwnData | None = None

    def open_folder(self, *, resume: bool) -> None:
        """Makes the run folder, or checks that it belongs to an interrupted run of this recipe."""
        # Refused before anything is loaded: a wrong training setting must not cost an evaluation.
        prepare(self.recipe, self.unlearning.trained_folder)
        if self.recipe.chooses_alpha:
            check_one_process()
        self.folder.open(self.recipe, self.unlearning.trained_folder, resume=resume)

    def finish(self) -> FinishedRun:
        """All stages, in order."""
        self._take_own_replies()
        recipe = self.recipe
        with self.folder.timed("load"):
            data, loaded = self.processes.everywhere(self._load)
        self.folder.note(
            data={
                "splits": data.counts(),
                "sources": [dataclasses.asdict(source) for source in data.provenance],
                "notes": list(data.notes()),
            },
            model={
                "name": loaded.name,
                "revision": loaded.revision,
                "license": own_license(recipe.model),
                **describe_parameters(loaded.model),
            },
        )
        tokenizer = loaded.tokenizer
        with self.folder.timed("evaluate_base"):
            base_result = self._evaluate(loaded.model, tokenizer, data, "base", loaded.model)
        if self.processes.on_main((self.out / "unlearned").exists):
            base, unlearned = loaded.model, load_model(self.unlearning.unlearned_config()).model
        elif self.processes.count > 1:
            held = [loaded]
            del loaded  # So that its memory is free for the models that are read anew.
            base, unlearned = self.unlearning.by_all_processes(held, data)
        else:
            base, unlearned = self.unlearning.by_one_process(loaded, data)
        # The unlearned model stands: nothing needs the bad one any more.
        self.processes.on_main(self.unlearning.remove_trained)
        with self.folder.timed("evaluate_unlearned"):
            result = self._evaluate(unlearned, tokenizer, data, "unlearned", base, base_result.starts)
        comparison = compare(base_result, result, seed=recipe.seed)
        precisions = attacks = None
        if recipe.evaluate.precisions:
            with self.folder.timed("precisions"):
                precisions = measure_recipe_precisions(
                    recipe,
                    unlearned,
                    base,
                    tokenizer,
                    data,
                    comparison,
                    self.out / "evaluation",
                    self.progress,
                )
            self.folder.note(certificate=precisions.certificate())
        if recipe.evaluate.attacks:
            with self.folder.timed("attacks"):
                attacks = run_attacks(
                    recipe,
                    unlearned,
                    base,
                    tokenizer,
                    data,
                    output_dir=self.out / "evaluation",
                    starts=base_result.starts,
                    progress=self.progress,
                )
        return self.processes.on_main(lambda: self._report(comparison, precisions, attacks))

    def _take_own_replies(self) -> None:
        """Has the original model write the data where the recipe wants its own replies; the first process does it."""
        if not self.processes.on_main(lambda: wants_own_replies(self.recipe.data)):
            return
        with self.folder.timed("own_replies"):
            own = self.processes.on_main(lambda: with_own_replies(self.recipe, self.out, progress=self.progress))
        self.own, self.recipe = own, own.recipe
        self.unlearning = Unlearning(self.recipe, self.folder)
        self.folder.note(own_replies=self.own.record)

    def _load(self) -> tuple[ForgetRetainData, LoadedModel]:
        data = load_recipe_data(self.recipe) if self.own is None else self.own.load()
        check_attacks(self.recipe, data)
        check_judge(self.recipe, data)
        check_rows(self.recipe, data)
        loaded = load_model(with_safe_dtype(self.recipe), four_bit=False)
        operators = prepare(self.recipe, self.unlearning.trained_folder).operators
        check_operators(operators, loaded.model, data)
        visits = with_visited(self.recipe, data, loaded.tokenizer, loaded.model, processes=self.processes.count)
        return visits, loaded

    def _evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: ForgetRetainData,
        name: str,
        base: PreTrainedModel,
        starts: Sequence[Start] | None = None,
    ) -> EvaluationResult:
        folder = self.out / "evaluation" / name
        source = readable_source(self.recipe.model) if name == "base" else self.out / name
        return evaluate_one(self.recipe, model, tokenizer, data, base, folder, self.progress, source, starts)

    def _report(
        self, comparison: Comparison, precisions: PrecisionReport | None, attacks: AttackReport | None
    ) -> FinishedRun:
        self.folder.note(bad_model={"kept": (self.out / "bad").exists()})
        write_results(self.out, comparison, precisions, attacks, {**self.folder.manifest, "status": "complete"})
        write_cards(self.out, within_run=True)
        self.folder.note(status="complete")
        return FinishedRun(
            folder=self.out,
            comparison=comparison,
            manifest=self.folder.manifest,
            attacks=attacks,
            precisions=precisions,
        )

    def give_up(self) -> None:
        """Where no alpha will do: the sweep stays for the user to look at, the bad model as after any run."""
        self.unlearning.remove_trained()
        self.folder.note(bad_model={"kept": (self.out / "bad").exists()}, status="no_alpha")

    def remove_after_failure(self) -> None:
        """Removes what an unfinished run trained, where the recipe says that it must not wait for ``--resume``."""
        if not self.recipe.keep_for_resume:
            self.unlearning.remove_trained()
