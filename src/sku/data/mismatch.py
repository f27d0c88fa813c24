"""Which harmful answers of other prompts are paired with a prompt (random disassociation)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sku.errors import DataError


class MismatchedAnswers:
    """Draws answers of other prompts for each harmful example; equal seeds and positions give equal draws.

    A draw depends on the seed and the position only, never on earlier draws: a resumed run, another worker count or
    another batch size meets the same answers.
    """

    def __init__(self, groups: Sequence[str], num_answers: int, seed: int) -> None:
        """Prepares the draw.

        Args:
            groups: Group (``group_of``) of each harmful example; answers of an example's own group are excluded.
            num_answers: K.
            seed: Seed of the run.

        Raises:
            DataError: K is negative, or some prompt has fewer than K answers of other prompts to draw from.
        """
        if num_answers < 0:
            raise DataError(f"random_answers is {num_answers}; it must be 0 or more")
        self._num_answers = num_answers
        self._seed = seed
        self._group_of = list(groups)
        sizes: dict[str, int] = {}
        for group in groups:
            sizes[group] = sizes.get(group, 0) + 1
        fewest = len(groups) - max(sizes.values(), default=0)
        if num_answers > fewest:
            raise DataError(
                f"random_answers is {num_answers}, but some prompts have only {fewest} answers of other prompts "
                "to draw from; lower it or add harmful prompts"
            )

    def draw(self, index: int | None, position: int) -> list[int]:
        """Indices of K different examples of other groups.

        Args:
            index: The harmful example that gets the answers; None where they come from other data, so that none is
                its own.
            position: Place of this visit in the whole run, so that each pass draws anew.

        Returns:
            K indices into the examples that the groups were given of, without repetition.
        """
        rng = random.Random(f"{self._seed}/{position}/{index}")
        drawn: list[int] = []
        own = None if index is None else self._group_of[index]
        while len(drawn) < self._num_answers:
            candidate = rng.randrange(len(self._group_of))
            if self._group_of[candidate] != own and candidate not in drawn:
                drawn.append(candidate)
        return drawn
