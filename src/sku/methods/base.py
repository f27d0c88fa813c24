"""The one interface of all methods: what is trained, and what is then done with the difference it made.

Every method starts from the original model, sees the same joint examples in the same order, is trained by the same
loop and changes the model by ``theta_u = theta_o + strength * delta``. For most methods ``delta`` is what training
changed; SKU and the plain task vector turn its sign (knowledge negation).

What keeps a baseline's model good on normal prompts is the same for all: its answers are learned, or its predictions
held. ``gd`` (gradient descent) is the cross-entropy of the normal answers, ``kl`` the divergence from the original
model on them. Names and meaning as in TOFU, arXiv 2401.06121 ("Gradient Difference" and "KL Minimization").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.config.check import validated
from sku.config.recipe import NEGATING_METHODS
from sku.data.examples import RowType
from sku.errors import RecipeError
from sku.losses import mean_per_example, token_kl
from sku.training import decoder_layers
from sku.training.objective import Objective, Term, TrainingStep

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Method(Generic[Settings]):
    """An unlearning method. One file defines one, and ``sku.methods.METHODS`` lists them."""

    name: str
    """As in ``--methods`` and in a recipe's ``methods``."""
    title: str
    """As in tables and pictures."""
    paper_url: str
    settings: type[Settings]
    """Frozen dataclass of the method's own settings, with the paper's values as defaults."""
    objective: Callable[[Settings, PreTrainedModel], Objective]
    """What is minimised. The model is given for its shape alone, such as the number of layers."""
    trained_modules: Callable[[Settings, PreTrainedModel], Sequence[str]] | None = None
    """Names of the modules that are trained; None for all that the recipe's tuning names."""

    @property
    def negates(self) -> bool:
        """Whether ``delta`` is what training changed with its sign turned (knowledge negation).

        The trained model then answers harmful prompts on purpose, so that it must never leave the machine.
        """
        return self.name in NEGATING_METHODS


AnyMethod = Method[Any]


@validated
class NoSettings:
    """Of a method with one term, whose scale the learning rate sets."""


@validated
class TermWeights:
    """Of a method with several terms: a ``..._weight`` of 0 leaves one out, and not all may be 0."""

    def __post_init__(self) -> None:
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        if getattr(self, "retain", "") == "none":
            weights["retain_weight"] = 0.0
        if not any(weights.values()):
            raise RecipeError(
                f"{' and '.join(weights)} leave no term on: there is nothing to train; set a weight above 0"
            )


RetainKind = Literal["gd", "kl", "none"]


def retain_term(kind: RetainKind, weight: float = 1.0) -> dict[str, Term]:
    """The term on normal pairs under its name in the log, ``retain`` or ``retain_kl``; empty for ``none``.

    ``gd``: ``L_i = 1/|y_i| sum_t -log p(y_it | x_i, y_i<t)``, nats per token.

    ``kl``: ``L_i = 1/|y_i| sum_t KL(P_t || Q_t)`` with P the original model and Q the model in training, at the
    positions before the answer's tokens.

    Source: "Gradient Difference", arXiv 2401.06121 and 2203.12817; "KL Minimization" of arXiv 2401.06121. The NPO
        authors' code averages the divergence over prompt and padding too.
    """

    def gd(step: TrainingStep) -> Tensor:
        return step.rows(RowType.RETAIN).mean_nll()

    def kl(step: TrainingStep) -> Tensor:
        rows = step.rows(RowType.RETAIN)
        kl_N = token_kl(step.reference(RowType.RETAIN).scores_NV, rows.scores_NV)
        return mean_per_example(kl_N, rows.example_N, rows.num_examples)

    if kind == "none":
        return {}
    if kind == "gd":
        return {"retain": Term(weight=weight, loss=gd, rows={"retain": True})}
    return {"retain_kl": Term(weight=weight, loss=kl, rows={"retain": True}, reference=True)}


def check_alike(*tensors: Tensor) -> None:
    """Raises ValueError where shapes differ: they would broadcast."""
    if len({tensor.shape for tensor in tensors}) != 1:
        raise ValueError(f"shapes differ: {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")


def check_layers(layers: Sequence[int], model: PreTrainedModel, setting: str) -> None:
    """Refuses decoder layers that are not there, and the last: transformers returns its output after the final norm.

    Args:
        layers: Counted from 0.
        model: Asked for its shape alone.
        setting: Key of the layers in the recipe, for the message.

    Raises:
        RecipeError: With the layers that the model has.
        ModelError: As ``decoder_layers``.
    """
    last = len(decoder_layers(model)[1]) - 1
    if not all(0 <= layer < last for layer in layers):
        raise RecipeError(
            f"{setting} is {', '.join(str(layer) for layer in layers)}; it must be 0 or more and below {last}, the "
            "model's last decoder layer, whose output is not seen before its norm"
        )


def names_in_layers(
    model: PreTrainedModel, indices: Iterable[int], ends: Sequence[str] | None = None, setting: str = ""
) -> list[str]:
    """Full names of modules of some decoder layers.

    Args:
        model: Without adapter.
        indices: Which layers, counted from 0.
        ends: What names end in, such as ``down_proj`` or ``mlp.c_proj``, whole parts of them; of None all linear ones.
        setting: Key of ``ends`` in the recipe, for the message.

    Raises:
        RecipeError: A layer has no such module.
        ModelError: As ``decoder_layers``.
    """
    list_name, layers = decoder_layers(model)
    found: list[str] = []
    for index in indices:
        inner = {name: module for name, module in layers[index].named_modules() if name}
        if ends is None:
            own = [name for name, module in inner.items() if isinstance(module, nn.Linear | Conv1D)]
        else:
            own = [name for name in inner if f".{name}".endswith(tuple(f".{end}" for end in ends))]
        if not own:
            raise RecipeError(
                f"{setting} is {ends}, but decoder layer {index} holds only {', '.join(inner)}; name the modules that "
                "are meant"
            )
        found += [f"{list_name}.{index}.{name}" for name in own]
    return found
