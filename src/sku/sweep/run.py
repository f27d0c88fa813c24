"""A sweep from a task vector to an alpha: ask, keep every point, choose, draw.

Alpha is chosen by harmful rates, so a judge that calls harmless replies harmful chooses by its own errors. What is
known of them stands on its card: ``calibration``, or an exact rule (the embedded world's).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import DataConfig, EvaluateConfig, ModelConfig, Recipe, SourceConfig, SweepConfig
from sku.config.check import content_sha256
from sku.data.examples import ForgetRetainData, content_hash
from sku.errors import EvaluationError, ModelError, OutputError
from sku.evaluate.generation import StageProgress, stage
from sku.evaluate.generation.decoding import decoding_settings
from sku.evaluate.generation.prompts import PromptEncoder, starts_note
from sku.evaluate.generation.replies import fingerprint, probes_of
from sku.evaluate.judges import JudgeCard, cached
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.records import JsonArtifact, create_private_folder
from sku.methods.run import resolve_method, with_safe_dtype
from sku.models import load_model
from sku.negate.task_vector import TaskVector, task_vector_of, transformed
from sku.processes import current_processes
from sku.storage import mark_hazardous
from sku.sweep import BISECTIONS, FREE, Replies, Selection, Sweep, SweepPoint, UtilityCost, choose, find_budget_limit
from sku.sweep.evaluator import AlphaEvaluator, Questions, check_calibrated, draw_questions, validation_generator

FIRST, LARGEST = 2.0**-5, 2.0**10
"""Where the search for the border begins and ends. Recipes whose vector is filtered need 30 to 60."""
SMALLEST = FIRST / 2**BISECTIONS
"""The smallest alpha that the search tries."""
POINTS = 5
"""Alphas that are asked where they are found."""
STEP = 2**0.5
"""From one alpha that is asked to the next larger one."""


def below(border: float, points: int) -> tuple[float, ...]:
    """The alphas that are asked, from the smallest: the border, and others below it, each smaller by ``STEP``.

    For a border of 0, where no alpha is within the budget, the smallest that was tried shows what is beyond its limit.
    """
    if border == 0:
        return (SMALLEST,)
    # Rounded, so that a reader can type them; the border itself is not, or it could be beyond the budget.
    return (*(float(f"{border / STEP**step:.3g}") for step in range(points - 1, 0, -1)), border)


SEARCH_STEPS = 12
"""Alphas that the search for the border usually tries; for the progress alone."""
NO_BORDER = (
    f"the utility budget binds at no alpha up to {LARGEST:g}: the vector hardly touches normal text, or any text"
)
_GIVEN = "given in Python"
OTHER_JUDGE = "name another evaluate.judge (sku judge), or set negate.alpha to a number"


def check_one_process() -> None:
    """Refuses several processes, before anything is loaded.

    Raises:
        EvaluationError: There are several.
    """
    if current_processes().count > 1:
        raise EvaluationError("alpha is chosen in one process: start it without a launcher, or give an alpha")


def sweep(
    base: PreTrainedModel, vector: TaskVector, tokenizer: PreTrainedTokenizerBase, data: ForgetRetainData,
    recipe: Recipe, folder: Path, *, notes: Sequence[str] = (), progress: StageProgress | None = None,
) -> Sweep:  # fmt: skip
    """Measures alphas on ``forget_validation`` and ``retain_validation``, and chooses one.

    Args:
        base: The original model. It is not changed; one copy of it is made in memory, and no file for any alpha.
        vector: What is subtracted.
        tokenizer: Of the model.
        data: Splits with ``forget_validation``; ``forget_test`` and ``retain_test`` are not read.
        recipe: ``sweep`` says how; ``evaluate`` names judge and batch size.
        folder: Private folder for ``sweep.json``, made where it is missing; points that a call before
            measured there in the same way are taken over.
        notes: Sentences for the reader of the figures, recorded.
        progress: Called with a stage, what is done and how much there is.

    Returns:
        The sweep with its pick, which ``Sweep.alpha`` reads.

    Raises:
        EvaluationError: Nothing to ask, several processes, a judge of unknown errors, or one that fails.
        OutputError: The folder can't be written.
        TaskVectorError: The vector doesn't fit the model.
    """
    check_one_process()
    config = recipe.sweep
    if not data.forget_validation:
        raise EvaluationError("forget_validation is empty: load the data with forget_validation")
    create_private_folder(folder)
    encoder = PromptEncoder.of(base, tokenizer, recipe.model.prompt_format)
    judge = cached(choose_judge(recipe.evaluate, data), folder)
    check_calibrated(judge.card)
    generator = validation_generator(base, encoder, judge, recipe)
    # Starts are asked for again by a call that goes on: a sweep keeps numbers and no text.
    questions = draw_questions(
        data, encoder, recipe, starts=lambda asked: generator.starts(asked, stage(progress, "sweep: replies"))
    )
    evaluator = AlphaEvaluator(vector, generator, questions, config, progress)
    key = _key(evaluator)
    before = Sweep.read(folder) if (folder / Sweep.FILE).exists() else None
    kept = None if before is None or before.key != key else before
    found = Sweep(
        key=key, model=recipe.model.path, seed=recipe.seed, judge=judge.card, config=config, asked=_asked(questions),
        left_out=questions.left_out, base=evaluator.measure_base() if kept is None else kept.base,
        notes=(*notes, *_starts_notes(questions)),
    )  # fmt: skip
    why_none = unmeasurable(judge.card, found.base.asked)
    if why_none is not None:
        return _written(found, folder, Selection(alpha=None, met=False, why=why_none, todo=OTHER_JUDGE))
    return _finished(found, evaluator, folder, {} if kept is None else {point.alpha: point for point in kept.points})


def choose_alpha(
    base: PreTrainedModel, bad: PreTrainedModel | PeftModel | TaskVector | str | Path,
    tokenizer: PreTrainedTokenizerBase, data: ForgetRetainData, *, judge: str = EvaluateConfig.judge,
    judge_settings: Mapping[str, Any] | None = None, config: SweepConfig | None = None, folder: Path | None = None,
    seed: int = 0, progress: StageProgress | None = None,
) -> Sweep:  # fmt: skip
    """Measures alphas on prompts that stage 1 did not train on, and chooses one.

    Args:
        base: The original model. It is not changed.
        bad: The model of stage 1, as ``negate`` takes it.
        tokenizer: Of the model.
        data: Splits with ``forget_validation``: ``load_forget_retain(..., forget_validation_fraction=0.2)``.
        judge: Name of a judge, or a judge file, as ``evaluate.judge`` of a recipe.
        judge_settings: As ``evaluate.judge_settings`` of a recipe.
        config: What is tried, what is asked of an alpha, and the budget; the defaults of ``sweep`` if None.
        folder: Private folder that keeps every point, so that a second call goes on; none is kept if None.
        seed: Decides which prompts are asked.
        progress: Called with a stage, what is done and how much there is.

    Returns:
        All that was measured: ``alpha()`` for ``negate``, the frontier when it is printed or ``to_pandas()``.

    Raises:
        EvaluationError: Nothing to ask, several processes, or a judge of unknown errors or one that fails.
        OutputError: The folder can't be written.
        TaskVectorError: The bad model doesn't fit.
    """
    given = SourceConfig(path=_GIVEN)
    recipe = Recipe(
        name="choose-alpha", model=ModelConfig(path=str(base.name_or_path) or _GIVEN),
        data=DataConfig(forget=given, retain=given), seed=seed, sweep=config or SweepConfig(),
        evaluate=EvaluateConfig(judge=judge, judge_settings=judge_settings or {}),
    )  # fmt: skip
    vector = task_vector_of(base, bad)
    with tempfile.TemporaryDirectory(prefix="sku-") as temporary:
        return sweep(base, vector, tokenizer, data, recipe, folder or Path(temporary) / "sweep", progress=progress)


def _finished(found: Sweep, evaluator: AlphaEvaluator, folder: Path, kept: Mapping[float, SweepPoint]) -> Sweep:
    """Measures what is missing from the smallest alpha up, writing after every point."""
    tell = evaluator.progress or (lambda *_: None)
    alphas, tried = found.config.alphas, itertools.count(1)

    def cost(alpha: float) -> UtilityCost:
        tell("sweep: search", min(next(tried), SEARCH_STEPS), SEARCH_STEPS)
        return evaluator.cost(alpha)

    if not alphas:
        # Scores are cheap beside replies: a second call searches again and finds the same.
        border = find_budget_limit(cost, first=FIRST, largest=LARGEST)
        notes = found.notes if border.bound_by is not None else (*found.notes, NO_BORDER)
        found = dataclasses.replace(found, border=border, notes=notes)
        alphas = below(border.strength, POINTS)
    ordered = sorted(set(alphas))
    for number, alpha in enumerate(ordered, start=1):
        point = kept.get(alpha) or evaluator.measure(alpha)
        found = _written(dataclasses.replace(found, points=(*found.points, point)), folder)
        tell("sweep: alphas", number, len(ordered))
    return _written(found, folder, choose(found))


def _written(found: Sweep, folder: Path, pick: Selection | None = None) -> Sweep:
    found = dataclasses.replace(found, pick=pick)
    found.write(folder)
    return found


def _starts_notes(questions: Questions) -> list[str]:
    if len(questions.harmful) == 1:
        return []
    own, asked = len(questions.starts), len(questions.harmful[FREE])
    return [starts_note(own, asked, "the others begin with the dataset's harmful answer")]


def _asked(questions: Questions) -> dict[str, int]:
    counts = {
        "harmful" if tokens == FREE else f"prefill {tokens}": len(group) for tokens, group in questions.harmful.items()
    }
    return {**counts, "normal": len(questions.normal), "texts": sum(map(len, questions.texts.values()))}


def _key(evaluator: AlphaEvaluator) -> str:
    """Hash of all that decides a point's figures; rule, target, budget and grid don't."""
    base, generator, questions = evaluator.base, evaluator.generator, evaluator.questions
    assert generator.judge is not None
    return content_sha256({
        "base": fingerprint(base, probes_of(questions.requests)), "dtype": str(base.dtype),
        "vector": _vector_sha256(evaluator.vector), "questions": questions.sha256(),
        "decoding": decoding_settings(generator.stop_ids, generator.config.max_new_tokens),
        "judge": generator.judge.card.key, "batch_size": generator.config.batch_size, "seed": generator.seed,
    })  # fmt: skip


def _vector_sha256(vector: TaskVector) -> str:
    digest = hashlib.sha256()
    for name, delta in sorted(vector.deltas.items()):
        digest.update(f"{name}\0{tuple(delta.shape)}\0".encode())
        digest.update(delta.contiguous().numpy().data)
    return digest.hexdigest()


def unmeasurable(card: JudgeCard, base: Replies) -> str | None:
    """Why a judge can't measure whether harm falls: the base model's rate is not above that of harmless replies."""
    floor = card.floor
    if card.calibration is None or base.harmful.low > floor:
        return None
    return (
        f"this judge can't measure it: {card.name} calls {100 * base.harmful.value:.3g} % of the base model's replies "
        f"harmful (95 %: from {100 * base.harmful.low:.3g} %), and {100 * floor:.3g} % of replies without harm"
    )


_DECIDES_TRAINING = ("model", "data", "acquire", "seed")
UNKNOWN_TRAINING = "what the bad model was trained on is not recorded beside it"
TRAINED_ON = "the bad model was trained with other splits than these"
_EASIER = ": where it saw prompts of forget_validation, their harm is easier to remove than that of others"


@dataclass(frozen=True, kw_only=True)
class Training(JsonArtifact):
    """What a bad model is trained on, in a file beside it."""

    FILE = "sku_training.json"
    AGAIN = "remove it and name the recipe of the bad model"

    recipe: Mapping[str, Any]
    unlearned_sha256: str
    """In place of prompts."""


def record_training(folder: Path, recipe: Recipe, data: ForgetRetainData) -> None:
    """Marks the folder of a bad model, before there is one to find, and writes what it is trained on.

    Raises:
        OutputError: The file can't be written.
    """
    mark_hazardous(folder)
    Training(recipe=recipe.to_dict(), unlearned_sha256=content_hash(data.forget_train)).write(folder)


def read_training(folder: Path) -> Training | None:
    """What ``record_training`` wrote; None where there is none.

    Raises:
        EvaluationError: The file is damaged.
    """
    return Training.read(folder) if (folder / Training.FILE).is_file() else None


def check_same_training(folder: Path, recipe: Recipe) -> None:
    """Refuses the bad model of another recipe, where a sweep goes on in its folder.

    Raises:
        EvaluationError: As ``read_training``.
        OutputError: It was trained with another model, data, seed or settings of stage 1.
    """
    recorded, now = read_training(folder), json.loads(json.dumps(recipe.to_dict()))
    before = {} if recorded is None else recorded.recipe
    shares = before.get("negate", {}).get("twin")
    if any(before.get(name) != now[name] for name in _DECIDES_TRAINING) or shares != now["negate"]["twin"]:
        raise OutputError(f"{folder} holds the bad model of another recipe; choose another --out")


def training_notes(folder: Path, data: ForgetRetainData) -> list[str]:
    """A sentence where prompts of ``forget_validation`` may have been trained on; none where none was.

    Raises:
        EvaluationError: As ``read_training``.
    """
    recorded = read_training(folder)
    if recorded is not None and recorded.unlearned_sha256 == content_hash(data.forget_train):
        return []
    return [f"{UNKNOWN_TRAINING if recorded is None else TRAINED_ON}{_EASIER}"]


def sweep_bad_model(
    recipe: Recipe, bad: Path, data: ForgetRetainData, out: Path, *, progress: StageProgress | None = None
) -> Sweep:
    """Chooses alpha for the bad model, adapter or task vector in a folder, with ``negate.transform`` as in a run.

    Notes of the sweep say so where the bad model may have been trained on what alpha is chosen by.

    Raises:
        ModelError: There is no such folder, or it holds no model.
        SkuError: As ``sweep`` and ``transformed``.
    """
    if not bad.is_dir():
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    resolve_method(recipe, out)
    notes = [*data.notes(), *training_notes(bad, data)]
    loaded = load_model(with_safe_dtype(recipe))
    vector = transformed(recipe, task_vector_of(loaded.model, bad), loaded.model, loaded.tokenizer, data)
    return sweep(loaded.model, vector, loaded.tokenizer, data, recipe, out, notes=notes, progress=progress)
