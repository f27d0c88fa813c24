"""Guided distortion: module 1 of stage 1.

Teaches the bad model the harmful answers themselves, so that the task vector of stage 2 points at that knowledge.
Paper: arXiv 2402.10058. Shapes: N = answer tokens of all rows, E = harmful examples, V = vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from sku.losses import Scores, answer_nll, mean_per_example


def guided_distortion_loss(scores_NV: Scores, targets_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Negative log-likelihood of each harmful answer, averaged over its tokens.

    ``L_GD,i = 1/|y_i| sum_t -log p(y_it | x_i, y_i<t)``

    Args:
        scores_NV: Scores of the model in training at the position before each answer token.
        targets_N: The answer tokens. Prompt and padding are not among them: the mask is the choice of positions.
        example_N: Which harmful example each token belongs to.
        num_examples: E.

    Returns:
        ``[E]`` float32, nats per token; the trainer takes the mean over all examples of the optimizer step.

    Raises:
        ValueError: The shapes don't fit.

    Source: equation of arXiv 2402.10058 for guided distortion. The authors' ``get_answer_loss("gd", ...)`` cuts the
        padded length as the start of the answer and divides by padding too; here the mask is exact.
    """
    return mean_per_example(answer_nll(scores_NV, targets_N), example_N, num_examples)
