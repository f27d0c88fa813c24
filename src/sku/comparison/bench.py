"""The bench: data, base model and evaluator that every job of a comparison shares, in one process."""

from __future__ import annotations

import copy
import dataclasses
import gc
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sku.comparison.jobs import Job, changed, norms_key, record_key, record_of
from sku.comparison.search import SEARCH_SUFFIX, Harm, Strengths, Trial, search, search_judge, with_training
from sku.config import CompareConfig, Recipe
from sku.data.load import load_data
from sku.errors import EvaluationError, SkuError, TaskVectorError, first_line, one_line
from sku.evaluate import asking
from sku.evaluate.batching import StageProgress
from sku.evaluate.generation import fingerprint, probes_of
from sku.evaluate.replies import Asker
from sku.evaluate.results import EvaluationResult
from sku.evaluate.run import always_gibberish, always_refuse, evaluate, evaluate_replies
from sku.evaluate.utility_cost import Utility, utility_cost
from sku.evaluate.validation import NormalText, Refusals, validation_texts
from sku.methods import method_named
from sku.methods.run import (
    common_visits,
    prepare,
    subtracted_by,
    train_method,
    with_safe_dtype,
    with_visited,
)
from sku.models import load_model
from sku.negate.run import transformed
from sku.negate.task_vector import TaskVector
from sku.report.method_records import MethodRecord, Point, point_from_result
from sku.reproducibility import content_sha256
from sku.sweep.meter import validation_asker
from sku.training.run import Trained, step_progress

_Measured = tuple[list[Point], EvaluationResult, dict[str, Any]]
"""What a job leaves for its record: points, an evaluation of what it was asked, and an account of its training."""


