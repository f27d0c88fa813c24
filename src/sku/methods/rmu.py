"""RMU: representation misdirection for unlearning.

Pushes the hidden states of harmful answers, after one middle decoder layer, towards one random vector, and holds
those of normal answers where the original model has them. Only the output projections of the MLPs of that layer and
the two before it are trained. Paper: arXiv 2403.03218 (Li et al., WMDP).
Shapes: N = positions of all rows of one kind, B = joint examples, H = width of the hidden states.

Positions are those before each answer token; the authors' code takes all positions of plain texts, padding included.
It trains weights alone, these modules' biases (OPT, GPT-NeoX, GPT-2) are trained too.

Source: ``rmu/unlearn.py`` of centerforaisafety/wmdp, read in copies of it (sheepjun0330/wmdp-main, and locuslab/
open-unlearning). c 6.5, alpha 1200 and layers 5, 6, 7 are its command for Zephyr-7B; its arguments default to 20, 100.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from sku.config.check import NotNegative, Positive, validated
from sku.data.examples import RowType
from sku.losses import mean_per_example
from sku.methods.base import Method, TermWeights, check_layers, names_in_layers
from sku.training import decoder_layers
from sku.training.objective import Objective, ScoredRows, Term, TrainingStep

_TRAINED_LAYERS = 3


@validated
class RmuSettings(TermWeights):
    """Settings of RMU. Defaults: the WMDP authors' for Zephyr-7B, which they choose anew for each model."""

    layer: int | None = None
    """Decoder layer, counted from 0, whose output is steered; empty for 7 of every 32, as with Zephyr-7B."""
    steering_coefficient: Positive = 6.5
    """c, length of the vector that harmful hidden states are pushed to."""
    forget_weight: NotNegative = 1.0
    """Weight of the push; 0 leaves it and its rows out."""
    retain_weight: NotNegative = 1200.0
    """alpha, weight of holding the normal hidden states; 0 leaves it and its rows out."""
    seed: int = 0
    """Draws the direction."""
    projections: Annotated[tuple[str, ...], Field(min_length=1)] = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")
    """Ends of the names of the trained modules: Llama, Qwen, Gemma, Mistral; OPT, Phi; GPT-NeoX; GPT-2."""


def rmu_loss(hidden_NH: Tensor, target_NH: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Squared distance of each example's hidden states from where they are to be.

    ``L_i = 1/|y_i| sum_t 1/H ||h_it - z_it||^2``: z is the steering vector ``c u`` for harmful examples, and what the
    original model has for normal ones.

    Args:
        hidden_NH: Output of the layer in the model in training, at the position before each answer token.
        target_NH: z, or ``[H]`` where it is the same everywhere; detached inside.
        example_N: Which joint example each position belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, mean square per dimension.

    Raises:
        ValueError: The shapes don't fit.

    Source: forget and retain loss of arXiv 2403.03218, which writes the norm; its code takes torch's ``mse_loss``, a
        mean over dimensions too, and so does this.
    """
    if target_NH.shape not in (hidden_NH.shape, hidden_NH.shape[-1:]):
        raise ValueError(f"hidden states {tuple(hidden_NH.shape)} and target {tuple(target_NH.shape)} don't fit")
    difference_NH = hidden_NH.float() - target_NH.detach().float()
    return mean_per_example(difference_NH.square().mean(-1), example_N, num_examples)


def steering_vector(width: int, *, coefficient: float, seed: int) -> Tensor:
    """``c u``: a direction drawn uniformly from ``[0, 1)`` in each dimension, at length c.

    Args:
        width: H.
        coefficient: c.
        seed: Draws the direction; equal seeds give equal vectors on every device.

    Returns:
        ``[H]`` float32 on the CPU.

    Source: ``control_vec`` of ``run_rmu`` in centerforaisafety/wmdp, which draws it in the model's own type.
    """
    direction_H = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    unit_H: Tensor = direction_H / torch.linalg.vector_norm(direction_H)
    return coefficient * unit_H


def steered_layer(settings: RmuSettings, model: PreTrainedModel) -> int:
    """The decoder layer whose output is steered.

    Raises:
        RecipeError: There is no such layer, or it is the last one.
        ModelError: As ``decoder_layers``.
    """
    layer = round(7 / 32 * len(decoder_layers(model)[1])) if settings.layer is None else settings.layer
    check_layers([layer], model, "methods.rmu.settings.layer")
    return layer


def _trained_modules(settings: RmuSettings, model: PreTrainedModel) -> list[str]:
    layer = steered_layer(settings, model)
    trained = range(max(0, layer + 1 - _TRAINED_LAYERS), layer + 1)
    return names_in_layers(model, trained, settings.projections, "methods.rmu.settings.projections")


def _objective(settings: RmuSettings, model: PreTrainedModel) -> Objective:
    width = model.config.get_text_config().hidden_size
    steering_H = steering_vector(width, coefficient=settings.steering_coefficient, seed=settings.seed)

    def forget(step: TrainingStep) -> Tensor:
        rows = step.rows(RowType.FORGET)
        hidden_NH = _hidden(rows)
        return rmu_loss(hidden_NH, steering_H.to(hidden_NH.device), rows.example_N, rows.num_examples)

    def retain(step: TrainingStep) -> Tensor:
        rows = step.rows(RowType.RETAIN)
        return rmu_loss(_hidden(rows), _hidden(step.reference(RowType.RETAIN)), rows.example_N, rows.num_examples)

    return Objective.of(
        {
            "forget": Term(weight=settings.forget_weight, loss=forget, rows={"forget": True}),
            "retain": Term(weight=settings.retain_weight, loss=retain, rows={"retain": True}, reference=True),
        },
        hidden_layers=(steered_layer(settings, model),),
    )


def _hidden(rows: ScoredRows) -> Tensor:
    return rows.hidden_states()[:, 0]


RMU = Method(
    name="rmu",
    title="RMU",
    paper_url="https://arxiv.org/abs/2403.03218",
    settings=RmuSettings,
    objective=_objective,
    trained_modules=_trained_modules,
)
