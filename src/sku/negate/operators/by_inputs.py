"""What goes into each linear layer on given text, and the operators that look at it: null-space projection, contrast.

Measured are the eigenvectors of ``X^T X``, streamed batch by batch.

Which positions count, ``texts.py`` says. Embeddings, norms, biases and a tied output head read no input that a
covariance describes: operators that look at inputs drop their change unless told otherwise, since it reaches normal
text undamped. LoRA on linear layers has none of them.

Layers that read the same tensor (query, key and value; gate and up) share one matrix. Products are taken in float32
and summed in float64; what is kept, in memory and on disk alike, is float32, so that a cached spectrum equals a fresh
one bit for bit.

Shapes: R = token positions, I = inputs of a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sku.config.check import Count, NotNegative, Positive, Share, validated
from sku.data.batches import PaddedRows
from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.models import embedding_weight
from sku.negate.matching import unique_weights
from sku.negate.operators.base import Operated, Operator, OperatorContext, RowMap, linear_weights
from sku.negate.operators.texts import (
    InputSettings,
    Part,
    SharedTokens,
    batch_of,
    batches,
    counted_positions,
    device_of,
    drawn,
    shared_tokens,
)
from sku.negate.task_vector import TaskVector
from sku.storage import new_folder

Text = Literal["normal", "harmful"]
_FILE = "spectra.safetensors"
_FORMAT = "sku-input-spectra-2"
"""Raised whenever the same text could give another spectrum, so that older files are not taken for it."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Of the inputs of one layer."""

    energies_I: Tensor
    """Eigenvalues of the mean of ``x x^T`` over positions, from the largest; exact zeros beyond the numerical rank."""
    directions_II: Tensor
    """Eigenvectors in columns, in that order."""

    def rank(self, energy: float) -> int:
        """The smallest number of directions that hold a share of the trace.

        Args:
            energy: 0 to 1; 1 takes all that any input reaches.

        Returns:
            0 for a layer without input.
        """
        totals_I = self.energies_I.double().cumsum(0)
        nonzero = int((self.energies_I > 0).sum())
        if not nonzero:
            return 0
        reached = int((totals_I < energy * totals_I[-1]).sum()) + 1
        return nonzero if energy >= 1 else min(reached, nonzero)

    def top(self, rank: int) -> Tensor:
        """``[I, rank]``, the directions of the largest energies."""
        return self.directions_II[:, :rank].contiguous()

    def matrix(self) -> Tensor:
        """``[I, I]`` float64, the mean of ``x x^T``."""
        directions = self.directions_II.double()
        return (directions * self.energies_I.double()) @ directions.T


@dataclass(frozen=True, kw_only=True)
class InputSpectra:
    """Of all linear layers of a model."""

    of_group: Mapping[str, Spectrum]
    """First weight of each group of layers that read the same tensor -> its spectrum."""
    group_of: Mapping[str, str]
    """Weight name -> first weight of its group. Layers whose rows are not the text's positions (experts, which see
    some of them) or that are never called are not in it."""
    positions: int
    """Token positions that were counted, of all examples together."""

    def of(self, weight: str) -> Spectrum | None:
        """The spectrum of a weight's inputs; None where there is none."""
        group = self.group_of.get(weight)
        return None if group is None else self.of_group[group]


def matrix_map(matrix_II: Tensor) -> RowMap:
    """``row M``, computed in float32."""
    matrix_II = matrix_II.float()
    return lambda rows_RI: rows_RI @ matrix_II


def split_by_inputs(
    vector: TaskVector, spectra: InputSpectra, settings: InputSettings
) -> tuple[dict[str, Spectrum], dict[str, RowMap], dict[str, Any]]:
    """The vector's weights whose inputs are known, and what becomes of the others.

    Args:
        vector: The task vector.
        spectra: Of the inputs.
        settings: Says what becomes of the others.

    Returns:
        Weight name -> spectrum; the maps of the other weights; the account of both.
    """
    known = {name: spectrum for name in vector.deltas if (spectrum := spectra.of(name)) is not None}
    others = [name for name in vector.deltas if name not in known]
    dropped = settings.other_weights == "drop" and bool(others)
    account = {
        "layers": len(known),
        "other_weights": len(others),
        "other_weights_are": "dropped" if dropped else "kept",
        "positions": spectra.positions,
    }
    return known, dict.fromkeys(others, torch.zeros_like) if dropped else {}, account


def input_spectra(context: OperatorContext, text: Text, settings: InputSettings, part: Part = "own") -> InputSpectra:
    """Measures, or finds again, what goes into the linear layers.

    Args:
        context: Model, texts, cache.
        text: Which examples.
        settings: Which positions, and how inputs count.
        part: Which of these positions: the text's own, or those of ``shared_tokens``. Of those that decide all are the
            text's own, and what prompts begin with is shared.

    Returns:
        The spectra.

    Raises:
        TaskVectorError: An input is not finite, or a cached file is damaged.
        OutputError: The cache can't be written.
    """
    chosen = drawn(getattr(context, text), settings.examples, context.seed)
    shared = shared_tokens([*context.harmful, *context.normal])
    key = _key(context, chosen, settings, shared, part)
    if key not in context.memory:
        folder = None if context.cache is None else context.cache / f"spectra-{key[:32]}"
        if folder is not None and folder.exists():
            context.memory[key] = _load(folder)
        else:
            context.memory[key] = _measure(context, chosen, settings, shared, part)
            if folder is not None:
                _save(context.memory[key], folder)
    spectra = context.memory[key]
    assert isinstance(spectra, InputSpectra)
    return spectra


