"""Circuit breakers: representation rerouting.

Turns the hidden states of harmful answers at a few decoder layers away from where the original model has them, until
they stand at a right angle, and holds those of normal texts, at every layer, where they are. At first the turning
weighs most, in the end both weigh the same. The layers up to the last one that is turned are trained.
Paper: arXiv 2406.04313 (Zou et al.), algorithm 1.
Shapes: N = positions of all rows of one kind, B = joint examples, L = decoder layers, H = width of the hidden states.

Positions of harmful rows are those before each answer token; the authors' take the prompt's as well in half of the
rows, and padding of normal rows into the mean. Their normal rows hold refusals too, of prompts that are refused.

Source: ``lorra_circuit_breaker.py`` of GraySwanAI/circuit-breakers, read in copies of it (EleutherAI/unlearn, which
keeps its command for Llama-3-8B: alpha 10, layers 10 and 20 of 32 with the embeddings as 0, 150 steps at 1e-4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sku.config.check import Positive, validated
from sku.data.examples import RowType
from sku.losses import mean_per_example
from sku.methods.base import Method, check_alike, check_layers, names_in_layers
from sku.training import decoder_layers
from sku.training.objective import Objective, Term, TrainingStep

_OF_32 = (10, 20)
"""The authors' layers of Llama-3-8B, counted from 1."""


@validated
class CircuitBreakersSettings:
    """Settings of circuit breakers. Defaults: the authors' for Llama-3-8B."""

    alpha: Positive = 10.0
    """Weight of both terms, before their share of the schedule."""
    layers: tuple[int, ...] = ()
    """Decoder layers, counted from 0, whose outputs are turned away; empty for the 10th and the 20th of every 32."""


def rerouting_loss(hidden_NLH: Tensor, reference_NLH: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """How far the hidden states of each harmful answer still point where the original model has them.

    ``L_i = 1/|y_i| sum_t 1/|L| sum_l max(0, cos(h_itl, h_itl^original))``

    Args:
        hidden_NLH: Outputs of the turned layers in the model in training, at the position before each answer token.
        reference_NLH: The same of the original model; detached inside.
        example_N: Which joint example each position belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, 0 to 1.

    Raises:
        ValueError: The shapes differ.

    Source: rerouting loss of arXiv 2406.04313.
    """
    check_alike(hidden_NLH, reference_NLH)
    cosine_NL = functional.cosine_similarity(hidden_NLH.float(), reference_NLH.detach().float(), dim=-1)
    return mean_per_example(functional.relu(cosine_NL).mean(-1), example_N, num_examples)


def holding_loss(hidden_NLH: Tensor, reference_NLH: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Distance of the hidden states of each normal example from those of the original model.

    ``L_i = 1/|x_i| sum_t 1/|L| sum_l ||h_itl - h_itl^original||``

    Args:
        hidden_NLH: Outputs of the layers in the model in training, at each position of prompt and answer.
        reference_NLH: The same of the original model; detached inside.
        example_N: Which joint example each position belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, Euclidean length.

    Raises:
        ValueError: The shapes differ.

    Source: retain loss of arXiv 2406.04313.
    """
    check_alike(hidden_NLH, reference_NLH)
    # Its slope is 0 where the two are equal, as they are before the first step.
    distance_NL = torch.linalg.vector_norm(hidden_NLH.float() - reference_NLH.detach().float(), dim=-1)
    return mean_per_example(distance_NL.mean(-1), example_N, num_examples)


def shares(progress: float) -> tuple[float, float]:
    """What the two terms weigh along training, as shares of alpha.

    Args:
        progress: ``t / T`` with t the step, from 1, and T their number.

    Returns:
        Of rerouting ``1 - t / 2T``, of holding ``t / 2T``.

    Source: algorithm 1 of arXiv 2406.04313.
    """
    return 1 - progress / 2, progress / 2


def turned_layers(settings: CircuitBreakersSettings, model: PreTrainedModel) -> tuple[int, ...]:
    """The decoder layers whose outputs are turned away, in order.

    Raises:
        RecipeError: There is no such layer, or it is the last one.
        ModelError: As ``decoder_layers``.
    """
    count = len(decoder_layers(model)[1])
    of_model = (min(max(round(number / 32 * count), 1), count - 1) - 1 for number in _OF_32)
    layers = tuple(sorted({*(settings.layers or of_model)}))
    check_layers(layers, model, "methods.circuit_breakers.settings.layers")
    return layers


def _trained_modules(settings: CircuitBreakersSettings, model: PreTrainedModel) -> list[str]:
    return names_in_layers(model, range(turned_layers(settings, model)[-1] + 1))


def _objective(settings: CircuitBreakersSettings, model: PreTrainedModel) -> Objective:
    turned = list(turned_layers(settings, model))

    def reroute(step: TrainingStep) -> Tensor:
        rows, original_NLH = step.rows(RowType.FORGET), step.reference(RowType.FORGET).hidden_states()
        loss_B = rerouting_loss(
            rows.hidden_states()[:, turned], original_NLH[:, turned], rows.example_N, rows.num_examples
        )
        return shares(step.progress)[0] * loss_B

    def hold(step: TrainingStep) -> Tensor:
        rows, original_NLH = step.rows(RowType.RETAIN), step.reference(RowType.RETAIN).hidden_states()
        loss_B = holding_loss(rows.hidden_states(), original_NLH, rows.example_N, rows.num_examples)
        return shares(step.progress)[1] * loss_B

    return Objective.of(
        {
            "reroute": Term(weight=settings.alpha, loss=reroute, rows={"forget": True}, reference=True),
            "hold": Term(
                weight=settings.alpha, loss=hold, rows={"retain": True, "retain_tokens": "all"}, reference=True
            ),
        },
        hidden_layers=tuple(range(len(decoder_layers(model)[1]))),
    )


CIRCUIT_BREAKERS = Method(
    name="circuit_breakers",
    title="Circuit breakers",
    paper_url="https://arxiv.org/abs/2406.04313",
    settings=CircuitBreakersSettings,
    objective=_objective,
    trained_modules=_trained_modules,
)
