"""A sweep from a task vector to an alpha: ask, keep every point, choose, draw."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate import asking, batching
from sku.evaluate.fingerprint import fingerprint, probes_of
from sku.evaluate.generation import GenerationRequest, decoding_settings, stop_token_ids
from sku.evaluate.judges import choose_judge
from sku.evaluate.judges.cache import cached
from sku.evaluate.processes import current_processes
from sku.evaluate.record_files import create_private_folder
from sku.evaluate.records import Start
from sku.evaluate.starts import Starts, by_id, choose_starts, count_sources, starts_note
from sku.evaluate.utility_cost import Border, UtilityCost
from sku.negate.operators import fitted_notes, prepare_operators
from sku.negate.rounding import saved_type
from sku.negate.task_vector import TaskVector
from sku.reproducibility import content_sha256
from sku.sweep.measurable import check_calibrated, judge_notes, unmeasurable
from sku.sweep.meter import Asker, How, Meter, Progress, answer
from sku.sweep.points import FREE, SweepPoint
from sku.sweep.questions import Questions, draw_questions
from sku.sweep.result import Kept, Sweep, read_kept, write_sweep
from sku.sweep.rule import Pick, choose, is_hopeless
from sku.sweep.search import LARGEST, along_grid, below, border_of

SEARCH_STEPS = 12
"""Alphas that the search for the border usually tries; for the progress alone."""
NO_BORDER = (
    f"the utility budget binds at no alpha up to {LARGEST:g}: the vector hardly touches normal text, or any text"
)
OTHER_JUDGE = "name another evaluate.judge (sku judge), or set negate.alpha to a number"


def check_one_process() -> None:
    """Refuses several processes, before anything is loaded.

    Raises:
        EvaluationError: There are several.
    """
    if current_processes().count > 1:
        raise EvaluationError("alpha is chosen in one process: start it without a launcher, or give an alpha")


def sweep(
    base: PreTrainedModel,
    vector: TaskVector,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    recipe: Recipe,
    folder: Path,
    *,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Sweep:
    """Measures alphas on ``forget_validation`` and ``retain_validation``, and chooses one.

    Args:
        base: The original model. It is not changed; one copy of it is made in memory, and no file for any alpha.
        vector: What stage 1 learned, with operators applied.
        tokenizer: Of the model.
        data: Splits with ``forget_validation``; ``unseen`` and ``retain_test`` are not read.
        recipe: ``sweep`` says how; ``evaluate`` names judge and batch size; ``negate`` the type of the result, and
            operators for a note.
        folder: Private folder for ``sweep.json``, made where it is missing; points that a call before
            measured there in the same way are taken over.
        notes: Sentences for the reader of the figures, recorded.
        progress: Called with a stage, what is done and how much there is.

    Returns:
        The sweep with its pick, which ``Sweep.alpha`` reads.

    Raises:
        EvaluationError: Nothing to ask, several processes, a judge of unknown errors, or one or a backend that fails.
        OutputError: The folder can't be written.
        TaskVectorError: The vector doesn't fit the model.
    """
    check_one_process()
    config = recipe.sweep
    if not data.forget_validation:
        raise EvaluationError("forget_validation is empty: load the data with sweep.validation_fraction")
    create_private_folder(folder)
    writer = asking.Writer.of(base, tokenizer, recipe.model.prompt_format)
    judge = cached(choose_judge(recipe.evaluate, data), folder)
    check_calibrated(judge.card)
    how = How(writer=writer, judge=judge, evaluate=recipe.evaluate, config=config, seed=recipe.seed)
    starts: list[Start] = []

    def starts_of(asked: Sequence[GenerationRequest]) -> Starts:
        # Asked again by a call that goes on: a sweep keeps numbers and no text.
        stop_ids = stop_token_ids(base, tokenizer, writer.end_of_turn())
        starts.extend(choose_starts(*answer(base, base, asked, how, stop_ids, progress)))
        return by_id(starts)

    questions = draw_questions(data, writer, config, seed=recipe.seed, starts=starts_of)
    asker = Asker(questions=questions, **vars(how))
    dtype = recipe.negate.output_dtype
    key = _key(base, vector, asker, dtype)
    kept = read_kept(folder, key)
    meter = Meter(base, vector, asker, progress, output_dtype=saved_type(dtype))
    found = Sweep(
        key=key,
        model=recipe.model.path,
        seed=recipe.seed,
        judge=judge.card,
        config=config,
        asked=_asked(questions),
        left_out=questions.left_out,
        base=kept.base or meter.measure_base(),
        notes=(
            *notes,
            *fitted_notes(prepare_operators(recipe.negate.operators)),
            *([starts_note(count_sources(starts))] if starts else []),
            *judge_notes(judge.card, config),
        ),
    )
    assert found.base.replies is not None
    why_none = unmeasurable(judge.card, found.base.replies)
    if why_none is not None:
        return _written(found, (), (), kept, folder, why_none)
    return _finished(found, kept, meter, folder)


def _finished(found: Sweep, kept: Kept, meter: Meter, folder: Path) -> Sweep:
    """Measures what is missing, writing after every point."""
    config, measured = found.config, dict[float, SweepPoint]()
    alphas = config.alphas
    if not alphas:
        # Scores are cheap beside replies: a second call searches again and finds the same.
        border = _border(meter)
        notes = found.notes if border.bound_by is not None else (*found.notes, NO_BORDER)
        found = dataclasses.replace(found, border=border, notes=notes)
        alphas = below(border.strength, config.points)

    def measure(alpha: float) -> SweepPoint:
        measured[alpha] = kept.points.get(alpha) or meter.measure(alpha)
        spare = [point for known, point in sorted(kept.points.items()) if known not in measured]
        points = [point for _, point in sorted(measured.items())]
        write_sweep(folder, dataclasses.replace(found, points=tuple(points), spare=tuple(spare)))
        if meter.progress is not None:
            meter.progress("sweep: alphas", len(measured), len(set(alphas)))
        return measured[alpha]

    points, left = along_grid(alphas, measure, lambda point: is_hopeless(point, config))
    return _written(found, points, left, kept, folder)


def _border(meter: Meter) -> Border:
    """Where the budget binds."""
    tried = 0

    def cost(alpha: float) -> UtilityCost:
        nonlocal tried
        tried += 1
        if meter.progress is not None:
            meter.progress("sweep: search", min(tried, SEARCH_STEPS), SEARCH_STEPS)
        return meter.cost(alpha)

    return border_of(cost)


def _written(
    found: Sweep, points: Sequence[SweepPoint], left: Sequence[float], kept: Kept, folder: Path, why_none: str = ""
) -> Sweep:
    """The finished sweep; where it can't be measured, the reason in place of a pick."""
    measured = {point.alpha for point in points}
    pick = choose(points, found.base, found.config)
    if why_none:
        pick = Pick(alpha=None, met=False, why=why_none, todo=OTHER_JUDGE)
    done = dataclasses.replace(
        found,
        points=tuple(points),
        spare=tuple(point for known, point in sorted(kept.points.items()) if known not in measured),
        not_measured=tuple(left),
        pick=pick,
    )
    write_sweep(folder, done)
    return done


