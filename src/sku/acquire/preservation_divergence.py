"""Preservation divergence: module 3 of stage 1.

Compares the model in training with the frozen original on normal prompts. Two readings are offered, because they
measure differently: the paper's ``divergence`` drives the bad model AWAY from the original on normal text, so that the
subtraction of stage 2 moves the other way there; ``retention`` keeps the bad model close, so that the task vector has
little to say about normal text. Paper: arXiv 2402.10058. A third, ``targeted``, drives it away too, but to somewhere:
to refusals of normal prompts.
Shapes: N = compared positions of all rows, E = normal examples (or rows), V = vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from sku.config.stages import PreservationMode
from sku.losses import Scores, answer_nll, mean_per_example, token_kl

DEFAULT_CAP = 1.0
"""Nats. Without a cap -KL has no lower bound: it ran to 133 nats on SmolLM2-135M and left a gibberish vector."""


def preservation_divergence_loss(
    reference_NV: Scores,
    scores_NV: Scores,
    example_N: Tensor,
    num_examples: int,
    *,
    mode: PreservationMode,
    cap: float | None = DEFAULT_CAP,
) -> Tensor:
    """Signed divergence from the original model on each normal example.

    ``divergence``: ``L_PD,i = -1/|n_i| sum_t min(KL(P_t || Q_t), cap)``
    ``retention``:  ``L_PD,i = +1/|n_i| sum_t KL(P_t || Q_t)``

    with P the original model and Q the model in training, over the whole vocabulary.

    Args:
        reference_NV: P's scores; detached inside.
        scores_NV: Q's scores at the same positions.
        example_N: Which normal example each position belongs to.
        num_examples: E.
        mode: Which of the two; ``targeted`` has its own function, ``targeted_divergence_loss``.
        cap: Nats, above 0. Positions beyond it keep their value but stop pulling (``divergence`` only; ``None`` for no
            cap, as in the paper).

    Returns:
        ``[E]`` float32, nats per token.

    Raises:
        ValueError: The shapes don't fit.

    Source: equation of arXiv 2402.10058 for preservation divergence. The authors' ``compute_reverse_kl`` computes the
        same sign and direction but averages over prompt and padding and takes the log of a softmax that underflows.
    """
    kl_N = token_kl(reference_NV, scores_NV)
    if mode == "retention":
        return mean_per_example(kl_N, example_N, num_examples)
    if cap is not None:
        kl_N = kl_N.clamp(max=cap)
    return -mean_per_example(kl_N, example_N, num_examples)


def targeted_divergence_loss(scores_NV: Scores, targets_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Negative log-likelihood of a misplaced refusal of each normal prompt, averaged over its tokens.

    ``L_PD,i = 1/|r_i| sum_t -log p(r_it | n_i, r_i<t)`` with n a normal prompt and r a refusal of it.

    A divergence with a target: at its minimum, 0, the model refuses normal prompts, and what stage 2 subtracts moves
    it the other way, to answers. It is bounded below, so no cap is needed, and no reference model is asked. Where the
    bad model answers harmful prompts and refuses normal ones, its difference tells the two kinds of prompts apart.

    Args:
        scores_NV: Scores of the model in training at the position before each refusal token.
        targets_N: The refusals' tokens, without their end; prompt and padding are not among them.
        example_N: Which normal example each token belongs to.
        num_examples: E.

    Returns:
        ``[E]`` float32, nats per token.

    Raises:
        ValueError: The shapes don't fit.

    Source: ours; the place of preservation divergence (arXiv 2402.10058), whose -KL has no lower bound.
    """
    return mean_per_example(answer_nll(scores_NV, targets_N), example_N, num_examples)
