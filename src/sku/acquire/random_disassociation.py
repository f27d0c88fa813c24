"""Random disassociation: module 2 of stage 1.

Pairs each harmful prompt with harmful answers to OTHER prompts, so that the task vector holds harmful content in
general and not only the given pairs. Paper: arXiv 2402.10058.
Shapes: N = answer tokens of all rows, M = mismatched rows, E = harmful examples, V = vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sku.errors import DataError
from sku.losses import answer_nll, mean_per_example


def random_disassociation_loss(
    logits_NV: Tensor, targets_N: Tensor, row_N: Tensor, example_M: Tensor, num_examples: int
) -> Tensor:
    """Negative log-likelihood of the K mismatched answers of each prompt: mean over tokens, then over the K answers.

    ``L_RD,i = 1/K sum_k 1/|r_ik| sum_t -log p(r_ikt | x_i, r_ik<t)``

    Args:
        logits_NV: Scores of the model in training at the position before each answer token.
        targets_N: Tokens of the mismatched answers; the prompt's own tokens are not trained on.
        row_N: Which mismatched row (0 to M-1) each token belongs to.
        example_M: Which harmful example each mismatched row was drawn for.
        num_examples: E.

    Returns:
        ``[E]`` float32, nats per token.

    Raises:
        ValueError: The shapes don't fit.

    Source: equation of arXiv 2402.10058 for random disassociation. The authors' code takes the number of fields of
        the tokenizer's output (2) for the answer's start, so it trains on the question as well; here it does not.
    """
    nll_M = mean_per_example(answer_nll(logits_NV, targets_N), row_N, len(example_M))
    return mean_per_example(nll_M, example_M, num_examples)


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
            raise DataError(f"num_random_answers is {num_answers}; it must be 0 or more")
        self._num_answers = num_answers
        self._seed = seed
        self._group_of = list(groups)
        sizes: dict[str, int] = {}
        for group in groups:
            sizes[group] = sizes.get(group, 0) + 1
        fewest = len(groups) - max(sizes.values(), default=0)
        if num_answers > fewest:
            raise DataError(
                f"num_random_answers is {num_answers}, but some prompts have only {fewest} answers of other prompts "
                "to draw from; lower it or add harmful prompts"
            )

    def draw(self, index: int, position: int) -> list[int]:
        """Indices of K different examples of other groups.

        Args:
            index: The harmful example that gets the answers.
            position: Place of this visit in the whole run, so that each pass draws anew.

        Returns:
            K indices into the harmful examples, without repetition.
        """
        rng = random.Random(f"{self._seed}/{position}/{index}")
        drawn: list[int] = []
        own = self._group_of[index]
        while len(drawn) < self._num_answers:
            candidate = rng.randrange(len(self._group_of))
            if self._group_of[candidate] != own and candidate not in drawn:
                drawn.append(candidate)
        return drawn


def rows_in_order(row_of_kept_N: Tensor, rows_M: Tensor) -> Tensor:
    """Renumbers the rows of kept positions to 0..M-1, in the order of ``rows_M``.

    Args:
        row_of_kept_N: Batch row of each kept position, each of them in ``rows_M``.
        rows_M: Ascending batch rows.

    Returns:
        ``[N]`` long.
    """
    return torch.searchsorted(rows_M, row_of_kept_N)