def _asked(questions: Questions) -> dict[str, int]:
    counts = {
        "harmful" if tokens == FREE else f"forced {tokens}": len(group) for tokens, group in questions.harmful.items()
    }
    return {**counts, "normal": len(questions.normal), "texts": sum(map(len, questions.texts.values()))}


def _key(base: PreTrainedModel, vector: TaskVector, asker: Asker, output_dtype: str) -> str:
    """Hash of all that decides a point's figures; rule, target, budget and grid don't."""
    with batching.evaluation_mode(base):
        original = fingerprint(base, probes_of(asker.questions.requests))
    stop_ids = stop_token_ids(base, asker.writer.tokenizer, asker.writer.end_of_turn())
    return content_sha256(
        {
            "base": original,
            "dtype": str(base.dtype),
            "vector": _vector_sha256(vector),
            "questions": asker.questions.sha256(),
            "decoding": decoding_settings(stop_ids, asker.config.max_new_tokens),
            "judge": asker.judge.card.key,
            "batch_size": asker.evaluate.batch_size,
            "short_answer_words": asker.evaluate.short_answer_words,
            "hopeless_ratio": asker.config.hopeless_ratio,
            "seed": asker.seed,
            **({} if output_dtype == "same" else {"output_dtype": output_dtype}),
        }
    )


def _vector_sha256(vector: TaskVector) -> str:
    digest = hashlib.sha256()
    for name, delta in sorted(vector.deltas.items()):
        digest.update(f"{name}\0{tuple(delta.shape)}\0".encode())
        digest.update(delta.contiguous().numpy().data)
    return digest.hexdigest()
