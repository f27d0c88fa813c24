"""A whole run: data, training, the change of the weights, evaluation. The only file that knows all stages.

A run folder, private to its owner because the base model's harmful replies lie in it::

    manifest.json        recipe, seeds, data hashes, versions, hardware, timings, what became of the bad model
    training_log.jsonl   every loss term of every logged step
    bad/                 checkpoints of the bad model; deleted at the end unless it is kept on purpose
    trained/             in its place for methods that train no bad model; always deleted at the end
    unlearned/           the model to use, with its tokenizer and model card
    negated_adapter/     the same without merging, for LoRA and QLoRA; adapter/ for methods that don't negate
    sweep/               sweep.json and frontier.png, .svg: the choice of alpha where negate.alpha is auto
    evaluation/base/, evaluation/unlearned/
    evaluation/precisions.json, evaluation/precisions/   where evaluate.precisions names some
    evaluation/attacks.json, evaluation/attacks/   where evaluate.attacks names some
    results.json         before and after, with intervals; the attacks too, where there are any
    before_after.png, before_after.svg
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.acquire.objective import check_compat
from sku.acquire.run import acquire, trainer_settings
from sku.attacks.results import AttackReport
from sku.attacks.run import check_attacks, run_attacks
from sku.config import EMBEDDED, ModelConfig, Precision, Recipe
from sku.data.examples import ForgetRetainData
from sku.data.load import load_data
from sku.errors import (
    EvaluationError,
    ModelError,
    NoAlphaError,
    OutputError,
    ProcessError,
    RecipeError,
    SkuError,
    TaskVectorError,
)
from sku.evaluate.comparison import Comparison, LeakChange, RateChange, compare
from sku.evaluate.precision_results import PrecisionReport
from sku.evaluate.precisions import SurvivalBy, measure_precisions
from sku.evaluate.record_files import create_private_folder
from sku.evaluate.results import EvaluationResult
from sku.evaluate.run import evaluate
from sku.methods import method_named
from sku.methods.base import negated
from sku.methods.run import MethodRun, change_of, prepare, train_method, with_safe_dtype
from sku.models import LoadedModel, describe_parameters, load_config, load_model, own_license, pick_device, with_path
from sku.negate.adapters import AdapterVector, load_adapter
from sku.negate.diagnostics import diagnose
from sku.negate.operators import OperatedVector, operate
from sku.negate.operators.base import OperatorContext
from sku.negate.operators.context import context_of
from sku.negate.run import negate_with_record, save_negated_adapter, save_unlearned
from sku.negate.survival import delta_survival, model_survival
from sku.negate.task_vector import TaskVector
from sku.processes import Processes, current_processes, shared_new_folder
from sku.report.figures import before_after_figure
from sku.report.tables import before_after_rows
from sku.reproducibility import content_sha256, environment
from sku.sharing.card import write_cards
from sku.storage import HAZARD_KEY, is_marked_hazardous, mark_hazardous, new_folder, remove_hazardous, write_json
from sku.sweep.bad_model import check_same_training, record_training
from sku.sweep.from_bad_model import sweep_bad_model
from sku.sweep.result import Sweep
from sku.sweep.run import check_one_process, sweep
from sku.training.run import Trained, step_progress

MANIFEST_SCHEMA = 1
Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done and how much there is."""


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
    _check_one_process_attacks(recipe, processes)
    made = processes.on_main(lambda: [folder for folder in (out, *out.parents) if not folder.exists()])
    run = _Run(recipe, out, progress or (lambda _stage, _done, _total: None), processes)
    try:
        run.open_folder(resume=resume)
        try:
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
            _remove_made(out, made)
        raise


def _remove_made(out: Path, made: list[Path]) -> None:
    if out in made:
        remove_hazardous(out)
    for parent in made[1:]:
        with suppress(OSError):  # Not empty: another run has begun there.
            parent.rmdir()


def _check_one_process_attacks(recipe: Recipe, processes: Processes) -> None:
    """Attacks train and quantize copies of their own, in one process."""
    if processes.count > 1 and recipe.evaluate.attacks:
        raise EvaluationError(
            "evaluate.attacks run in one process: set evaluate.attacks=[] here, and start sku evaluate with them "
            "afterwards without a launcher"
        )


def acquire_recipe(recipe: Recipe, out: Path, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Stage 1 alone: trains the bad model of a recipe into a new private, marked folder.

    Args:
        recipe: From ``load_recipe``.
        out: New folder: an adapter, or a whole model for full fine-tuning.
        progress: For progress bars.

    Returns:
        The training log, one entry a logged step.

    Raises:
        SkuError: Anything a user can mend.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no stage 1: use sku run")
    config = with_safe_dtype(recipe)
    processes = current_processes()
    device = pick_device(config.device).type
    with shared_new_folder(processes, out, private=True) as temporary:
        checkpoints = temporary / "checkpoints"
        settings = trainer_settings(recipe.acquire, recipe.data, seed=recipe.seed, folder=checkpoints, device=device)
        check_compat(recipe.acquire, recipe.compat, settings.max_steps)
        loaded = load_model(config, four_bit=recipe.acquire.tuning == "qlora")
        data = _load_data(recipe)
        acquired = acquire(
            loaded,
            data,
            recipe.acquire,
            recipe.data,
            seed=recipe.seed if recipe.acquire.seed is None else recipe.acquire.seed,
            folder=checkpoints,
            prompt_format=recipe.model.prompt_format,
            callbacks=step_progress(progress),
            compat=recipe.compat,
        )
        processes.on_main(lambda: shutil.rmtree(checkpoints))
        processes.on_main(lambda: _mark_trained(temporary, recipe, data))
        acquired.save(temporary)
        processes.on_main(lambda: mark_hazardous(temporary))  # Again, for its configuration.
    return acquired.log


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
    # Stage 1 must hold out what alpha is then chosen by.
    recipe = dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, alpha="auto"))
    if not recipe.chooses_alpha:
        raise RecipeError(f"the recipe's method is {recipe.method}, which has no alpha to choose: use sku compare")
    check_one_process()
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
    found = sweep_bad_model(recipe, trained, _load_data(recipe), out, progress=progress)
    if bad is None and not keep_bad_model:
        remove_hazardous(trained)
    return found


def _load_data(recipe: Recipe) -> ForgetRetainData:
    return load_data(
        recipe.data, recipe.seed, row_split=recipe.compat.row_split, forget_validation=recipe.forget_validation
    )


def _mark_trained(folder: Path, recipe: Recipe, data: ForgetRetainData) -> None:
    """Marks the folder of a bad model before there is anything to find, and says what it is trained on."""
    mark_hazardous(folder)
    record_training(folder, recipe, data)


def evaluate_recipe(
    recipe: Recipe, model: str, out: Path, *, progress: Progress | None = None, allow_hazardous: bool = False
) -> Comparison:
    """Measures a model and the recipe's base on the recipe's held-out and trained-on prompts, then attacks both.

    What the attacks that ``evaluate.attacks`` names come to is written to ``attacks.json`` in the folder, what the
    model says at the precisions that ``evaluate.precisions`` names to ``precisions.json``.

    Args:
        recipe: Its model is the base.
        model: Folder or hub id of the model to measure.
        out: Private folder; rows in it that fit are reused.
        progress: For progress bars.
        allow_hazardous: Measure a model that is marked as the bad one of stage 1 too.

    Returns:
        The comparison.

    Raises:
        SkuError: Anything a user can mend.
    """
    if not allow_hazardous and _is_bad_model(recipe, model):
        raise ModelError(
            f"{model} is a bad model of stage 1; evaluate the unlearned model instead, or add --allow-hazardous"
        )
    # Before any model is loaded: each process takes its own GPU.
    _check_one_process_attacks(recipe, current_processes())
    data = _load_data(recipe)
    check_attacks(recipe, data)
    base = load_model(recipe.model)
    measured = load_model(with_path(recipe.model, model))
    before, after = (
        _evaluate(recipe, candidate.model, candidate.tokenizer, data, base.model, out / name, progress, source)
        for name, candidate, source in (("base", base, _source(recipe.model)), ("model", measured, model))
    )
    comparison = compare(before, after, seed=recipe.seed)
    if recipe.evaluate.precisions:
        _measure_precisions(recipe, measured.model, base.model, base.tokenizer, data, comparison, out, progress)
    if recipe.evaluate.attacks:
        run_attacks(recipe, measured.model, base.model, base.tokenizer, data, output_dir=out, progress=progress)
    return comparison


