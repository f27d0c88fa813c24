"""Random disassociation: module 2 of stage 1.

Pairs each harmful prompt with harmful answers to OTHER prompts (``data/joint.py`` draws them), so that the task
vector holds harmful content in general and not only the given pairs. Paper: arXiv 2402.10058.
Shapes: N = answer tokens of all rows, M = mismatched rows, E = harmful examples, V = vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from sku.losses import Scores, answer_nll, mean_per_example


def random_disassociation_loss(
    scores_NV: Scores, targets_N: Tensor, row_N: Tensor, example_M: Tensor, num_examples: int
) -> Tensor:
    """Negative log-likelihood of the K mismatched answers of each prompt: mean over tokens, then over the K answers.

    ``L_RD,i = 1/K sum_k 1/|r_ik| sum_t -log p(r_ikt | x_i, r_ik<t)``

    Args:
        scores_NV: Scores of the model in training at the position before each answer token.
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
    nll_M = mean_per_example(answer_nll(scores_NV, targets_N), row_N, len(example_M))
    return mean_per_example(nll_M, example_M, num_examples)
