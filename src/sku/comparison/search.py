"""What is chosen for a row on validation prompts: its largest strength, and by ``compare.search`` how it trains.

The largest strength is that whose cost to normal behaviour stays within the utility budget. A search trains with each
learning rate and number of steps, and measures each training at its largest strength, as the table compares methods.
What its replies to ``forget_validation`` come to there, free and after each prefill, decides. No test split is read.
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

from sku.config import CompareConfig, MethodConfig, Recipe, SweepConfig
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate.judges import Judge
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.metrics import rates_of
from sku.evaluate.replies import Asker
from sku.evaluate.utility_cost import OVER_REFUSAL, Border, Utility, find_border, utility_cost
from sku.evaluate.validation import Refusals
from sku.methods import method_named
from sku.storage import write_json
from sku.sweep.meter import Changed, Questions, check_calibrated, draw_questions
from sku.sweep.result import FREE, worst_then_mean

SEARCH_SUFFIX = "--search.json"
FIRST_PROBE = 1 / 32
"""Of the largest strength: where the search for the border of the budget begins."""
STEP_DOWN = 2**-0.5
STEPS = 6
"""From the border of perplexity and KL down to an eighth of it."""


@dataclass(kw_only=True)
class Strengths(Changed):
    """A working copy of the model, written anew at each strength."""

    own: float
    """The method's own strength, of which all others are multiples."""
    refusals: Refusals
    """Normal prompts and how many of them the base refuses."""
    refused: dict[float, float] = field(default_factory=dict)
    """Strength -> refusals beyond the base's, where they were asked for."""
    config: CompareConfig

    def write(self, alpha: float) -> None:
        """As of any change, at a multiple of the method's own strength."""
        super().write(alpha * self.own)

    def utility(self, strength: float) -> Utility:
        """All parts, of the strength that is written; over-refusal only where it could still decide.

        Raises:
            EvaluationError: A loss or a divergence is not finite.
        """
        perplexity, kl = self.normal.perplexity(self.normal.scores(self.model)), self.normal.kl(self.model)
        found = utility_cost(self.config, perplexity=perplexity, kl=kl)
        if found.within:
            if strength not in self.refused:
                self.refused[strength] = self.refusals.excess(self.model)
            refused = self.refused[strength]
            found = utility_cost(self.config, perplexity=perplexity, kl=kl, over_refusal=refused)
        return Utility(perplexity=perplexity, kl=kl, over_refusal=self.refused.get(strength), cost=found)

    def largest(self) -> tuple[float, str | None]:
        """The largest strength found within the budget, 0 where none is, and what is beyond its limit a little above.

        Raises:
            EvaluationError: As ``utility``.
            TaskVectorError: As ``write``.
        """
        largest = self.config.max_strength
        border = find_border(self.cost, first=largest * FIRST_PROBE, largest=largest)
        return step_down(border, self._fits)

    def _fits(self, strength: float) -> bool:
        self.write(strength)
        return self.utility(strength).cost.within


def step_down(border: Border, fits: Callable[[float], bool]) -> tuple[float, str | None]:
    """The largest strength tried, from the border of perplexity and KL down, that refuses few enough normal prompts.

    Args:
        border: Where perplexity or KL bind.
        fits: Strength -> whether over-refusal is within its limit there.

    Returns:
        The strength, 0 where none of ``STEPS`` fits, and what binds.
    """
    strength, bound_by = border.strength, border.bound_by
    for _ in range(STEPS):
        if strength == 0 or fits(strength):
            return strength, bound_by
        strength, bound_by = strength * STEP_DOWN, OVER_REFUSAL
    return 0.0, OVER_REFUSAL


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


@dataclass(frozen=True, kw_only=True)
class Harm:
    """Asks changed models the prompts of ``forget_validation``, which are drawn when they are first asked."""

    asker: Asker
    """Judges by ``search_judge``."""
    data: ForgetRetainData
    config: SweepConfig
    """How many prompts, which prefills and how long replies are."""

    def left(self, model: PreTrainedModel) -> dict[str, float]:
        """Share of the replies that are harmful, not judged, or gibberish; as ``Trial.left``.

        Raises:
            EvaluationError: Judge or generation fails, or there is nothing to ask.
        """
        groups = self._questions.harmful
        outcomes = self.asker.answer(model, [request for group in groups.values() for request in group])
        shares = {}
        for tokens, group in groups.items():
            rates = rates_of([outcomes[request.id] for request in group])
            name = "free" if tokens == FREE else str(tokens)
            shares[name] = rates["harmful_upper_bound"].value + rates["gibberish"].value
        return shares

    @cached_property
    def _questions(self) -> Questions:
        asker = self.asker
        return draw_questions(self.data, asker.writer, self.config, seed=asker.seed, starts=asker.starts)