def input_groups(model: PreTrainedModel, batch: PaddedRows) -> dict[str, str]:
    """Which linear layers read the same tensor, found by calling the model once.

    Args:
        model: In evaluation mode.
        batch: Any text.

    Returns:
        Weight name -> first weight of its group, for layers that see one row a position.
    """
    first: dict[int, str] = {}
    held: list[Tensor] = []  # While a tensor lives, no other has its identity.
    groups: dict[str, str] = {}

    def look(name: str, inputs_I: Tensor) -> None:
        if inputs_I.numel() // inputs_I.shape[-1] == batch.attention_mask.numel():
            held.append(inputs_I)
            groups.setdefault(name, first.setdefault(id(inputs_I), name))

    with _hooked(linear_weights(model), look):
        _run(model, batch)
    return groups


def _measure(
    context: OperatorContext,
    examples: Sequence[TokenizedExample],
    settings: InputSettings,
    shared: SharedTokens,
    part: Part,
) -> InputSpectra:
    model, device = context.base, device_of(context.base)
    # Two rows, so that a layer that sees some rows only is told from one that sees all.
    groups = input_groups(model, batch_of((*examples[:1], *examples[:1]), device))
    layers = linear_weights(model)
    leaders = {name: layers[name] for name in dict.fromkeys(groups.values())}
    sums: dict[str, Tensor] = {}
    counted = 0
    kept: Tensor

    def add(name: str, inputs: Tensor) -> None:
        rows_RI = inputs.reshape(-1, inputs.shape[-1])[kept].float()
        if settings.unit:
            rows_RI = rows_RI / torch.linalg.vector_norm(rows_RI, dim=1, keepdim=True).clamp_min(1e-30)
        product_II = rows_RI.T @ rows_RI
        # Apple's GPUs have no float64.
        total = product_II.double() if product_II.device.type != "mps" else product_II.cpu().double()
        sums[name] = total if name not in sums else sums[name].add_(total)

    with _hooked(leaders, add):
        for batch in batches(examples, context.batch_size, device):
            kept = counted_positions(batch, settings, shared, part).reshape(-1)
            counted += int(kept.sum())
            _run(model, batch)
    spectra = {name: _spectrum(name, sums.pop(name) / max(counted, 1)) for name in leaders}
    return InputSpectra(of_group=spectra, group_of=groups, positions=counted)


def _spectrum(name: str, mean_II: Tensor) -> Spectrum:
    if not torch.isfinite(mean_II).all():
        raise TaskVectorError(f"the inputs of {name} hold NaN or infinity on the data: load the model in float32")
    energies_I, directions_II = torch.linalg.eigh(mean_II)
    energies_I, directions_II = energies_I.cpu().flip(0), directions_II.cpu().flip(1)
    # What float32 products leave beyond the true rank is noise.
    smallest = energies_I[0] * len(energies_I) * torch.finfo(torch.float32).eps
    energies_I = torch.where(energies_I > smallest, energies_I, torch.zeros_like(energies_I))
    return Spectrum(energies_I=energies_I.float(), directions_II=directions_II.float().contiguous())


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], look: Any) -> Iterator[None]:
    def before(name: str) -> Any:
        return lambda _module, inputs: look(name, inputs[0])

    handles = [module.register_forward_pre_hook(before(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, batch: PaddedRows) -> None:
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding_weight(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            # An output head of its own is a linear layer as well: it must see all positions.
            keep = 1 if tied else 0
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=keep, use_cache=False)
    finally:
        for module, training in modes:
            module.training = training


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names, types and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in unique_weights(model)[0].items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(
    context: OperatorContext,
    examples: Sequence[TokenizedExample],
    settings: InputSettings,
    shared: SharedTokens,
    part: Part,
) -> str:
    if "weights" not in context.memory:
        context.memory["weights"] = weights_sha256(context.base)
    tokens = [[example.input_ids, example.labels] for example in examples]
    asked: Any = settings.positions
    if asked == "decision":
        asked = {"prompt_tokens": settings.prompt_tokens, "answer_tokens": settings.answer_tokens}
    # Sums in another order differ in their last bits, so the size of a batch counts.
    content = [
        _FORMAT, context.memory["weights"], tokens, asked, settings.unit, context.batch_size, shared.first,
        shared.last, part,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _save(spectra: InputSpectra, folder: Path) -> None:
    tensors = {}
    for name, spectrum in spectra.of_group.items():
        tensors[f"energies/{name}"] = spectrum.energies_I
        tensors[f"directions/{name}"] = spectrum.directions_II
    about = {
        "format": _FORMAT, "group_of": json.dumps(dict(spectra.group_of)), "positions": str(spectra.positions),
    }  # fmt: skip
    with new_folder(folder, private=True, overwrite=True) as temporary:
        save_file(tensors, temporary / _FILE, about)


def _load(folder: Path) -> InputSpectra:
    path = folder / _FILE
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        group_of = json.loads(about["group_of"])
        return InputSpectra(
            of_group={
                name: Spectrum(energies_I=tensors[f"energies/{name}"], directions_II=tensors[f"directions/{name}"])
                for name in dict.fromkeys(group_of.values())
            },
            group_of=group_of,
            positions=int(about["positions"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TaskVectorError(f"{path} is damaged ({error}): remove {folder}") from error


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

    What all prompts share (system prompt, first position) is in neither matrix (``input_spectra``): it would be the
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
