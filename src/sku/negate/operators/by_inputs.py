"""Operators that look at what goes into each layer: null-space projection, contrast of harmful and normal inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sku.config.check import Count, NotNegative, Positive, Share, validated
from sku.errors import RecipeError
from sku.negate.operators.base import Operated, Operator, OperatorContext, RowMap
from sku.negate.operators.spectra import Spectrum, input_spectra, matrix_map, split_by_inputs
from sku.negate.operators.texts import InputSettings
from sku.negate.task_vector import TaskVector


@validated
class NullSpaceSettings(InputSettings):
    """Null-space projection: the change is made blind to what normal text puts into a layer.

    ``D' = D (I - U U^T)`` for each linear layer, U the top eigenvectors of ``X^T X`` of the layer's inputs on normal
    text, as many as hold a share ``energy`` of its trace. What a layer answers to inputs within U stays as it was at
    any alpha, so alpha can be raised.

    Related, both read as abstracts only: AlphaEdit (https://arxiv.org/abs/2410.02355) projects knowledge edits onto
    the null space of preserved knowledge; SAGE (https://arxiv.org/abs/2606.18309) damps the components of a finished
    unlearning update that lie along the main directions of retained inputs, by a closed form. ``soft`` is our own
    closed form of that kind: ``D' = D (I + s C / c)^-1``, C the mean of ``x x^T``, c its mean eigenvalue, the D' that
    minimises ``|D' - D|^2 + s |D' X^T|^2 / c``.

    Inputs that all prompts share (system prompt, first position) are protected like the text's own, but apart from
    them: each of the two has its own trace, so that the first position, which can hold most of a layer's trace by
    itself, takes no share from the others.

    ``split_by_inputs`` says what becomes of weights that read no such inputs.
    """

    energy: Share = 0.9
    """Share of the trace that the removed directions hold, of the text's own inputs and of the shared ones alike; 1
    removes all that any normal input reaches."""
    rank: Count | None = None
    """Most removed directions a layer of either, in place of ``energy``."""
    soft: Positive | None = None
    """s above, in place of ``energy``: nothing is cut off, each direction is damped by its energy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.soft is not None:
            raise RecipeError("rank and soft are two ways to say how much is removed: set one of them")


def projection(directions_IK: Tensor) -> RowMap:
    """``row - (row U) U^T``, U of orthonormal columns."""
    return lambda rows_RI: rows_RI - (rows_RI @ directions_IK) @ directions_IK.T


def _project(settings: NullSpaceSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    normal = input_spectra(context, "normal", settings)
    shared = input_spectra(context, "normal", settings, "shared")
    known, maps, account = split_by_inputs(vector, normal, settings)

    @cache
    def of_group(group: str) -> tuple[RowMap, int]:
        """Layers that read the same tensor share their map."""
        return _map((normal.of_group[group], shared.of_group[group]), settings)

    maps |= {name: of_group(normal.group_of[name])[0] for name in known}
    account["shared_positions"] = shared.positions
    if known and settings.soft is None:
        ranks = {name: of_group(normal.group_of[name])[1] for name in known}
        shares = [rank / len(known[name].energies_I) for name, rank in ranks.items()]
        account |= {"ranks": ranks, "mean_share_of_directions": sum(shares) / len(shares)}
    return Operated(row_maps=maps, record=account)


def _map(spectra: Sequence[Spectrum], settings: NullSpaceSettings) -> tuple[RowMap, int]:
    """What becomes of the rows of a layer, and how many directions are cut off."""
    if settings.soft is not None:
        return _damping(spectra, settings.soft), 0
    directions = _span([spectrum.top(_rank(spectrum, settings)) for spectrum in spectra])
    return projection(directions), directions.shape[1]


def _rank(spectrum: Spectrum, settings: NullSpaceSettings) -> int:
    return spectrum.rank(settings.energy) if settings.rank is None else min(settings.rank, spectrum.rank(1.0))


def _span(parts: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of what the columns of all parts reach together; a single part is one already."""
    filled = [part for part in parts if part.shape[1]]
    if len(filled) < 2:
        return filled[0] if filled else parts[0]
    basis, lengths, _ = torch.linalg.svd(torch.cat(filled, dim=1).double(), full_matrices=False)
    # Columns are of length 1: what is this short is a direction that both parts hold.
    directions: Tensor = basis[:, lengths > 1e-5].float().contiguous()
    return directions


def _damping(spectra: Sequence[Spectrum], strength: float) -> RowMap:
    damped = [spectrum for spectrum in spectra if spectrum.energies_I.any()]
    if not damped:
        return lambda rows: rows
    total_II = torch.eye(len(damped[0].energies_I), dtype=torch.float64)
    for spectrum in damped:
        total_II += strength / spectrum.energies_I.double().mean() * spectrum.matrix()
    return matrix_map(torch.linalg.inv(total_II))


NULL_SPACE = Operator(
    name="null_space",
    title="Null-space projection",
    paper_url="https://arxiv.org/abs/2410.02355",
    settings=NullSpaceSettings,
    apply=_project,
    needs=("normal",),
)


@validated
class ContrastSettings(InputSettings):
    """Contrast of inputs: the change keeps what it does to harmful inputs and loses what it does to normal ones.

    ``D' = D H (H + s N + e I)^-1`` for each linear layer, with H and N the means of ``x x^T`` of the layer's inputs on
    harmful and on normal text, each divided by its trace. It is the D' that minimises

        ``|(D' - D) H^(1/2)|^2 + s |D' N^(1/2)|^2 + e |D'|^2``,

    a regularised least-squares filter (ridge regression of D's outputs on harmful inputs, with normal inputs as
    noise). The filter is no contraction: it can turn a direction into a longer one, so that the norm of the vector may
    rise (``norm_before`` and ``norm_after`` in the record), and one alpha means another step with it than without.

    What all prompts share (system prompt, first position) is in neither matrix (``spectra.py``): it would be the
    largest part of both, and the filter would weigh it against itself. As H doesn't hold it, D' answers it with almost
    nothing.

    Where ``null_space`` removes the main directions of normal text even if harmful text shares them, this one weighs
    both.

    The formula is our own; the nearest published work is SAGE (https://arxiv.org/abs/2606.18309, abstract read), which
    also anchors a closed form to the source update and looks at retained inputs.
    """

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


def _contrast(settings: ContrastSettings, vector: TaskVector, context: OperatorContext) -> Operated:
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
    apply=_contrast,
    needs=("normal", "harmful"),
)
