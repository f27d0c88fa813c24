"""One change of the weights at any strength: what it costs normal behaviour, and how strong the budget lets it be."""

from __future__ import annotations

from transformers import PreTrainedModel

from sku.comparison.over_refusal import Refusals, step_down
from sku.config import CompareConfig
from sku.errors import EvaluationError, TaskVectorError
from sku.evaluate.utility_cost import BROKEN_COST, Utility, UtilityCost, find_border, utility_cost
from sku.evaluate.validation import NormalText
from sku.negate.run import subtract_into
from sku.negate.task_vector import TaskVector

FIRST_PROBE = 1 / 32
"""Of the largest strength: where the search for the border of the budget begins."""


class Strengths:
    """A working copy of the model, written anew at each strength."""

    def __init__(
        self,
        base: PreTrainedModel,
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
            base: The original model. It is not changed.
            model: The working copy.
            subtracted: What the method subtracts from the original weights at its own strength 1.
            own: The method's own strength, of which all others are multiples.
            compare: Budget, limits and largest strength.
            normal: Normal sets and how the base scores them.
            refusals: Normal prompts and how many of them the base refuses.
        """
        self.model = model
        self._base, self._subtracted, self._own, self._compare = base, subtracted, own, compare
        self._normal, self._refusals = normal, refusals
        self._refused: dict[float, float] = {}

    def write(self, strength: float) -> None:
        """Makes the working copy the original with the change at a strength.

        Raises:
            TaskVectorError: The change doesn't fit, or a weight is not finite.
        """
        # From the original each time, so that no rounding adds up.
        subtract_into(self.model, self._base, self._subtracted, strength * self._own)

    def cost(self, strength: float) -> UtilityCost:
        """Without replies, which cost most by far; infinite where the weights break."""
        try:
            self.write(strength)
            return self._normal.cost(self.model, self._compare)
        except (EvaluationError, TaskVectorError):
            return BROKEN_COST

    def utility(self, strength: float) -> Utility:
        """All parts, of the strength that is written; over-refusal only where it could still decide.

        Raises:
            EvaluationError: A loss or a divergence is not finite.
        """
        perplexity, kl = self._normal.perplexity(self._normal.scores(self.model)), self._normal.kl(self.model)
        found = utility_cost(self._compare, perplexity=perplexity, kl=kl)
        if found.within:
            if strength not in self._refused:
                self._refused[strength] = self._refusals.excess(self.model)
            refused = self._refused[strength]
            found = utility_cost(self._compare, perplexity=perplexity, kl=kl, over_refusal=refused)
        return Utility(perplexity=perplexity, kl=kl, over_refusal=self._refused.get(strength), cost=found)

    def largest(self) -> tuple[float, str | None]:
        """The largest strength found within the budget, 0 where none is, and what is beyond its limit a little above.

        Raises:
            EvaluationError: As ``utility``.
            TaskVectorError: As ``write``.
        """
        largest = self._compare.max_strength
        border = find_border(self.cost, first=largest * FIRST_PROBE, largest=largest)
        return step_down(border, self._fits)

    def _fits(self, strength: float) -> bool:
        self.write(strength)
        return self.utility(strength).cost.within
