"""One forward pass of a packed row, and what it says of the rows of each kind.

Shapes: T = tokens of the packed row, U = places whose scores are needed, N = kept positions of the rows of one kind,
V = vocabulary, H = width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sku.data.packing import PackedRows
from sku.head.scores import HeadScores, Scores
from sku.training.objective import ScoredRows
from sku.training.packed_attention import packed_forward_pass
from sku.training.padded_step import stacked


def forward_packed(
    model: nn.Module, plain: PreTrainedModel | PeftModel, packed: PackedRows, *, hidden_states: bool = False
) -> Any:
    """Runs a model on a packed row.

    Args:
        model: What is called, possibly wrapped for distributed training.
        plain: The same without that wrapping.
        packed: On the model's device.
        hidden_states: Return the output of every layer too.

    Returns:
        The model's outputs, with logits ``[1, U, V]``.

    Raises:
        ModelError: The model's attention would misread the row, or asks for something that can't be packed.
    """
    options = {"output_hidden_states": True} if hidden_states else {}
    with packed_forward_pass(plain, packed.paths):
        return model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            packed_paths=packed.paths,
            logits_to_keep=packed.score_places_U,
            use_cache=False,
            **options,
        )


def packed_scores(packed: PackedRows, kind: int, outputs: Any, hidden_layers: Sequence[int] = ()) -> ScoredRows:
    """The part of a packed row's outputs that belongs to the rows of one kind.

    Args:
        packed: The row.
        kind: Which rows.
        outputs: Of ``forward_packed`` on it.
        hidden_layers: Decoder layers, counted from 0, whose outputs are given too.

    Returns:
        As from the same rows padded: one pair of scores and target for each kept position of each row.
    """
    kept = packed.kept[kind]
    return ScoredRows(
        scores_NV=_take_scores(outputs.logits[0], kept.score_N),
        targets_N=kept.targets_N,
        row_N=kept.row_N,
        example_M=kept.example_M,
        num_examples=packed.num_examples,
        hidden_NLH=stacked(_take_rows(outputs.hidden_states[layer + 1][0], kept.place_N) for layer in hidden_layers),
    )


def _take_scores(scores_UV: Scores, index_N: Tensor) -> Scores:
    if isinstance(scores_UV, HeadScores):
        return replace(scores_UV, hidden_NH=_take_rows(scores_UV.hidden_NH, index_N))
    return _take_rows(scores_UV, index_N)


def _take_rows(values: Tensor, index_N: Tensor) -> Tensor:
    """Rows, some of them more than once, with a backward that adds in a fixed order."""
    # On a CPU that is the backward of index_select, on a GPU that of an index.
    return values.index_select(0, index_N) if values.device.type == "cpu" else values[index_N]
