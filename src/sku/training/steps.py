"""One forward pass of a batch, padded or packed, and what it says of the rows of each kind.

Shapes: R = rows and T = tokens of a padded batch, or T = tokens of the packed row and U = its places whose scores are
needed; N = kept positions (whose next token counts) of the rows of one kind, M = those rows, V = vocabulary, H = width
of the hidden states, O = outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sku.data.batches import PackedRows, Rows
from sku.errors import ModelError, RecipeError
from sku.losses import HeadScores
from sku.training.attention import packed_forward_pass, use_packed_attention
from sku.training.layers import lora_layers
from sku.training.objective import ScoredRows

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's layers that call ``lora_B`` for each token; the last two are there only with bitsandbytes."""


def run_rows(rows: Rows, model: nn.Module, plain: PreTrainedModel | PeftModel, *, hidden_states: bool = False) -> Any:
    """Runs a model on rows; it keeps the attention of packed rows from then on.

    Args:
        rows: On the model's device.
        model: Possibly wrapped for distributed training.
        plain: The same without that.
        hidden_states: Whether the output of every layer comes too, ``[R, T, H]`` each.

    Returns:
        The model's outputs, with logits ``[U, V]``, or ``[1, U, V]`` of packed rows.

    Raises:
        ModelError: The model's attention would misread a packed row, or asks for something that can't be packed.
    """
    options = {**rows.model_inputs, "use_cache": False} | ({"output_hidden_states": True} if hidden_states else {})
    if not isinstance(rows, PackedRows):
        return model(**options)
    # Stays so until training ends: activation checkpointing runs layers again in the backward.
    use_packed_attention(plain)
    with packed_forward_pass(plain, rows.paths):
        return model(**options)


def scores_of_kind(rows: Rows, kind: int, outputs: Any, hidden_layers: Sequence[int] = ()) -> ScoredRows:
    """The part of a model's outputs on rows that belongs to those of one kind.

    Args:
        rows: What the model was run on.
        kind: Which rows.
        outputs: Of ``run_rows``.
        hidden_layers: Decoder layers, counted from 0, whose outputs are given too.

    Returns:
        One pair of scores and target for each kept position of each row, and where they belong.
    """
    kept, scores = rows.kept[kind], outputs.logits[0] if isinstance(rows, PackedRows) else outputs.logits
    made = not isinstance(scores, HeadScores)
    rows_N = _take_rows(scores if made else scores.hidden_NH, kept.score_N)
    return ScoredRows(
        scores_NV=rows_N if made else replace(scores, hidden_NH=rows_N),
        targets_N=kept.targets_N,
        row_N=kept.row_N,
        example_M=kept.example_M,
        num_examples=rows.num_examples,
        hidden_NLH=_stacked(
            _take_rows(outputs.hidden_states[layer + 1].flatten(0, 1), kept.place_N) for layer in hidden_layers
        ),
    )


def _take_rows(values: Tensor, index_N: Tensor) -> Tensor:
    """Rows, some of them more than once, with a backward that adds in a fixed order."""
    # On a CPU that is the backward of index_select, on a GPU that of an index.
    return values.index_select(0, index_N) if values.device.type == "cpu" else values[index_N]


def _stacked(hidden: Iterable[Tensor]) -> Tensor | None:
    """``[N, L, H]`` from ``[N, H]`` of each layer; None where no layer is read."""
    layers = list(hidden)
    return torch.stack(layers, 1) if layers else None


class TokenScale:
    """A LoRA adapter that counts differently for some tokens: one forward pass, another model for each kind of rows.

    With ``h = W x + s_t * B A x`` for token t, rows that see only tokens of their own scale s are computed as by the
    model ``theta_o + s (theta_bad - theta_o)``: s = 1 is the model in training, s = -alpha the one that stage 2 makes
    of it. Linear in the adapter, so nothing but plain LoRA on linear layers can be scaled so.
    """

    def __init__(self, model: PeftModel) -> None:
        """Scales nothing yet; ``token_scale`` makes sure that the model has plain LoRA."""
        self._model = model
        self._hooks: list[RemovableHandle] = []
        self._scale_RT1: Tensor | None = None

    def set(self, scale_RT1: Tensor) -> None:
        """From now on the adapter counts so, until ``remove``: activation checkpointing runs layers again later.

        The scale is ``[R, T, 1]`` or ``[R, 1, 1]``.
        """
        self._scale_RT1 = scale_RT1
        if not self._hooks:
            upper_halves = (half for layer in lora_layers(self._model) for half in layer.lora_B.values())
            self._hooks = [half.register_forward_hook(self._scale) for half in upper_halves]

    def remove(self) -> None:
        """The adapter counts as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _scale(self, module: nn.Module, _inputs: Any, added: Tensor) -> Tensor:
        """Some models (OPT) put the tokens of all rows after each other before a layer: ``[R T, O]``."""
        assert self._scale_RT1 is not None
        scale = self._scale_RT1
        if added.ndim == 2:
            tokens = len(added) // len(scale) if scale.shape[1] == 1 else scale.shape[1]
            scale = scale.expand(-1, tokens, 1).flatten(0, 1)
        if added.ndim != scale.ndim or len(scale) != len(added) or scale.shape[1] not in (1, added.shape[1]):
            raise ModelError(
                f"a layer of the adapter doesn't see the tokens of the batch ({tuple(added.shape)} for "
                f"{len(self._scale_RT1)} rows), so normal text can't be compared elsewhere: set preservation_at to 1"
            )
        return added * scale.to(added.dtype)


def token_scale(model: nn.Module, retain_at: float) -> TokenScale | None:
    """What reads normal rows at another point of the line through original and trained model; None for 1.

    Raises:
        RecipeError: The point can't be had with this model.
    """
    if retain_at == 1:
        return None
    reason = _why_not(model)
    if reason is not None:
        raise RecipeError(f"preservation_at is {retain_at:g}, which needs plain LoRA, and {reason}: set it to 1")
    assert isinstance(model, PeftModel)
    return TokenScale(model)


def _why_not(model: nn.Module) -> str | None:
    if not isinstance(model, PeftModel):
        return "all weights are trained"
    layers = lora_layers(model)
    if not layers:
        return "the adapter is another"
    if any(layer.lora_embedding_B for layer in layers):
        return "the adapter changes embeddings"
    if any(layer.lora_variant for layer in layers):
        return "the adapter is a variant that is not linear in what it adds"
    kinds = sorted({type(layer).__name__ for layer in layers} - set(_LINEAR))
    if kinds:
        return f"the adapter changes more than linear layers ({kinds[0]})"
    others = sorted(name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name)
    return f"{others[0]} is trained too" if others else None
