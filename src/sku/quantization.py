"""Rounding weights to what 8-bit and 4-bit formats can hold: tensors in, tensors out.

Both are simulated: the rounded values come back in float32, so that they run everywhere.

Shapes: O = outputs of a layer, I = its inputs, B = blocks of ``NF4_BLOCK`` weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NF4_BLOCK = 64
"""Weights that share one scale."""
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4, as listed in appendix E of arXiv 2305.14314: quantiles of the normal distribution, 0 exact."""
_INT8_LARGEST = 127


def int8_rounded(weight_OI: Tensor) -> Tensor:
    """Symmetric 8-bit integers with one scale for each output channel, rounded to nearest.

    ``scale_o = max_i |w_oi| / 127``, ``w' = scale_o * round(w / scale_o)``

    Args:
        weight_OI: ``[O, I]`` float32.

    Returns:
        ``[O, I]`` float32; a channel of zeros stays one.

    Source: vector-wise quantization of arXiv 2208.07339 (LLM.int8) on the weights alone, without its outlier columns.
    """
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / _INT8_LARGEST
    steps_OI = torch.round(weight_OI / _nonzero(scale_O1)).clamp(-_INT8_LARGEST, _INT8_LARGEST)
    return steps_OI * scale_O1


def nf4_rounded(weight_OI: Tensor) -> Tensor:
    """4-bit NormalFloat: blocks of 64 weights, row by row, each scaled by its largest magnitude.

    ``w' = absmax_b * nearest(NF4_CODE, w / absmax_b)``

    Args:
        weight_OI: ``[O, I]`` float32. The last block may be short.

    Returns:
        ``[O, I]`` float32; a block of zeros stays one.

    Source: arXiv 2305.14314 (QLoRA), sections 2 and 3, without double quantization of the scales.
    """
    flat = weight_OI.reshape(-1)
    blocks_B64 = functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    absmax_B1 = blocks_B64.abs().amax(dim=1, keepdim=True)
    code = torch.tensor(NF4_CODE, device=flat.device)
    borders = (code[1:] + code[:-1]) / 2
    nearest_B64 = code[torch.bucketize(blocks_B64 / _nonzero(absmax_B1), borders)]
    return (nearest_B64 * absmax_B1).reshape(-1)[: flat.numel()].reshape(weight_OI.shape)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
