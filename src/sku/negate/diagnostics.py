"""What is left of a change of the weights once they are rounded to another format, tensor by tensor.

Rounding can undo unlearning (arXiv 2410.16454): where the change is smaller than a step of the format, the unlearned
model rounds to what the original rounds to. With Q the rounding, ``applied = Q(theta_u) - Q(theta_o)`` is compared
with ``wanted = theta_u - theta_o``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.config.evaluate import Precision
from sku.negate.matching import ModelSource, match_models
from sku.quantization import FORMATS, Rounding, rounded_layers


def model_survival(
    base: PreTrainedModel, unlearned: PreTrainedModel, formats: Sequence[Precision] = tuple(FORMATS)
) -> dict[str, Any]:
    """Measures each format on each tensor by which two models differ.

    Args:
        base: The original model.
        unlearned: The model whose weights are to be rounded.
        formats: ``int8`` and ``nf4`` round linear layers alone, without the output head.

    Returns:
        Format -> over all its tensors ``entries`` whose change was wanted, the share of them that ``changed`` (in 8
        and 4 bits also where nothing but the scale of their channel or block moved, so that the next says more), and
        ``projection``, ``<applied, wanted> / <wanted, wanted>``: 1 where nothing was lost, 0 where nothing is left;
        ``tensors``, the projection by name; ``not_rounded``, the number of changed tensors that the format leaves as
        they are.

    Raises:
        TaskVectorError: Names, shapes or ties differ, or a weight is quantized.
    """
    original = ModelSource(base)
    weights = original.weights
    after = match_models(original, ModelSource(unlearned), "unlearned model").changes

    def wanted(name: str) -> Tensor:
        return after[name].detach().cpu().float() - weights[name].detach().cpu().float()

    changed = [name for name in weights if bool(wanted(name).any())]
    return _survivals(base, weights, changed, wanted, formats)


def _survivals(
    base: PreTrainedModel,
    weights: dict[str, Tensor],
    changed: Collection[str],
    wanted: Callable[[str], Tensor],
    formats: Sequence[Precision],
) -> dict[str, Any]:
    # GPT-2's layers keep their weight as [I, O].
    turned = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Conv1D)}
    layers = _layer_weights(base, weights)
    found: dict[str, Any] = {}
    for form in formats:
        names = [name for name in changed if not FORMATS[form].layers_only or name in layers]
        sums = {name: _sums(weights[name], wanted(name), FORMATS[form].rounding, name in turned) for name in names}
        together = [sum(values) for values in zip(*sums.values(), strict=True)] or [0, 0, 0.0, 0.0]
        found[form] = {
            "entries": int(together[0]),
            "changed": together[1] / together[0] if together[0] else 1.0,
            "projection": _projection(*together[2:]),
            "tensors": {name: _projection(*values[2:]) for name, values in sums.items()},
            "not_rounded": len(changed) - len(names),
        }
    return found


def _layer_weights(base: PreTrainedModel, weights: dict[str, Tensor]) -> set[str]:
    """Names of the weights that 8-bit and 4-bit formats round."""
    rounded: set[int] = {id(layer.weight) for layer in rounded_layers(base).values()}
    return {name for name, weight in weights.items() if isinstance(weight, nn.Parameter) and id(weight) in rounded}


def _sums(weight: Tensor, wanted: Tensor, rounding: Rounding, turned: bool) -> tuple[int, int, float, float]:
    """Entries wanted, entries changed, ``<applied, wanted>`` and ``<wanted, wanted>``."""
    original = weight.detach().cpu().float()
    if turned:
        original, wanted = original.T.contiguous(), wanted.T.contiguous()
    applied = rounding(original + wanted) - rounding(original)
    asked = wanted != 0
    return (
        int(asked.sum()),
        int((asked & (applied != 0)).sum()),
        float((applied.double() * wanted.double()).sum()),
        float((wanted.double() ** 2).sum()),
    )


def _projection(product: float, square: float) -> float:
    return product / square if square else 1.0
