"""Contrast of inputs: the change keeps what it does to harmful inputs and loses what it does to normal ones.

``D' = D H (H + s N + e I)^-1`` for each linear layer, with H and N the means of ``x x^T`` of the layer's inputs on
harmful and on normal text, each divided by its trace. It is the D' that minimises

    ``|(D' - D) H^(1/2)|^2 + s |D' N^(1/2)|^2 + e |D'|^2``,

a regularised least-squares filter (ridge regression of D's outputs on harmful inputs, with normal inputs as noise).
The filter is no contraction: it can turn a direction into a longer one, so that the norm of the vector may rise
(``norm_before`` and ``norm_after`` in the record), and one alpha means another step with it than without.

What all prompts share (system prompt, first position) is in neither matrix (``spectra.py``): it would be the largest
part of both, and the filter would weigh it against itself. As H doesn't hold it, D' answers it with almost nothing.

Where ``null_space`` removes the main directions of normal text even if harmful text shares them, this one weighs both.

The formula is our own; the nearest published work is SAGE (https://arxiv.org/abs/2606.18309, abstract read), which
also anchors a closed form to the source update and looks at retained inputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sku.config.check import NotNegative, Positive, validated
from sku.negate.operators.base import Operated, Operator, OperatorContext, RowMap
from sku.negate.operators.spectra import Spectrum, input_spectra, matrix_map, split_by_inputs
from sku.negate.operators.texts import InputSettings
from sku.negate.task_vector import TaskVector


@validated
class ContrastSettings(InputSettings):
    """How normal inputs weigh against harmful ones."""

    strength: NotNegative = 4.0
    """s above: how much an effect on normal inputs costs, in units of the effect on harmful ones."""
    ridge: Positive = 1e-3
    """e above, in units of the mean eigenvalue of H: how much directions that neither text reaches are damped."""


def filter_matrix(harmful_II: Tensor, normal_II: Tensor, strength: float, ridge: float) -> Tensor:
    """``H (H + s N + e I)^-1`` of two matrices of trace 1.

    Args:
        harmful_II: H, float64, positive semidefinite.
        normal_II: N, likewise.
        strength: s.
        ridge: e in units of the mean eigenvalue of H.

    Returns:
        ``[I, I]`` float64.
    """
    inputs = len(harmful_II)
    identity = torch.eye(inputs, dtype=harmful_II.dtype)
    total = harmful_II + strength * normal_II + ridge / inputs * identity
    # (total)^-1 H is the transpose of what is wanted, as all three matrices are symmetric.
    solved: Tensor = torch.linalg.solve(total, harmful_II)
    return solved.T


def _unit_trace(spectrum: Spectrum) -> Tensor:
    return spectrum.matrix() / float(spectrum.energies_I.double().sum()) if spectrum.rank(1.0) else spectrum.matrix()


def _apply(settings: ContrastSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    normal = input_spectra(context, "normal", settings)
    harmful = input_spectra(context, "harmful", settings)
    known, maps, account = split_by_inputs(vector, normal, settings)

    @cache
    def of_group(group: str) -> RowMap:
        """Layers that read the same tensor share their map."""
        harmful_II, normal_II = _unit_trace(harmful.of_group[group]), _unit_trace(normal.of_group[group])
        return matrix_map(filter_matrix(harmful_II, normal_II, settings.strength, settings.ridge))

    maps |= {name: of_group(normal.group_of[name]) for name in known}
    return Operated(row_maps=maps, record={**account, "harmful_positions": harmful.positions})


CONTRAST = Operator(
    name="contrast",
    title="Contrast of inputs",
    paper_url="https://arxiv.org/abs/2606.18309",
    settings=ContrastSettings,
    apply=_apply,
    needs=("normal", "harmful"),
)