def _evaluate(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    base: PreTrainedModel,
    folder: Path,
    progress: Progress | None,
    source: str | Path | None,
) -> EvaluationResult:
    """One evaluation with a recipe's settings, named after its folder."""
    name = folder.name
    return evaluate(
        model,
        tokenizer,
        data,
        config=recipe.evaluate,
        prompt_format=recipe.model.prompt_format,
        base_model=base,
        output_dir=folder,
        model_name=name,
        model_source=source,
        seed=recipe.seed,
        progress=(lambda stage, *counts: progress(f"evaluate {name}: {stage}", *counts)) if progress else None,
    )


def _measure_precisions(
    recipe: Recipe,
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    comparison: Comparison,
    folder: Path,
    progress: Progress | None,
) -> PrecisionReport:
    """The certificate of a model, with a recipe's settings."""
    return measure_precisions(
        model,
        base,
        tokenizer,
        data,
        comparison,
        config=recipe.evaluate,
        prompt_format=recipe.model.prompt_format,
        survival=_survival_of(base, model),
        output_dir=folder,
        seed=recipe.seed,
        progress=progress,
    )


def _survival_of(base: PreTrainedModel, model: PreTrainedModel) -> SurvivalBy:
    """What rounding leaves of the change; nothing for a model of another shape, which is no change of the base."""

    def survival(names: Sequence[Precision]) -> Mapping[str, Mapping[str, Any]]:
        try:
            return model_survival(base, model, names)
        except TaskVectorError:
            return {}

    return survival


def _is_bad_model(recipe: Recipe, model: str) -> bool:
    """Whether a folder is marked, or a hub model's configuration is."""
    folder = Path(model).expanduser()
    if folder.exists():
        return is_marked_hazardous(folder)
    return bool(getattr(load_config(with_path(recipe.model, model)), HAZARD_KEY, False))


def _source(config: ModelConfig) -> str | None:
    """Where another engine can read a model from: GGUF files and the embedded model have no such place."""
    return None if config.gguf_file is not None or config.path == EMBEDDED else config.path


@dataclass(frozen=True, kw_only=True)
class _Operated:
    """What is subtracted, and where it comes from, where operators or diagnostics need to know."""

    vector: TaskVector
    found: OperatedVector | None = None
    context: OperatorContext | None = None


