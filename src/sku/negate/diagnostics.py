"""Where a task vector points: which layers, how many directions, and whether mostly at normal behaviour.

For the manifest (``negation.diagnostics``):

- ``norm``, ``relative_norm``: of the whole vector, and in units of the changed weights' own norm.
- ``layers``, ``modules``: norm by number of decoder layer and by kind of module; ``others`` for weights of no layer.
- ``effective_rank``: by weight, ``exp(entropy of p)`` with p the singular values divided by their sum (Roy and
  Vetterli, 2007). ``without_rank`` counts the changed tensors that have none or are too large.
- ``normal_share``: share of the squared length of linear layers' differences that lies in the top eigenvectors of
  their inputs on normal text (90 % of the trace), and ``normal_share_of_directions``, what a random difference has.
  ``normal_rank``: their number by weight. Left out for models with inputs wider than 4,096.
- ``normal_cosine``: cosine with one step of gradient descent on normal answers at the original weights, ``-g``, over
  the weights that the vector changes. Positive: what is subtracted is, to first order, what makes the model better at
  normal text.
- ``warning``: a sentence where the vector mostly points at normal behaviour, else null.

And what is left of a change of the weights once they are rounded to another format, tensor by tensor. Rounding can
undo unlearning (arXiv 2410.16454): where the change is smaller than a step of the format, the unlearned model rounds
to what the original rounds to. With Q the rounding, ``applied = Q(theta_o - alpha tau) - Q(theta_o)`` is compared with
``wanted = -alpha tau``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.config.evaluate import Precision
from sku.negate.adapters import AdapterVector
from sku.negate.arithmetic import LowRank
from sku.negate.matching import check_same_names, check_same_shape, unique_weights
from sku.negate.operators.base import OperatorContext, group_of, linear_weights, turned_weights
from sku.negate.operators.by_inputs import InputSpectra, input_spectra
from sku.negate.operators.texts import InputSettings, drawn, mean_gradient
from sku.negate.task_vector import TaskVector
from sku.quantization import FORMATS, Rounding, rounded_layers

ENERGY = 0.9
"""Share of the trace that makes the subspace of normal inputs."""
EXAMPLES = 256
"""Normal examples whose inputs are looked at, at most: as many as ``null_space`` takes, which then shares them."""
GRADIENT_EXAMPLES = 64
"""Normal examples of the gradient, at most."""
LARGEST_INPUT = 4096
"""Widest layer input whose eigenvectors are computed for diagnostics alone; beyond it takes hours on a CPU."""
LARGEST_SIDE = 2048
"""Smaller side of the largest dense difference whose singular values are computed; adapters have no limit."""
MOSTLY = 0.5
"""Share or cosine above which a vector is said to point mostly at normal behaviour."""


def diagnose(vector: TaskVector, context: OperatorContext, adapter: AdapterVector | None = None) -> dict[str, Any]:
    """Measures a task vector.

    Args:
        vector: What is subtracted, after all operators.
        context: The original model; what needs normal examples is left out where it has none.
        adapter: The same vector in factors, from which its rank is cheap.

    Returns:
        Plain data as above.

    Raises:
        TaskVectorError: Vectors don't fit, or the model's inputs or gradients are not finite.
    """
    weights = unique_weights(context.base)[0]
    own = math.sqrt(sum(float(weights[name].detach().float().norm()) ** 2 for name in vector.deltas))
    ranks = _effective_ranks(vector, adapter)
    found: dict[str, Any] = {
        "norm": vector.norm(),
        "relative_norm": vector.norm() / own if own else None,
        "layers": _norms_by_group(vector, "layer"),
        "modules": _norms_by_group(vector, "module"),
        "effective_rank": ranks,
        "without_rank": len(vector.deltas) - len(ranks),
    }
    if context.normal and _widest_input(context) <= LARGEST_INPUT:
        spectra = input_spectra(context, "normal", InputSettings(examples=EXAMPLES))
        found |= normal_share(vector, spectra, turned_weights(context.base))
    if context.normal:
        examples = drawn(context.normal, GRADIENT_EXAMPLES, context.seed)
        gradient = mean_gradient(context.base, list(vector.deltas), examples, context.batch_size)
        found["normal_cosine"] = cosine(
            vector, TaskVector({name: -part for name, part in gradient.items()}, vector.tied)
        )
        found["normal_vector"] = "negative gradient on normal answers"
    return {**found, "warning": _warning(found)}


def cosine(first: TaskVector, second: TaskVector) -> float:
    """Cosine of two vectors of the same weights; 0 where one of them is 0.

    Raises:
        TaskVectorError: They change different weights.
    """
    check_same_names(first.deltas, second.deltas, "the first task vector", "the second")
    product = sum(float((delta.double() * second.deltas[name].double()).sum()) for name, delta in first.deltas.items())
    lengths = first.norm() * second.norm()
    return product / lengths if lengths else 0.0


def effective_rank(matrix: Tensor) -> float:
    """``exp(-sum p log p)`` with p the singular values divided by their sum: from 1 to the smaller side.

    Args:
        matrix: Two-dimensional; 0 gives 0.

    Returns:
        The effective rank.
    """
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = small.double() @ small.double().T
    return _entropy_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def effective_rank_of_factors(change: LowRank[Tensor]) -> float:
    """The same of ``B A``, from the two factors alone."""
    _, upper = torch.linalg.qr(change.upper_Or.double())
    _, lower = torch.linalg.qr(change.lower_rI.double().T)
    return _entropy_rank(torch.linalg.svdvals(upper @ lower.T))


def normal_share(vector: TaskVector, spectra: InputSpectra, turned: set[str]) -> dict[str, Any]:
    """How much of a vector lies in the main directions of normal inputs.

    Args:
        vector: The task vector.
        spectra: Of the inputs of normal text.
        turned: Weights that are kept as ``[I, O]``.

    Returns:
        ``normal_share``, ``normal_share_of_directions`` and ``normal_rank``, as above; empty without linear layers.
    """
    inside = total = expected = 0.0
    ranks: dict[str, int] = {}
    for name, delta in vector.deltas.items():
        spectrum = spectra.of(name)
        if spectrum is None:
            continue
        delta_OI = delta.T if name in turned else delta
        ranks[name] = spectrum.rank(ENERGY)
        square = float(delta_OI.double().square().sum())
        inside += float((delta_OI @ spectrum.top(ranks[name])).double().square().sum())
        expected += square * ranks[name] / delta_OI.shape[1]
        total += square
    if not total:
        return {}
    return {
        "normal_share": inside / total,
        "normal_share_of_directions": expected / total,
        "normal_rank": ranks,
    }


def _widest_input(context: OperatorContext) -> int:
    return max(
        (
            module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            for module in linear_weights(context.base).values()
        ),
        default=0,
    )


def _entropy_rank(values: Tensor) -> float:
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def _effective_ranks(vector: TaskVector, adapter: AdapterVector | None) -> dict[str, float]:
    if adapter is not None:
        return {name: effective_rank_of_factors(change) for name, change in adapter.factors.items()}
    return {
        name: effective_rank(delta)
        for name, delta in vector.deltas.items()
        if delta.dim() == 2 and min(delta.shape) <= LARGEST_SIDE
    }


def _norms_by_group(vector: TaskVector, per: Any) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    for name, norm in vector.norms().items():
        squares[group_of(name, per)] += norm**2
    return {group: math.sqrt(square) for group, square in squares.items()}


def _warning(found: Mapping[str, Any]) -> str | None:
    share, direction = found.get("normal_share", 0.0), found.get("normal_cosine", 0.0)
    if share > MOSTLY:
        return (
            f"{share:.0%} of the vector's energy lies in the main directions of normal inputs: it mostly points at "
            "normal behaviour, and subtracting it will cost utility; the operator null_space takes that part out"
        )
    if direction > MOSTLY:
        return (
            f"the vector's cosine with normal training is {direction:.2f}: it mostly points at normal behaviour, and "
            "subtracting it will cost utility. Train stage 1 on harmful pairs that differ more from normal ones"
        )
    return None


def delta_survival(
    base: PreTrainedModel, vector: TaskVector, alpha: float, formats: Sequence[Precision] = tuple(FORMATS)
) -> dict[str, Any]:
    """Measures each format on each tensor that a task vector changes. Nothing is written into the models.

    Args:
        base: The original model.
        vector: What is subtracted.
        alpha: How much of it; not 0.
        formats: ``int8`` and ``nf4`` round linear layers alone, without the output head.

    Returns:
        Format -> over all its tensors ``entries`` whose change was wanted, the share of them that ``changed`` (in 8
        and 4 bits also where nothing but the scale of their channel or block moved, so that the next says more), and
        ``projection``, ``<applied, wanted> / <wanted, wanted>``: 1 where nothing was lost, 0 where nothing is left;
        ``tensors``, the projection by name; ``not_rounded``, the number of changed tensors that the format leaves as
        they are.

    Raises:
        TaskVectorError: The vector doesn't fit the base.
    """
    weights = unique_weights(base)[0]

    def wanted(name: str) -> Tensor:
        check_same_shape(name, weights[name], vector.deltas[name])
        return -alpha * vector.deltas[name]

    return _survivals(base, weights, vector.deltas, wanted, formats)


def _survivals(
    base: PreTrainedModel,
    weights: dict[str, Tensor],
    changed: Collection[str],
    wanted: Callable[[str], Tensor],
    formats: Sequence[Precision],
) -> dict[str, Any]:
    turned, layers = turned_weights(base), _layer_weights(base, weights)
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
