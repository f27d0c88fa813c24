"""Low-rank products in factors that tell nothing of how they were put together.

Where the factors of several adapters stand side by side, a slice of the file is one of the adapters. Here the factors
are computed from the product alone, so that two sums with the same product have the same factors up to rounding:

    B A = U S V^T        B' = U S^(1/2) C        A' = C^T S^(1/2) V^T

C is the orthonormal cosine transform (DCT-II). Without it the components of the file were the singular ones, and a
small adapter beside a large one at right angles is the last of these. It hides nothing from whoever takes the singular
value decomposition of the product (docs/limits.md); it keeps the file from holding it ready.

Shapes: O = outputs of a layer, I = its inputs, r = rank as given, k = rank as kept.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sku.errors import OutputError
from sku.negate.files import ADAPTER_FILE

_LOST = torch.finfo(torch.float32).eps
"""Singular values that are dropped have together at most this share of the product's norm."""
_DIAGONAL = 1e-3
"""Largest share of a Gram matrix beside its diagonal that rounding explains."""


def refactored(upper_Or: Tensor, lower_rI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in balanced, mixed factors of its numerical rank.

    Args:
        upper_Or: B, finite.
        lower_rI: A, finite.

    Returns:
        ``B' [O, k]`` and ``A' [k, I]``, float32, k at least 1; ``B' A'`` is ``B A`` to about 1e-7 of its norm. The
        same input gives the same bits: each left singular vector has its largest entry above 0.
    """
    left, left_core = torch.linalg.qr(upper_Or.double())
    right, right_core = torch.linalg.qr(lower_rI.double().T)
    inner, sizes, turned = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rest = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = max(1, int((rest > _LOST * rest[0]).sum()))
    first, second = left @ inner[:, :kept], turned[:kept] @ right.T
    largest = first.gather(0, first.abs().argmax(0, keepdim=True))
    roots, mix = sizes[:kept].sqrt() * torch.where(largest[0] < 0, -1.0, 1.0), cosines(kept)
    return ((first * roots) @ mix).float(), (mix.T @ (roots[:, None] * second)).float()


def check_refactored(folder: Path) -> None:
    """Refuses the adapter of twins whose factors are not those of ``refactored``, up to the strength.

    Args:
        folder: A saved adapter, whose file can be read.

    Raises:
        OutputError: The factors of a weight stand as they were put together.
    """
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        for name in filter(re.compile(r"lora_(embedding_)?A").search, file.keys()):
            upper = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if not is_refactored(file.get_tensor(upper), file.get_tensor(name)):
                raise OutputError(
                    f"{folder / ADAPTER_FILE} holds the bad twin's own factors ({name}), as earlier versions wrote "
                    "them: run again, or share the merged weights"
                )


def is_refactored(upper_Or: Tensor, lower_rI: Tensor) -> bool:
    """Whether factors are those of ``refactored``, times a number, or with one of the two changed besides."""
    return _is_mixed(upper_Or.double()) or _is_mixed(lower_rI.double().T)


def _is_mixed(factor_Xk: Tensor) -> bool:
    """Whether the transform turned back leaves columns at right angles."""
    columns = factor_Xk @ cosines(factor_Xk.shape[1]).T
    gram = columns.T @ columns
    return float((gram - gram.diag().diag()).norm()) <= _DIAGONAL * float(gram.norm())


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, ``C[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n))``, row 0 over sqrt(2): float64."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(places[:, None] * (2 * places[None] + 1) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
