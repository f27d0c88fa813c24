"""The small search of ``compare.search``: each row's learning rate and steps, chosen on validation prompts.

Every training is measured where the table compares methods: at the largest strength within the utility budget. What
its replies to ``forget_validation`` come to there, free and after each prefill, decides. No test split is read.
A search's file ``<row>--search.json`` lies beside the records and holds each training as soon as it is measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sku.config import MethodConfig, Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate.asking import Writer
from sku.evaluate.judges import Judge
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.metrics import rates_of
from sku.methods import method_named
from sku.storage import write_json
from sku.sweep.meter import Questions, draw_questions, validation_asker
from sku.sweep.rule import FREE, worst_then_mean
from sku.sweep.run import check_calibrated

SEARCH_SUFFIX = "--search.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a search."""

    learning_rate: float
    max_steps: int
    strength: float = 0.0
    """The largest found within the utility budget, as a multiple of the method's own."""
    bound_by: str | None = None
    """What is beyond its limit a little above."""
    left: Mapping[str, float] = field(default_factory=dict)
    """``free``, and tokens of a prefill as a word -> share of the validation prompts whose reply is harmful or
    gibberish at that strength."""
    failure: str | None = None
    """One line on why it could not be measured, else None."""

    @property
    def order(self) -> tuple[float, float]:
        """``worst_then_mean`` of what is left."""
        return worst_then_mean(self.left.values())


def best_of(trials: Sequence[Trial]) -> Trial:
    """The training that leaves the least; of equals the first, which is the gentlest.

    Raises:
        EvaluationError: None could be measured.
    """
    measured = [trial for trial in trials if trial.failure is None]
    if not measured:
        raise EvaluationError(
            f"none of the {len(trials)} trainings of compare.search can be measured; the first: {trials[0].failure}"
        )
    return min(measured, key=lambda trial: trial.order)


def with_training(recipe: Recipe, learning_rate: float, max_steps: int) -> Recipe:
    """A recipe whose method has other training settings; those of the other methods stay.

    Args:
        recipe: ``method`` says whose are changed.
        learning_rate: In place of the recipe's.
        max_steps: In place of the recipe's.
    """
    changed = {"learning_rate": learning_rate, "max_steps": max_steps}
    if recipe.method == "sku":
        acquire = dataclasses.replace(recipe.acquire, training={**recipe.acquire.training, **changed})
        return dataclasses.replace(recipe, acquire=acquire)
    name = method_named(recipe.method).name
    own = recipe.methods.get(name, MethodConfig())
    own = dataclasses.replace(own, training={**own.training, **changed})
    return dataclasses.replace(recipe, methods={**recipe.methods, name: own})


def search(
    recipe: Recipe, path: Path, key: str, measure: Callable[[Recipe], Trial], tell: Callable[[int, int], None]
) -> tuple[list[Trial], Trial]:
    """Measures what an earlier call did not, and chooses.

    Args:
        recipe: Of a row, with ``compare.search``.
        path: File of the search; trainings of the same key that it holds are taken over.
        key: Hash of all that decides a training's figures.
        measure: A recipe with training settings -> what they come to. What fails comes back as a failure.
        tell: Called with trainings done and their number.

    Returns:
        All trainings in order, and the chosen one.

    Raises:
        EvaluationError: None could be measured.
        OutputError: The file can't be written.
    """
    assert recipe.compare.search is not None
    points = recipe.compare.search.points
    kept = {(trial.learning_rate, trial.max_steps): trial for trial in _kept(path, key)}
    trials: list[Trial] = []
    for number, point in enumerate(points):
        tell(number, len(points))
        trials.append(kept.get(point) or measure(with_training(recipe, *point)))
        write_json(path, {"key": key, "trials": [dataclasses.asdict(trial) for trial in trials]})
    tell(len(points), len(points))
    return trials, best_of(trials)


def _kept(path: Path, key: str) -> list[Trial]:
    """Trainings of an earlier call; one that failed is tried again, and a damaged file is made anew."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found = [Trial(**trial) for trial in content["trials"]] if content["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [trial for trial in found if trial.failure is None]


def search_judge(recipe: Recipe, data: ForgetRetainData) -> Judge:
    """The judge that a search chooses by.

    Args:
        recipe: ``evaluate`` names it.
        data: Its splits.

    Raises:
        EvaluationError: Its errors are unknown, and it would choose by them; or there is no such judge.
        RecipeError: A wrong setting of the judge.
    """
    judge = choose_judge(recipe.evaluate, data)
    check_calibrated(judge.card, "compare.search can't choose by", "leave compare.search empty")
    return judge


class Harm:
    """Asks changed models the prompts of ``forget_validation``."""

    def __init__(self, base: PreTrainedModel, writer: Writer, data: ForgetRetainData, recipe: Recipe) -> None:
        """Chooses the judge; prompts are drawn when they are first asked.

        Args:
            base: The original model.
            writer: Of the model.
            data: ``forget_validation`` is used.
            recipe: ``sweep`` says how many prompts, which prefills and how long replies are; ``evaluate`` the judge.

        Raises:
            EvaluationError: As ``search_judge``.
            RecipeError: As ``search_judge``.
        """
        self._asker = validation_asker(base, writer, search_judge(recipe, data), recipe)
        self._data, self._config = data, recipe.sweep

    def left(self, model: PreTrainedModel) -> dict[str, float]:
        """Share of the replies that are harmful, not judged, or gibberish; as ``Trial.left``.

        Raises:
            EvaluationError: Judge or generation fails, or there is nothing to ask.
        """
        groups = self._questions.harmful
        outcomes = self._asker.answer(model, [request for group in groups.values() for request in group])
        shares = {}
        for tokens, group in groups.items():
            rates = rates_of([outcomes[request.id] for request in group])
            name = "free" if tokens == FREE else str(tokens)
            shares[name] = rates["harmful_at_most"].value + rates["gibberish"].value
        return shares

    @cached_property
    def _questions(self) -> Questions:
        asker = self._asker
        return draw_questions(self._data, asker.writer, self._config, seed=asker.seed, starts=asker.starts)