class Bench:
    """Runs jobs that share data, base model and evaluation."""

    def __init__(
        self, recipe: Recipe, work: Path, progress: StageProgress | None = None, *, searches: Path | None = None
    ) -> None:
        """Loads what is shared.

        Args:
            recipe: Of any job; method and training settings are not used.
            work: Private folder for checkpoints; what a job leaves there is removed when its record stands.
            progress: Called with stage, done and total.
            searches: Folder for the files of ``compare.search``; that of the checkpoints if None.

        Raises:
            SkuError: Data or model can't be loaded, or the judge can't choose settings.
        """
        self.recipe, self.work, self.progress = recipe, work, progress
        self._searches = work if searches is None else searches
        self.data = load_data(recipe.data, recipe.seed, forget_validation=recipe.search_validation)
        loaded = load_model(with_safe_dtype(recipe))
        self.base, self.tokenizer, self.loaded = loaded.model, loaded.tokenizer, loaded
        self.data = common_visits(recipe, self.data.answered(), self.tokenizer, self.base)
        self._norms: dict[str, dict[str, float]] = {}
        self._base_result: EvaluationResult | None = None
        writer = asking.Writer.of(self.base, self.tokenizer, recipe.model.prompt_format)
        texts = validation_texts(self.data, writer, recipe.evaluate.retain_prompts, seed=recipe.seed)
        self._normal = NormalText(self.base, texts, batch_size=recipe.evaluate.batch_size)
        asker = Asker(
            base=self.base,
            writer=writer,
            config=recipe.evaluate,
            stop_ids=writer.stop_ids(self.base),
            seed=recipe.seed,
        )
        self._refusals = Refusals(asker, self.data)
        self._harm: Harm | None = None
        if recipe.compare.search is not None:
            judged = validation_asker(self.base, writer, search_judge(recipe, self.data), recipe)
            self._harm = Harm(asker=judged, data=self.data, config=recipe.sweep)
        # What a record does not hold is not measured for each strength: it holds greedy outcomes and losses.
        self._asked = dataclasses.replace(recipe.evaluate, samples=0, xstest=None, lm_eval=(), attacks=())
        requests, _ = asking.requests(asking.draw(self.data, self._asked, recipe.seed), writer, self._asked)
        self._inputs = {
            "base": fingerprint(self.base, probes_of(requests)),
            "data": [item.sha256 for item in self.data.provenance],
            # Not in the data's own hash, and trained on by some methods.
            "safe_answers": content_sha256(
                [
                    example.safe_answer if example.safe_answer_finished else [example.safe_answer, "unfinished"]
                    for example in self.data.forget_train
                ]
            ),
            "splits": self.data.counts(),
            # Which of them are asked depends on the training, which the key of a control doesn't hold.
            "visited": content_sha256(self.data.visited),
        }

    def key(self, job: Job) -> str:
        """``record_key`` of a job, with the data and the base model of this bench."""
        return record_key(job, self._inputs)

    def run(self, job: Job) -> MethodRecord:
        """Runs a job; what goes wrong becomes a failed record, so that the other jobs go on.

        Args:
            job: What is run.

        Returns:
            Its record, complete or failed.
        """
        folder, key = self.work / job.id, self.key(job)
        try:
            job, account = self._searched(job)
            points, result, training = self._measure(job, folder)
        except Exception as error:  # noqa: BLE001 - a method is code of its own: its mistake must not end the others
            return record_of(job, key, failure=_failure(error), data=self._about(job))
        finally:
            _free(folder)
        training |= account
        return record_of(job, key, data=self._about(job), training=training, result=result, points=points)

    def _searched(self, job: Job) -> tuple[Job, dict[str, Any]]:
        """A job with the training settings that ``compare.search`` chooses, and an account of the search."""
        if self._harm is None or job.kind not in ("method", "random_direction"):
            return job, {}
        harm, seed = self._harm, job.recipe.seed
        # The random direction has the length of SKU's change, and takes SKU's settings.
        name = "sku" if job.kind == "random_direction" else job.name
        row = dataclasses.replace(job, name=name, kind="method", seed=seed, recipe=changed(job.recipe, seed=seed))

        def measure(recipe: Recipe) -> Trial:
            own = dataclasses.replace(row, recipe=recipe)
            training = prepare(recipe, self.work).training
            trial = Trial(learning_rate=training.learning_rate, max_steps=training.max_steps)
            folder = self.work / f"{row.name}--search-{trial.learning_rate:g}-{trial.max_steps}"
            try:
                vector, model, _ = self._train(own, folder)
                strengths = self._strengths_of(own, vector, model)
                strength, bound_by = strengths.largest()
                strengths.write(strength)
                return dataclasses.replace(trial, strength=strength, bound_by=bound_by, left=harm.left(model))
            except Exception as error:  # noqa: BLE001 - as of a job: the other settings may do
                return dataclasses.replace(trial, failure=_failure(error))
            finally:
                _free(folder)

        path = self._searches / f"{row.name}{SEARCH_SUFFIX}"
        trials, chosen = search(row.recipe, path, self.key(row), measure, partial(self._tell, f"{row.name}: search"))
        recipe = with_training(job.recipe, chosen.learning_rate, chosen.max_steps)
        account = {"chosen": dataclasses.asdict(chosen), "trials": [dataclasses.asdict(trial) for trial in trials]}
        return dataclasses.replace(job, recipe=recipe), {"search": account}

    def _measure(self, job: Job, folder: Path) -> _Measured:
        if job.kind == "method":
            vector, model, training = self._train(job, folder)
            self._norms[norms_key(job)] = vector.norms()
            return self._along(job, vector, model, training)
        if job.kind == "random_direction":
            # It is added: a random direction has no sign of its own, and the points of earlier versions stay.
            vector = -TaskVector.random(self.base, self._sku_norms(job, folder), job.seed)
            return self._along(job, vector, copy.deepcopy(self.base), {"norm": vector.norm()})
        if job.kind == "base":
            result = self._of_base()
            return [_control_point(result, self._base_utility(job))], result, {}
        reply = always_refuse(self.data) if job.kind == "always_refuse" else always_gibberish(job.recipe.seed)
        result = evaluate_replies(
            job.kind,
            reply,
            self.tokenizer,
            self.data,
            base_model=self.base,
            config=self._asked,
            prompt_format=job.recipe.model.prompt_format,
            starts=self._of_base().starts,
            seed=job.recipe.seed,
        )
        return [_control_point(result, None)], result, {}

    def _train(self, job: Job, folder: Path) -> tuple[TaskVector, PreTrainedModel, dict[str, Any]]:
        """What the method subtracts, a plain model to write it into, and an account of the training."""
        method, tuning = method_named(job.recipe.method), job.recipe.acquire.tuning
        if tuning == "qlora":
            loaded = load_model(with_safe_dtype(job.recipe), four_bit=True)
        else:
            loaded = dataclasses.replace(self.loaded, model=copy.deepcopy(self.base))
        trained = train_method(job.recipe, loaded, self.data, folder, step_progress(self.progress))
        model = trained.model
        vector = subtracted_by(method, model, self.base)
        account = _account(trained)
        vector = transformed(job.recipe, vector, self.base, self.tokenizer, self.data)
        account["norm"] = vector.norm()
        if isinstance(model, PeftModel):
            plain = model.unload() if tuning == "lora" else copy.deepcopy(self.base)
        else:
            plain = copy.deepcopy(self.base) if isinstance(model, TaskVector) else model
        plain.requires_grad_(requires_grad=False)
        return vector, plain, account

    def _sku_norms(self, job: Job, folder: Path) -> Mapping[str, float]:
        """Norms of SKU's change with the same settings and seed, trained anew where no job before has it."""
        found = self._norms.get(norms_key(job))
        return self._train(job, folder)[0].norms() if found is None else found

    def _along(self, job: Job, vector: TaskVector, model: PreTrainedModel, training: dict[str, Any]) -> _Measured:
        """Measures what is subtracted at every strength asked for and at the largest one within the utility budget."""
        strengths = self._strengths_of(job, vector, model)
        matched, bound_by = strengths.largest()
        points: list[Point] = []
        unmeasured: dict[str, str] = {}
        result: EvaluationResult | None = None
        asked = _strengths(job.recipe.compare, matched)
        for number, (strength, roles) in enumerate(asked.items()):
            self._tell(f"{job.id}: strengths", number, len(asked))
            try:
                strengths.write(strength)
                found = self._evaluate(model, job.id)
                spent = strengths.utility(strength)
            except (EvaluationError, TaskVectorError) as error:
                if "published" in roles:
                    raise
                unmeasured[f"{strength:g}"] = one_line(error)
                continue
            points.append(point_from_result(found, strength, roles, spent))
            result = found
        assert result is not None, "the published strength is always measured"
        own = {"own_strength": self._strength(job), "bound_by": bound_by, "unmeasured": unmeasured}
        return points, result, {**training, **own}

    def _strengths_of(self, job: Job, vector: TaskVector, model: PreTrainedModel) -> Strengths:
        """The change of a job at any strength, written into a model."""
        return Strengths(
            base=self.base,
            model=model,
            vector=vector,
            normal=self._normal,
            config=job.recipe.compare,
            own=self._strength(job),
            refusals=self._refusals,
        )

    def _base_utility(self, job: Job) -> Utility:
        """Of the base model itself, which costs nothing."""
        perplexity, kl = ({str(split): value for split in self._normal.texts} for value in (1.0, 0.0))
        cost = utility_cost(job.recipe.compare, perplexity=perplexity, kl=kl, over_refusal=0.0)
        return Utility(perplexity=perplexity, kl=kl, over_refusal=0.0, cost=cost)

    def _strength(self, job: Job) -> float:
        return prepare(job.recipe, self.work).strength

    def _of_base(self) -> EvaluationResult:
        """The base model's evaluation, made once: every job's prefills begin with its starts."""
        if self._base_result is None:
            self._base_result = self._evaluate(self.base, "base")
        return self._base_result

    def _evaluate(self, model: PreTrainedModel, name: str) -> EvaluationResult:
        def tell(stage: str, done: int, total: int) -> None:
            self._tell(f"{name}: {stage}", done, total)

        return evaluate(
            model,
            self.tokenizer,
            self.data,
            config=self._asked,
            prompt_format=self.recipe.model.prompt_format,
            base_model=self.base,
            starts=None if model is self.base else self._of_base().starts,
            model_name=name,
            seed=self.recipe.seed,
            progress=tell,
        )

    def _trained_on(self, job: Job) -> dict[str, int] | None:
        """How many of the asked prompts of ``forget_train`` the job's own training visits; all are asked the same."""
        if job.kind != "method":
            return None
        own = with_visited(job.recipe, self.data, self.tokenizer, self.base)
        drawn = asking.draw(self.data, self._asked, self.recipe.seed)
        return asking.trained_on(own, drawn)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _about(self, job: Job) -> dict[str, Any]:
        return {
            "splits": self.data.counts(),
            "sources": [dataclasses.asdict(source) for source in self.data.provenance],
            "trained_on": self._trained_on(job),
            "notes": list(self.data.notes()),
            "base": self._inputs["base"],
        }


def _failure(error: Exception) -> str:
    """Why a job failed, in one line."""
    if isinstance(error, SkuError):
        return one_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"


def _free(folder: Path) -> None:
    """Removes what a training left, on disk and in memory."""
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _strengths(compare: CompareConfig, matched: float) -> dict[float, tuple[str, ...]]:
    """Strength -> what it is measured for, from the smallest."""
    roles: dict[float, list[str]] = {strength: ["sweep"] for strength in compare.strengths}
    roles.setdefault(1.0, []).append("published")
    roles.setdefault(matched, []).append("matched")
    return {strength: tuple(roles[strength]) for strength in sorted(roles)}


def _control_point(result: EvaluationResult, utility: Utility | None) -> Point:
    return point_from_result(result, 0.0, ("published", "matched"), utility)


def _account(trained: Trained[Any]) -> dict[str, Any]:
    log = trained.log
    names = [name for name in (log[0] if log else {}) if name.startswith("loss")]
    return {
        "steps": log[-1]["step"] if log else 0,
        "seconds": round(trained.seconds, 2),
        "losses": {name: [log[0][name], log[-1][name]] for name in names},
        "tokenization": {name: dataclasses.asdict(report) for name, report in trained.reports.items()},
    }
