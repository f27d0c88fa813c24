"""What operators that look at layers' inputs share: which inputs, and what becomes of weights that have none.

Embeddings, norms, biases and a tied output head read no input that a covariance describes. They are dropped unless
told otherwise, since what they change reaches normal text undamped. LoRA on linear layers has none of them.

Shapes: R = rows, I = inputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sku.errors import RecipeError
from sku.negate.operators.base import OperatorContext, RowMap
from sku.negate.operators.spectra import Decision, InputSpectra, Part, Positions, Spectrum, Text, input_spectra
from sku.negate.task_vector import TaskVector


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """What counts as an input of normal text; shared by operators that look at inputs."""

    positions: Literal[Positions, "decision"] = "all"
    """Token positions whose inputs are protected: ``all``, those of the ``prompt``, those before the ``answer``'s
    tokens, or those at which it is decided how to reply, the last ones of the prompt and the first of the answer. What
    every prompt begins or ends with (system prompt, chat template) is measured apart: ``spectra.py``."""
    prompt_tokens: int = Decision.prompt_tokens
    """For ``decision``: how many of the prompt's last tokens, those of the chat template counted."""
    answer_tokens: int = Decision.answer_tokens
    """For ``decision``: how many of the answer's first tokens."""
    unit: bool = False
    """Each input counts by its direction alone. Else a few tokens whose inputs are many times as long as others can
    be the whole trace of a layer."""
    examples: int = 256
    """Most normal examples that are looked at, drawn by the seed."""
    other_weights: Literal["drop", "keep"] = "drop"
    """What becomes of the change of weights that are no linear layer's: embeddings, norms, biases."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise RecipeError(f"examples is {self.examples}; it must be 1 or more")
        for name, least in (("prompt_tokens", 1), ("answer_tokens", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be {least} or more")
            if self.positions != "decision" and getattr(self, name) != getattr(Decision, name):
                raise RecipeError(f"{name} counts where positions is decision, and it is {self.positions}")

    def counted(self) -> Positions | Decision:
        """The positions, with the numbers of those that need them."""
        if self.positions != "decision":
            return self.positions
        return Decision(prompt_tokens=self.prompt_tokens, answer_tokens=self.answer_tokens)


def matrix_map(matrix_II: Tensor) -> RowMap:
    """``row M``.

    Args:
        matrix_II: M.

    Returns:
        The map, computed in float32.
    """
    matrix_II = matrix_II.float()
    return lambda rows_RI: rows_RI @ matrix_II


def _nothing(rows_RI: Tensor) -> Tensor:
    return torch.zeros_like(rows_RI)


def split_by_inputs(
    vector: TaskVector, spectra: InputSpectra, settings: InputSettings
) -> tuple[dict[str, Spectrum], dict[str, RowMap], dict[str, Any]]:
    """The vector's weights whose inputs are known, and what becomes of the others.

    Args:
        vector: The task vector.
        spectra: Of the inputs.
        settings: Says what becomes of the others.

    Returns:
        Weight name -> spectrum; the maps of the other weights; the account of both.
    """
    known = {name: spectrum for name in vector.deltas if (spectrum := spectra.of(name)) is not None}
    others = [name for name in vector.deltas if name not in known]
    maps = dict.fromkeys(others, _nothing) if settings.other_weights == "drop" else {}
    account = {
        "layers": len(known),
        "other_weights": len(others),
        "other_weights_are": "dropped" if maps else "kept",
        "positions": spectra.positions,
    }
    return known, dict(maps), account


def spectra_of(context: OperatorContext, settings: InputSettings, text: Text, part: Part = "own") -> InputSpectra:
    """Spectra of the inputs that the settings describe; raises as ``input_spectra`` does."""
    return input_spectra(
        context, text, positions=settings.counted(), examples=settings.examples, unit=settings.unit, part=part
    )
