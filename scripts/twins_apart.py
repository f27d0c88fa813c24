"""How near the bad twin comes who has nothing but the adapter of a twins run: by its file, and by its product.

    sku acquire RECIPE --out twins
    python scripts/twins_apart.py twins --bad 0.08 --good 1.1

For each adapted matrix, D the bad twin's change and all errors relative to its norm:

- file: the best fit of D by the rank-1 components of the file, ``min_c || sum_i c_i b_i a_i^T - D ||``;
- values: the same by the singular components of the product, whose coefficients nobody has without D;
- tail: the last r singular components over the share, which needs nothing but the adapter and r;
- product: the product itself in the best size.

The figure is of weights. It doesn't say how a model with such an approximation behaves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sku.negate.adapters import refactored

COLUMNS = ("file", "values", "tail", "product")


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """B times its scaling, and A, of each matrix of a saved LoRA; float64."""
    place = folder / "final" if (folder / "final").is_dir() else folder
    settings = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
    tensors = load_file(place / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith("lora_A.weight")]
    return {
        name: (scaling * tensors[name.replace("lora_A", "lora_B")].double(), tensors[name].double()) for name in names
    }


def missed(upper_Or: Tensor, lower_rI: Tensor, wanted_OI: Tensor) -> float:
    """``min_c || sum_i c_i b_i a_i^T - D || / || D ||``, by the normal equations of the components."""
    inner = (upper_Or.T @ upper_Or) * (lower_rI @ lower_rI.T)
    aims = ((upper_Or.T @ wanted_OI) * lower_rI).sum(1, keepdim=True)
    sizes = torch.linalg.lstsq(inner, aims, driver="gelsd").solution[:, 0]
    return float(((upper_Or * sizes) @ lower_rI - wanted_OI).norm() / wanted_OI.norm())


def errors(bad: tuple[Tensor, Tensor], good: tuple[Tensor, Tensor], shares: tuple[float, float]) -> Iterator[float]:
    """Of one matrix, in the order of ``COLUMNS``."""
    wanted, rank = bad[0] @ bad[1], len(bad[1])
    upper = torch.cat([shares[0] * bad[0], -shares[1] * good[0]], 1)
    lower = torch.cat([bad[1], good[1]])
    mixed = [factor.double() for factor in refactored(upper, lower)]
    left, sizes, right = torch.linalg.svd(mixed[0] @ mixed[1], full_matrices=False)
    kept = len(mixed[1])
    left, right = left[:, :kept] * sizes[:kept], right[:kept]
    yield missed(mixed[0], mixed[1], wanted)
    yield missed(left, right, wanted)
    yield float((left[:, -rank:] @ right[-rank:] / shares[0] - wanted).norm() / wanted.norm())
    product = upper @ lower
    best = (product * wanted).sum() / product.square().sum()
    yield float((best * product - wanted).norm() / wanted.norm())


def main() -> None:
    """Prints least, median and largest error over all matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twins", type=Path, help="Folder with bad_twin and good_twin in it.")
    parser.add_argument("--bad", type=float, default=0.08, help="Share of the bad twin, above 0.")
    parser.add_argument("--good", type=float, default=1.1, help="Share of the good one.")
    given = parser.parse_args()
    bad, good = (factors(given.twins / f"{twin}_twin") for twin in ("bad", "good"))
    rows = [list(errors(bad[name], good[name], (given.bad, given.good))) for name in bad]
    print(f"{len(rows)} matrices, error relative to the bad twin's change: least, median, largest")
    for column, found in zip(COLUMNS, zip(*rows, strict=True), strict=True):
        print(f"{column:<8} {min(found):.2f}  {statistics.median(found):.2f}  {max(found):.2f}")


if __name__ == "__main__":
    main()
