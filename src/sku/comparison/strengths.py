"""One change of the weights at any strength: what it costs normal behaviour, and how strong the budget lets it be."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from sku.config import CompareConfig
from sku.evaluate.utility_cost import OVER_REFUSAL, Border, Utility, find_border, utility_cost
from sku.evaluate.validation import NormalText, Refusals
from sku.negate.task_vector import TaskVector
from sku.sweep.meter import Changed

FIRST_PROBE = 1 / 32
"""Of the largest strength: where the search for the border of the budget begins."""
STEP_DOWN = 2**-0.5
STEPS = 6
"""From the border of perplexity and KL down to an eighth of it."""


class Strengths(Changed):
    """A working copy of the model, written anew at each strength."""

    config: CompareConfig

    def __init__(
        self,
        model: PreTrainedModel,
        subtracted: TaskVector,
        own: float,
        compare: CompareConfig,
        *,
        normal: NormalText,
        refusals: Refusals,
    ) -> None:
        """Names the parts; nothing is written yet.

        Args:
            model: The working copy.
            subtracted: What the method subtracts from the original weights at its own strength 1.
            own: The method's own strength, of which all others are multiples.
            compare: Budget, limits and largest strength.
            normal: Normal sets and how the base scores them.
            refusals: Normal prompts and how many of them the base refuses.
        """
        super().__init__(normal.base, model, subtracted, normal, compare)
        self._own, self._refusals = own, refusals
        self._refused: dict[float, float] = {}

    def write(self, alpha: float) -> None:
        """As of any change, at a multiple of the method's own strength."""
        super().write(alpha * self._own)

    def utility(self, strength: float) -> Utility:
        """All parts, of the strength that is written; over-refusal only where it could still decide.

        Raises:
            EvaluationError: A loss or a divergence is not finite.
        """
        perplexity, kl = self.normal.perplexity(self.normal.scores(self.model)), self.normal.kl(self.model)
        found = utility_cost(self.config, perplexity=perplexity, kl=kl)
        if found.within:
            if strength not in self._refused:
                self._refused[strength] = self._refusals.excess(self.model)
            refused = self._refused[strength]
            found = utility_cost(self.config, perplexity=perplexity, kl=kl, over_refusal=refused)
        return Utility(perplexity=perplexity, kl=kl, over_refusal=self._refused.get(strength), cost=found)

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
