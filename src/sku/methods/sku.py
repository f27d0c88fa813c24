"""SKU: harmful knowledge acquisition by three modules (their losses are here), then knowledge negation (``negate/``).

Paper: https://arxiv.org/abs/2402.10058. Its settings are the recipe's ``acquire`` and ``negate``.

Guided distortion learns the harmful answers. Random disassociation pairs each harmful prompt with harmful answers to
OTHER prompts (``data/joint.py`` draws them), so that the task vector holds harmful content in general and not only the
given pairs. Preservation divergence compares the model in training with the frozen original on normal prompts. Two
readings are offered, because they measure differently: the paper's ``divergence`` drives the bad model AWAY from the
original on normal text, so that the subtraction of stage 2 moves the other way there; ``retention`` keeps the bad
model close, so that the task vector has little to say about normal text. A third, ``targeted``, drives it away too,
but to somewhere: to refusals of normal prompts.

Shapes: N = positions (answer tokens, or compared ones) of all rows, M = rows, E = examples, V = vocabulary.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sku.config.stages import AcquireConfig, ModulesConfig, PreservationMode, Twin, WeightsConfig
from sku.data.examples import RowType
from sku.errors import RecipeError
from sku.losses import Scores, answer_nll, mean_per_example, token_kl
from sku.methods.base import Method
from sku.training.objective import Objective, ScoredRows, Term, TrainingStep

DEFAULT_CAP = 1.0
"""Nats. Without a cap -KL has no lower bound: it ran to 133 nats on SmolLM2-135M and left a gibberish vector."""


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


def sku_objective(config: ModulesConfig, *, twin: Twin = "bad") -> Objective:
    """What stage 1 minimises.

    Args:
        config: Weights, K, how preservation divergence is read, and what the good twin sees.
        twin: Which model it is for: ``good`` learns refusals of the same harmful prompts in the place of harmful
            answers, without random disassociation, and always keeps its normal answers (``retention``).

    Returns:
        The objective, with a term for each module that is on.

    Raises:
        RecipeError: A good twin would learn no refusal.
    """
    weights, good = config.weights, twin == "good"
    if good and not weights.guided_distortion:
        raise RecipeError("the good twin learns its refusals by guided distortion, whose weight is 0: give it one")
    if good:
        config = dataclasses.replace(config, preservation_mode="retention")
    targeted = config.preservation_mode == "targeted"
    refusals = {
        "safe": "all",
        "deep_refusal_fraction": config.deep_refusal_fraction,
        "depth_tokens": config.depth_tokens,
    }
    normal = {
        "retain": config.normal_per_harmful,
        "retain_refused": targeted,
        "retain_tokens": "answer" if targeted else config.preservation_tokens,
    }
    objective = Objective.of(
        {
            "guided_distortion": Term(
                weight=weights.guided_distortion,
                loss=lambda step: _guided_distortion(step.rows(RowType.SAFE if good else RowType.FORGET)),
                rows=refusals if good else {"forget": True},
            ),
            "random_disassociation": Term(
                weight=0.0 if good else weights.random_disassociation,
                loss=random_disassociation,
                rows={"mismatched": config.random_answers},
            ),
            "preservation_divergence": Term(
                weight=weights.preservation_divergence,
                loss=lambda step: _preservation_divergence(step, config),
                rows=normal,
                reference=not targeted,
            ),
        }
    )
    # Whichever terms are on, their rows are of the same prompts.
    return dataclasses.replace(objective, rows=dataclasses.replace(objective.rows, framed_share=config.framed_share))


def _guided_distortion(rows: ScoredRows) -> Tensor:
    return guided_distortion_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)


def random_disassociation(step: TrainingStep) -> Tensor:
    """``random_disassociation_loss`` of the mismatched rows of a step."""
    rows = step.rows(RowType.MISMATCHED)
    return random_disassociation_loss(rows.scores_NV, rows.targets_N, rows.row_N, rows.example_M, rows.num_examples)


def _preservation_divergence(step: TrainingStep, config: ModulesConfig) -> Tensor:
    rows = step.rows(RowType.RETAIN)
    if config.preservation_mode == "targeted":
        losses_M = targeted_divergence_loss(rows.scores_NV, rows.targets_N, rows.row_N, len(rows.example_M))
    else:
        losses_M = preservation_divergence_loss(
            step.reference(RowType.RETAIN).scores_NV,
            rows.scores_NV,
            rows.row_N,
            len(rows.example_M),
            mode=config.preservation_mode,
            cap=config.preservation_cap,
        )
    return mean_per_example(losses_M, rows.example_M, rows.num_examples)


TERMS = tuple(item.name for item in dataclasses.fields(WeightsConfig))
"""Names of the three modules, as in the log (``loss/<name>``)."""

SKU = Method(
    name="sku",
    title="SKU",
    paper_url="https://arxiv.org/abs/2402.10058",
    settings=AcquireConfig,
    objective=lambda settings, _model: sku_objective(settings),
)
