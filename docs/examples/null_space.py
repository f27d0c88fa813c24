"""Null-space projection: the change is made blind to what normal text puts into a layer.

    sku run my.yaml --set negate.transform=docs/examples/null_space.py

``D' = D (I - U U^T)`` for each linear layer, U the top eigenvectors of ``X^T X`` of its inputs on normal text, as many
as hold a share ``ENERGY`` of the trace. What a layer answers to inputs within U stays as it was at any alpha. Related:
AlphaEdit (https://arxiv.org/abs/2410.02355). The change of other weights (embeddings, norms, a tied head) is dropped:
it would reach normal text undamped.

Shapes: O = outputs of a layer, I = its inputs, R = token positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sku import TaskVector, TransformContext

ENERGY = 0.9
EXAMPLES = 256


def transform(vector: TaskVector, context: TransformContext) -> TaskVector:
    """Projects the difference of every linear layer; those of other weights become 0."""
    squares = input_squares(context, set(vector.deltas))
    deltas = {name: torch.zeros_like(delta) for name, delta in vector.deltas.items()}
    for name, (square_II, transposed) in squares.items():
        energies_I, directions_II = torch.linalg.eigh(square_II)  # From the smallest.
        beyond = energies_I.flip(0).cumsum(0) / energies_I.sum()
        rank = int((beyond < ENERGY).sum()) + 1
        top_IK = directions_II[:, -rank:].float()
        delta_OI = vector.deltas[name].T if transposed else vector.deltas[name]
        projected_OI = delta_OI - (delta_OI @ top_IK) @ top_IK.T
        deltas[name] = projected_OI.T if transposed else projected_OI
    return TaskVector(deltas, vector.tied)


@torch.no_grad()
def input_squares(context: TransformContext, names: set[str]) -> dict[str, tuple[Tensor, bool]]:
    """Weight -> ``X^T X [I, I]``, float64, of its layer's inputs on normal text, and whether it is kept ``[I, O]``."""
    embedding = context.base.get_input_embeddings().weight
    sums: dict[str, tuple[Tensor, bool]] = {}
    handles = []
    for name, layer in context.base.named_modules():
        weight = f"{name}.weight"
        if isinstance(layer, nn.Linear | Conv1D) and weight in names and layer.weight is not embedding:

            def add(module: nn.Module, inputs: tuple[Tensor, ...], weight: str = weight) -> None:
                rows_RI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                product_II = (rows_RI.T @ rows_RI).double().cpu()
                before = sums[weight][0] if weight in sums else 0
                sums[weight] = (before + product_II, isinstance(module, Conv1D))

            handles.append(layer.register_forward_pre_hook(add))
    try:
        for example in context.normal[:EXAMPLES]:
            context.base(input_ids=torch.tensor([example.input_ids], device=embedding.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums
