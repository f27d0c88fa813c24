"""One forward pass of a padded batch, and what it says of the rows of each kind.

Shapes: R = rows, T = tokens, N = kept positions (whose next token counts) of the rows of one kind, M = those rows,
K = kept positions of all rows, V = vocabulary, H = width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sku.data.joint import RETAIN, RowPlan
from sku.losses import IGNORE_INDEX
from sku.training.objective import ScoredRows


def kept_positions(inputs: dict[str, Tensor], plan: RowPlan) -> Tensor:
    """Where the next token is learned or compared.

    Args:
        inputs: A batch of ``JointCollator``.
        plan: Says which tokens of normal rows count.

    Returns:
        ``[R, T]``, bool.
    """
    following = inputs["labels"][:, 1:] != IGNORE_INDEX
    if plan.retain_tokens == "all":
        is_retain = (inputs["row_kind"] == RETAIN)[:, None]
        following = following | (is_retain & (inputs["attention_mask"][:, 1:] == 1))
    return nn.functional.pad(following, (0, 1), value=False)


def rows_of_kind(inputs: dict[str, Tensor], kept_RT: Tensor, kind: int) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of one kind of a padded batch, cut where the longest of them ends.

    Args:
        inputs: A batch of ``JointCollator``.
        kept_RT: Its kept positions.
        kind: Which rows.

    Returns:
        These rows as a batch of their own, and their kept positions.
    """
    rows_R = inputs["row_kind"] == kind
    kept_RT = kept_RT[rows_R]
    longest = int(inputs["attention_mask"][rows_R].sum(1).max())
    own = {
        **inputs,
        "input_ids": inputs["input_ids"][rows_R][:, :longest],
        "attention_mask": inputs["attention_mask"][rows_R][:, :longest],
        "row_example": inputs["row_example"][rows_R],
        "row_kind": inputs["row_kind"][rows_R],
    }
    return own, kept_RT[:, :longest]


def forward_padded(
    model: nn.Module, inputs: dict[str, Tensor], kept_RT: Tensor, *, hidden_states: bool = False
) -> Any:
    """Runs a model on a padded batch.

    Args:
        model: What is called, possibly wrapped for distributed training.
        inputs: The batch, on the model's device.
        kept_RT: Its kept positions.
        hidden_states: Return the output of every layer too, ``[R, T, H]`` each.

    Returns:
        The model's outputs, with logits ``[K, V]``.
    """
    options = {"output_hidden_states": True} if hidden_states else {}
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_to_keep=kept_RT,
        use_cache=False,
        **options,
    )


def padded_scores(
    inputs: dict[str, Tensor],
    kept_RT: Tensor,
    kind: int,
    outputs: Any,
    hidden_layers: Sequence[int] = (),
) -> ScoredRows:
    """The part of the model's outputs that belongs to the rows of one kind.

    Args:
        inputs: The batch, or those of its rows that the model was run on.
        kept_RT: Kept positions of the same rows.
        kind: Which rows.
        outputs: Of ``forward_padded`` on them.
        hidden_layers: Decoder layers, counted from 0, whose outputs are given too.

    Returns:
        Scores, targets and where they belong.
    """
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
        hidden_NLH=stacked(outputs.hidden_states[layer + 1][row_N, position_N] for layer in hidden_layers),
    )


def stacked(hidden: Iterable[Tensor]) -> Tensor | None:
    """Outputs of layers side by side.

    Args:
        hidden: ``[N, H]`` of each layer, from ``hidden_states``, whose first entry holds the embeddings.

    Returns:
        ``[N, L, H]``, None where no layer is read.
    """
    layers = list(hidden)
    return torch.stack(layers, 1) if layers else None
