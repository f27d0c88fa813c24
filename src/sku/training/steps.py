"""One forward pass of a batch, padded or packed, and what it says of the rows of each kind.

Shapes: R = rows and T = tokens of a padded batch, or T = tokens of the packed row and U = its places whose scores are
needed; N = kept positions (whose next token counts) of the rows of one kind, M = those rows, K = kept positions of all
rows, V = vocabulary, H = width of the hidden states, O = outputs of a layer.
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

from sku.data.batches import PackedRows
from sku.data.joint import RETAIN, RowPlan
from sku.data.tokens import IGNORE_INDEX
from sku.errors import ModelError, RecipeError
from sku.losses import HeadScores
from sku.training.attention import packed_forward_pass, use_packed_attention
from sku.training.layers import lora_layers
from sku.training.objective import ScoredRows

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's layers that call ``lora_B`` for each token; the last two are there only with bitsandbytes."""


def kept_positions(inputs: dict[str, Tensor], plan: RowPlan) -> Tensor:
    """``[R, T]`` bool: where the next token is learned or compared."""
    following = inputs["labels"][:, 1:] != IGNORE_INDEX
    if plan.retain_tokens == "all":
        is_retain = (inputs["row_kind"] == RETAIN)[:, None]
        following = following | (is_retain & (inputs["attention_mask"][:, 1:] == 1))
    return nn.functional.pad(following, (0, 1), value=False)


class PaddedBatch:
    """Rows of equal length."""

    def __init__(self, inputs: dict[str, Tensor], plan: RowPlan, kept_RT: Tensor | None = None) -> None:
        """A batch of ``JointCollator`` on the model's device, and which of its positions count."""
        self._inputs, self._plan = inputs, plan
        self._kept_RT = kept_positions(inputs, plan) if kept_RT is None else kept_RT

    @property
    def is_retain_RT1(self) -> Tensor:  # noqa: N802 - named by shape
        """``[R, 1, 1]``: whether a row is a normal one."""
        return (self._inputs["row_kind"] == RETAIN)[:, None, None]

    def of_kind(self, kind: int) -> PaddedBatch:
        """The rows of one kind, cut where the longest of them ends."""
        inputs = self._inputs
        rows_R = inputs["row_kind"] == kind
        kept_RT = self._kept_RT[rows_R]
        longest = int(inputs["attention_mask"][rows_R].sum(1).max())
        own = {
            **inputs,
            "input_ids": inputs["input_ids"][rows_R][:, :longest],
            "attention_mask": inputs["attention_mask"][rows_R][:, :longest],
            "row_example": inputs["row_example"][rows_R],
            "row_kind": inputs["row_kind"][rows_R],
        }
        return PaddedBatch(own, self._plan, kept_RT[:, :longest])

    def forward(self, model: nn.Module, plain: PreTrainedModel | PeftModel, *, hidden_states: bool = False) -> Any:
        """Runs a model: ``model`` may be wrapped for distributed training, ``plain`` is the same without that.

        Logits are ``[K, V]``; with ``hidden_states`` the output of every layer comes too, ``[R, T, H]`` each.
        """
        return model(
            input_ids=self._inputs["input_ids"],
            attention_mask=self._inputs["attention_mask"],
            logits_to_keep=self._kept_RT,
            use_cache=False,
            **({"output_hidden_states": True} if hidden_states else {}),
        )

    def scores(self, kind: int, outputs: Any, hidden_layers: Sequence[int] = ()) -> ScoredRows:
        """The part of the outputs of ``forward`` that belongs to the rows of one kind.

        Args:
            kind: Which rows.
            outputs: On this batch.
            hidden_layers: Decoder layers, counted from 0, whose outputs are given too.

        Returns:
            One pair of scores and target for each kept position of each row, and where they belong.
        """
        inputs, kept_RT = self._inputs, self._kept_RT
        row_N, position_N = kept_RT.nonzero(as_tuple=True)
        own_N = inputs["row_kind"][row_N] == kind
        rows_M = (inputs["row_kind"] == kind).nonzero(as_tuple=True)[0]
        row_N, position_N = row_N[own_N], position_N[own_N]
        return ScoredRows(
            scores_NV=outputs.logits[own_N],
            targets_N=inputs["input_ids"][row_N, position_N + 1],
            row_N=torch.searchsorted(rows_M, row_N),
            example_M=inputs["row_example"][rows_M],
            num_examples=len(inputs["forget_index"]),
            hidden_NLH=_stacked(outputs.hidden_states[layer + 1][row_N, position_N] for layer in hidden_layers),
        )


class PackedBatch:
    """The same as one packed row: each method means what it does in ``PaddedBatch``."""

    def __init__(self, packed: PackedRows) -> None:
        """A row on the model's device."""
        self._packed = packed

    @property
    def is_retain_RT1(self) -> Tensor:  # noqa: N802 - named by shape
        """``[1, T, 1]``: whether a token is of a normal row."""
        return self._packed.is_retain[..., None]

    def of_kind(self, kind: int) -> PackedBatch:
        """The rows of one kind packed alone."""
        return PackedBatch(self._packed.of_kind(kind))

    def forward(self, model: nn.Module, plain: PreTrainedModel | PeftModel, *, hidden_states: bool = False) -> Any:
        """Runs a model, which keeps the attention of packed rows from then on; logits are ``[1, U, V]``.

        Raises:
            ModelError: The model's attention would misread the row, or asks for something that can't be packed.
        """
        packed = self._packed
        # Stays so until training ends: activation checkpointing runs layers again in the backward.
        use_packed_attention(plain)
        with packed_forward_pass(plain, packed.paths):
            return model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                packed_paths=packed.paths,
                logits_to_keep=packed.score_places_U,
                use_cache=False,
                **({"output_hidden_states": True} if hidden_states else {}),
            )

    def scores(self, kind: int, outputs: Any, hidden_layers: Sequence[int] = ()) -> ScoredRows:
        """As from the same rows padded."""
        kept, scores = self._packed.kept[kind], outputs.logits[0]
        made = not isinstance(scores, HeadScores)
        rows_N = _take_rows(scores if made else scores.hidden_NH, kept.score_N)
        return ScoredRows(
            scores_NV=rows_N if made else replace(scores, hidden_NH=rows_N),
            targets_N=kept.targets_N,
            row_N=kept.row_N,
            example_M=kept.example_M,
            num_examples=self._packed.num_examples,
            hidden_NLH=_stacked(
                _take_rows(outputs.hidden_states[layer + 1][0], kept.place_N) for layer in hidden_layers
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