class _Run:
    """The stages of one run, each of which finds what an interrupted run left."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress, processes: Processes) -> None:
        self.recipe, self.out, self.progress, self.processes = recipe, out, progress, processes
        self.manifest: dict[str, Any] = {}
        self.method = method_named(recipe.method)
        self.trained_folder = out / ("bad" if self.method.hazardous else "trained")

    def open_folder(self, *, resume: bool) -> None:
        """Makes the run folder, or checks that it belongs to an interrupted run of this recipe."""
        # Refused before anything is loaded: a wrong training setting must not cost an evaluation.
        prepare(self.recipe, self.trained_folder, device=pick_device(self.recipe.model.device).type)
        if self.recipe.chooses_alpha:
            check_one_process()
        self.manifest = self.processes.on_main(lambda: self._opened_manifest(resume=resume))

    def _opened_manifest(self, *, resume: bool) -> dict[str, Any]:
        recipe = self.recipe.to_dict()
        fresh = {
            "schema_version": MANIFEST_SCHEMA,
            "status": "running",
            "recipe": recipe,
            "recipe_sha256": content_sha256(recipe),
            "environment": environment(),
            "processes": self.processes.count,
            "seconds": {},
        }
        if not self.out.exists():
            with new_folder(self.out, private=True) as temporary:
                write_json(temporary / "manifest.json", fresh)
        elif not resume:
            raise OutputError(f"{self.out} already exists; choose another --out, or add --resume to go on with it")
        manifest = _read_manifest(self.out)
        if manifest["recipe_sha256"] != fresh["recipe_sha256"]:
            raise OutputError(f"{self.out} belongs to a run with another recipe; choose another --out")
        if manifest["status"] == "complete":
            raise OutputError(f"the run in {self.out} is already complete; choose another --out")
        begun_with = manifest.setdefault("processes", 1)
        if begun_with != self.processes.count and list(self.trained_folder.glob("checkpoint-*")):
            raise OutputError(
                f"the run in {self.out} was begun with {begun_with} processes, and checkpoints fit no other number: "
                f"start {begun_with} here too, not {self.processes.count}, or choose another --out"
            )
        return manifest

    def finish(self) -> FinishedRun:
        """All stages, in order."""
        recipe = self.recipe
        with self._timed("load"):
            data, loaded = self.processes.everywhere(self._load)
        self._note(
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
        with self._timed("evaluate_base"):
            base_result = self._evaluate(loaded.model, tokenizer, data, "base", loaded.model)
        if self.processes.on_main((self.out / "unlearned").exists):
            base, unlearned = loaded.model, load_model(self._unlearned_config()).model
        elif self.processes.count > 1:
            held = [loaded]
            del loaded  # So that its memory is free for the models that are read anew.
            base, unlearned = self._unlearn_together(held, data)
        else:
            base, unlearned = self._unlearn(loaded, data)
        self.processes.on_main(self._remove_trained)  # The unlearned model stands: nothing needs the bad one any more.
        with self._timed("evaluate_unlearned"):
            result = self._evaluate(unlearned, tokenizer, data, "unlearned", base)
        comparison = compare(base_result, result, seed=recipe.seed)
        precisions = attacks = None
        if recipe.evaluate.precisions:
            with self._timed("precisions"):
                precisions = _measure_precisions(
                    recipe,
                    unlearned,
                    base,
                    tokenizer,
                    data,
                    comparison,
                    self.out / "evaluation",
                    self.progress,
                )
            self._note(certificate=precisions.certificate())
        if recipe.evaluate.attacks:
            with self._timed("attacks"):
                attacks = run_attacks(
                    recipe,
                    unlearned,
                    base,
                    tokenizer,
                    data,
                    output_dir=self.out / "evaluation",
                    progress=self.progress,
                )
        return self.processes.on_main(lambda: self._report(comparison, precisions, attacks))

    def _load(self) -> tuple[ForgetRetainData, LoadedModel]:
        data = _load_data(self.recipe)
        check_attacks(self.recipe, data)
        return data, load_model(with_safe_dtype(self.recipe), four_bit=False)

    def _unlearn_together(
        self, held: list[LoadedModel], data: ForgetRetainData
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Stage 1 by all processes, and stage 2 by the first one from what it saved, as in a run that is resumed.

        ``held`` holds the original model, and nothing afterwards.
        """
        config = with_safe_dtype(self.recipe)
        if not self.processes.on_main((self.trained_folder / "final").exists):
            if self.recipe.acquire.tuning == "qlora":
                held[0] = self.processes.everywhere(lambda: load_model(config, four_bit=True))
            with self._timed("acquire"):
                self._train(held[0], data)
        # Training may have left each process a part of the weights, and its own buffers: all is read anew.
        held.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.processes.on_main(lambda: self._unlearn_alone(data))
        return self.processes.everywhere(
            lambda: (load_model(config).model, load_model(self._unlearned_config()).model)
        )

    def _unlearn_alone(self, data: ForgetRetainData) -> None:
        self._unlearn(load_model(with_safe_dtype(self.recipe), four_bit=False), data)

    def _unlearn(self, loaded: LoadedModel, data: ForgetRetainData) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Stages 1 and 2; returns the original and the unlearned model."""
        recipe = self.recipe
        if recipe.acquire.tuning == "qlora":
            loaded = load_model(with_safe_dtype(self.recipe), four_bit=True)
        with self._timed("acquire"):
            trained = self._trained_model(loaded, data)
        run = prepare(recipe, self.trained_folder)
        with self._timed("negate"):
            factors = None
            if isinstance(trained, PeftModel):
                change = change_of(self.method, trained)
                factors = self._factors(trained, run)
                base = (
                    trained.unload()
                    if recipe.acquire.tuning == "lora"
                    else load_model(with_safe_dtype(self.recipe)).model
                )
            else:
                base = load_model(with_safe_dtype(self.recipe)).model
                change = change_of(self.method, trained, base)
            operated = self._operated(-change, run, base, loaded.tokenizer, data)
        if recipe.chooses_alpha:
            with self._timed("sweep"):
                run = dataclasses.replace(run, strength=self._chosen(operated.vector, base, loaded.tokenizer, data))
        with self._timed("negate"):
            vector, account = operated.vector, self._account(operated, run, base, factors)
            dtype = recipe.negate.output_dtype
            unlearned, negation = negate_with_record(
                base, vector, run.strength, output_dtype=None if dtype == "same" else getattr(torch, dtype)
            )
            # Noted before it is saved: a resumed run that finds the model doesn't subtract again.
            self._note(negation={**negation.to_dict(), **account})
            save_unlearned(unlearned, loaded.tokenizer, self.out / "unlearned")
        return base, unlearned

    def _factors(self, trained: PeftModel, run: MethodRun) -> AdapterVector | None:
        """The adapter's factors where operators or the choice of alpha follow; else it is saved as it is, negated."""
        follows = bool(run.operators) or self.recipe.chooses_alpha
        if not follows:
            self._save_adapter(trained, run.strength)
        try:
            return AdapterVector.of(trained)
        except TaskVectorError as error:
            if follows:
                self._note(negated_adapter=f"not saved: {error}")
            return None

    def _operated(
        self,
        vector: TaskVector,
        run: MethodRun,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: ForgetRetainData,
    ) -> _Operated:
        """What is subtracted."""
        recipe = self.recipe
        if self.method.weight_step is not negated or not (run.operators or recipe.negate.diagnostics):
            return _Operated(vector=vector)
        cache = recipe.negate.operator_cache
        context = context_of(
            base,
            tokenizer,
            data,
            recipe.data,
            prompt_format=recipe.model.prompt_format,
            seed=recipe.seed,
            cache=None if cache is None else Path(cache),
        )
        found = operate(vector, run.operators, context)
        return _Operated(vector=found.vector, found=found, context=context)

    def _chosen(
        self, vector: TaskVector, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: ForgetRetainData
    ) -> float:
        """Alpha, chosen on the validation splits; noted with its reason."""
        found = sweep(base, vector, tokenizer, data, self.recipe, self.out / "sweep", progress=self.progress)
        assert found.pick is not None
        self._note(sweep=dataclasses.asdict(found.pick))
        try:
            return found.alpha()
        except NoAlphaError as error:
            raise NoAlphaError(f"{error}; all points are in {self.out / 'sweep'}") from None

    def _account(
        self, operated: _Operated, run: MethodRun, base: PreTrainedModel, factors: AdapterVector | None
    ) -> dict[str, Any]:
        """An account of what is subtracted; the adapter follows operators and alpha where it can."""
        found = operated.found
        if factors is not None and found is not None:
            factors = None if found.row_maps is None else factors.mapped(found.row_maps)
        if run.operators or self.recipe.chooses_alpha:
            self._save_factors(factors, run)
        if found is None or operated.context is None:
            return {}
        account: dict[str, Any] = {"operators": list(found.records)}
        if self.recipe.negate.diagnostics:
            account["diagnostics"] = diagnose(found.vector, operated.context, adapter=factors)
            if run.strength:
                account["survival_by_format"] = delta_survival(base, found.vector, run.strength)
        return account

    def _save_factors(self, factors: AdapterVector | None, run: MethodRun) -> None:
        if factors is not None:
            (-run.strength * factors).save(self.out / "negated_adapter", overwrite=True)
        elif self.recipe.acquire.tuning != "full" and "negated_adapter" not in self.manifest:
            names = ", ".join(prepared.operator.name for prepared in run.operators)
            self._note(negated_adapter=f"not saved: the operators ({names}) change single entries of the weights")

    def _save_adapter(self, trained: PeftModel, strength: float) -> None:
        """The change without merging, where the weight step is none or the negation: others don't fit an adapter."""
        negates = self.method.weight_step is negated
        folder = self.out / ("negated_adapter" if negates else "adapter")
        if folder.exists() or (self.method.weight_step is not None and not negates):
            return
        save_negated_adapter(trained, strength if negates else -strength, folder)

    def _trained_model(self, loaded: LoadedModel, data: ForgetRetainData) -> PreTrainedModel | PeftModel:
        """The trained model of an earlier try, or a newly trained one."""
        recipe, folder = self.recipe, self.trained_folder
        final = folder / "final"
        if final.exists():
            if recipe.acquire.tuning == "full":
                return load_model(with_path(with_safe_dtype(self.recipe), final)).model
            return load_adapter(loaded.model, final)
        return self._train(loaded, data).model

    def _train(self, loaded: LoadedModel, data: ForgetRetainData) -> Trained:
        """Stage 1 by all processes; its result lies in ``final`` afterwards."""
        trained = train_method(self.recipe, loaded, data, self.trained_folder, step_progress(self.progress))
        self.processes.on_main(lambda: self._write_log(trained))
        with shared_new_folder(self.processes, self.trained_folder / "final", private=True) as temporary:
            if self.method.hazardous:
                self.processes.on_main(lambda: _mark_trained(temporary, self.recipe, data))
            trained.save(temporary)
            if self.method.hazardous:
                self.processes.on_main(lambda: mark_hazardous(temporary))  # Again, for its configuration.
        return trained

    def _write_log(self, acquired: Trained) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in acquired.log)
        path = self.out / "training_log.jsonl"
        try:
            path.write_text(lines, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} can't be written: {error.strerror}") from error
        self._note(
            tokenization={name: dataclasses.asdict(report) for name, report in acquired.reports.items()},
            training={"steps": acquired.log[-1]["step"] if acquired.log else 0, "seconds": acquired.seconds},
        )

    def _evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: ForgetRetainData,
        name: str,
        base: PreTrainedModel,
    ) -> EvaluationResult:
        folder = self.out / "evaluation" / name
        source = _source(self.recipe.model) if name == "base" else self.out / name
        return _evaluate(self.recipe, model, tokenizer, data, base, folder, self.progress, source)

    def _report(
        self, comparison: Comparison, precisions: PrecisionReport | None, attacks: AttackReport | None
    ) -> FinishedRun:
        rows = [dataclasses.asdict(row) for row in before_after_rows(comparison)]
        for suffix in ("png", "svg"):
            before_after_figure(comparison, self.out / f"before_after.{suffix}")
        self._note(bad_model={"kept": (self.out / "bad").exists()})
        write_json(
            self.out / "results.json",
            {
                "schema_version": MANIFEST_SCHEMA,
                "table": rows,
                "replies": _plain(comparison.replies),
                "prefill": _plain(comparison.prefill),
                "samples": _plain(comparison.samples),
                "leak": _plain(comparison.leak),
                "perplexity": {split: dataclasses.asdict(change) for split, change in comparison.perplexity.items()},
                "utility": {split: dataclasses.asdict(found) for split, found in comparison.utility.items()},
                "notes": comparison.notes,
                "base": comparison.base.to_dict(),
                "unlearned": comparison.unlearned.to_dict(),
                **({} if precisions is None else {"precisions": precisions.to_dict()}),
                **({} if attacks is None else {"attacks": attacks.to_dict()}),
                "manifest": {**self.manifest, "status": "complete"},
            },
        )
        write_cards(self.out, within_run=True)
        self._note(status="complete")
        return FinishedRun(
            folder=self.out, comparison=comparison, manifest=self.manifest, attacks=attacks, precisions=precisions
        )

    def give_up(self) -> None:
        """Where no alpha will do: the sweep stays for the user to look at, the bad model as after any run."""
        self._remove_trained()
        self._note(bad_model={"kept": (self.out / "bad").exists()}, status="no_alpha")

    def _remove_trained(self) -> None:
        if not (self.recipe.keep_bad_model and self.method.hazardous):
            remove_hazardous(self.trained_folder)

    def remove_after_failure(self) -> None:
        """Removes what an unfinished run trained, where the recipe says that it must not wait for ``--resume``."""
        if not self.recipe.keep_for_resume:
            self._remove_trained()

    def _unlearned_config(self) -> ModelConfig:
        dtype = self.recipe.negate.output_dtype
        config = with_path(with_safe_dtype(self.recipe), self.out / "unlearned")
        return config if dtype == "same" else dataclasses.replace(config, dtype=dtype)

    def _note(self, **entries: Any) -> None:
        self.manifest.update(copy.deepcopy(entries))
        if self.processes.is_main:
            write_json(self.out / "manifest.json", self.manifest)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self.progress(stage, 0, 1)
        started = time.monotonic()
        yield
        seconds = self.manifest["seconds"]
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 2)
        self._note(seconds=seconds)
        self.progress(stage, 1, 1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"{folder} is no run folder: it has no manifest.json; choose another --out") from None
    except ValueError as error:
        raise OutputError(f"{folder / 'manifest.json'} is damaged ({error}); choose another --out") from error
    if not isinstance(content, dict) or content.get("schema_version") != MANIFEST_SCHEMA:
        raise OutputError(f"{folder / 'manifest.json'} is not of this version of SKU; choose another --out")
    return content


def _plain(changes: Mapping[str, Mapping[str, RateChange | LeakChange]]) -> dict[str, dict[str, Any]]:
    return {
        split: {name: dataclasses.asdict(change) for name, change in rates.items()} for split, rates in changes.items()
    }
