"""What goes into each linear layer on given text: the eigenvectors of ``X^T X``, streamed batch by batch.

Positions are of two parts. ``shared`` ones tell no text from another: the first, whose input depends on one token
alone and can be a hundred times as long as others (the attention sink), all tokens that every prompt, harmful or
normal, begins with (chat template, system prompt), and those that every prompt ends with (generation prompt) but for
the last, where the answer begins. The others are the text's ``own``. Counted together, the shared ones would be the
largest part of every text and say nothing of it.

Where the positions that decide are asked for (``Decision``), the last tokens of the prompt count although all prompts
end with them: beyond the first layer their inputs hold what the model has read, and the reply begins from there.

Layers that read the same tensor (query, key and value; gate and up) share one matrix. Products are taken in float32
and summed in float64; what is kept, in memory and on disk alike, is float32, so that a cached spectrum equals a fresh
one bit for bit.

Shapes: R = token positions, I = inputs of a layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sku.data.tokens import TokenizedExample
from sku.errors import TaskVectorError
from sku.models import embedding_weight
from sku.negate.operators.base import OperatorContext, linear_weights
from sku.negate.operators.texts import Batch, batch_of, batches, device_of, drawn
from sku.negate.task_vector import unique_weights
from sku.storage import new_folder

Positions = Literal["all", "prompt", "answer"]
Text = Literal["normal", "harmful"]
Part = Literal["own", "shared"]
_FILE = "spectra.safetensors"
_FORMAT = "sku-input-spectra-2"
"""Raised whenever the same text could give another spectrum, so that older files are not taken for it."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The positions at which a model decides how it replies."""

    prompt_tokens: int = 8
    """Last ones of the prompt, chat template and all."""
    answer_tokens: int = 8
    """First ones of the answer, as far as it has so many."""

    def positions(self, batch: Batch) -> Tensor:
        """``[B, T]``, true there."""
        places_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
        last_B1 = _last_of_prompt(batch)
        near_BT = (places_T > last_B1 - self.prompt_tokens) & (places_T <= last_B1 + self.answer_tokens)
        return near_BT & (batch.mask_BT == 1)


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
class SharedTokens:
    """What all prompts have in common, harmful and normal ones alike."""

    first: int
    """Tokens that each begins with; at least 1."""
    last: int
    """Tokens that each ends with, before the answer."""

    def positions(self, batch: Batch) -> Tensor:
        """``[B, T]``, true where a position tells no text from another."""
        places_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
        # The last token of a prompt is the first position that an answer is read from: it counts.
        begins_B1 = _last_of_prompt(batch)
        return self.beginnings(batch) | ((places_T > begins_B1 - self.last) & (places_T < begins_B1))

    def beginnings(self, batch: Batch) -> Tensor:
        """``[B, T]``, true on what every prompt begins with."""
        places_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
        return (places_T < self.first).expand_as(batch.ids_BT)


def _last_of_prompt(batch: Batch) -> Tensor:
    """``[B, 1]``, the position of each prompt's last token."""
    return batch.answer_BT.int().argmax(1, keepdim=True)


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


def input_spectra(
    context: OperatorContext,
    text: Text,
    *,
    positions: Positions | Decision,
    examples: int,
    unit: bool,
    part: Part = "own",
) -> InputSpectra:
    """Measures, or finds again, what goes into the linear layers.

    Args:
        context: Model, texts, cache.
        text: Which examples.
        positions: Token positions that count: ``all``, those of the ``prompt``, those before tokens of the
            ``answer``, or those that decide.
        examples: Most examples, drawn by the seed.
        unit: Each input counts by its direction alone, whatever its length.
        part: Which of these positions: the text's own, or those of ``shared_tokens``. Of those that decide all are the
            text's own, and what prompts begin with is shared.

    Returns:
        The spectra.

    Raises:
        TaskVectorError: An input is not finite, or a cached file is damaged.
        OutputError: The cache can't be written.
    """
    chosen = drawn(getattr(context, text), examples, context.seed)
    shared = shared_tokens([*context.harmful, *context.normal])
    key = _key(context, chosen, positions, unit, shared, part)
    if key not in context.memory:
        folder = None if context.cache is None else context.cache / f"spectra-{key[:32]}"
        if folder is not None and folder.exists():
            context.memory[key] = _load(folder)
        else:
            context.memory[key] = _measure(context, chosen, positions, shared, part, unit=unit)
            if folder is not None:
                _save(context.memory[key], folder)
    spectra = context.memory[key]
    assert isinstance(spectra, InputSpectra)
    return spectra


def shared_tokens(examples: Sequence[TokenizedExample]) -> SharedTokens:
    """What all prompts begin and end with, as token ids.

    Args:
        examples: Harmful and normal ones together, as they are rendered.

    Returns:
        The numbers of tokens. Where all prompts are the same one nothing tells what of it is its own: the first token
        alone is then taken for shared.
    """
    prompts = {tuple(example.input_ids[: example.answer_start]) for example in examples}
    if len(prompts) < 2:
        return SharedTokens(first=1, last=0)
    one, *others = prompts
    first = min(_common(one, other) for other in others)
    last = min(_common(one[::-1], other[::-1]) for other in others)
    return SharedTokens(first=max(first, 1), last=last)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens from the first on that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (own, token) in pairs if own != token), min(len(one), len(other)))


def input_groups(model: PreTrainedModel, batch: Batch) -> dict[str, str]:
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
        if inputs_I.numel() // inputs_I.shape[-1] == batch.mask_BT.numel():
            held.append(inputs_I)
            groups.setdefault(name, first.setdefault(id(inputs_I), name))

    with _hooked(linear_weights(model), look):
        _run(model, batch)
    return groups


def _measure(
    context: OperatorContext,
    examples: Sequence[TokenizedExample],
    positions: Positions | Decision,
    shared: SharedTokens,
    part: Part,
    *,
    unit: bool,
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
        if unit:
            rows_RI = rows_RI / torch.linalg.vector_norm(rows_RI, dim=1, keepdim=True).clamp_min(1e-30)
        product_II = rows_RI.T @ rows_RI
        # Apple's GPUs have no float64.
        total = product_II.double() if product_II.device.type != "mps" else product_II.cpu().double()
        sums[name] = total if name not in sums else sums[name].add_(total)

    with _hooked(leaders, add):
        for batch in batches(examples, context.batch_size, device):
            kept = _kept(batch, positions, shared, part).reshape(-1)
            counted += int(kept.sum())
            _run(model, batch)
    spectra = {name: _spectrum(name, sums.pop(name) / max(counted, 1)) for name in leaders}
    return InputSpectra(of_group=spectra, group_of=groups, positions=counted)


def _kept(batch: Batch, positions: Positions | Decision, shared: SharedTokens, part: Part) -> Tensor:
    """``[B, T]``, true where a position counts."""
    real_BT = batch.mask_BT == 1
    if isinstance(positions, Decision):
        beginnings_BT = shared.beginnings(batch)
        return real_BT & beginnings_BT if part == "shared" else positions.positions(batch) & ~beginnings_BT
    if positions == "answer":
        asked_BT = batch.answer_BT
    else:
        asked_BT = real_BT if positions == "all" else real_BT & ~batch.answer_BT
    return asked_BT & (shared.positions(batch) == (part == "shared"))


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


def _run(model: PreTrainedModel, batch: Batch) -> None:
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding_weight(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            # An output head of its own is a linear layer as well: it must see all positions.
            model(
                input_ids=batch.ids_BT,
                attention_mask=batch.mask_BT,
                logits_to_keep=1 if tied else 0,
                use_cache=False,
            )
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
    positions: Positions | Decision,
    unit: bool,
    shared: SharedTokens,
    part: Part,
) -> str:
    if "weights" not in context.memory:
        context.memory["weights"] = weights_sha256(context.base)
    tokens = [[example.input_ids, example.labels] for example in examples]
    # Sums in another order differ in their last bits, so the size of a batch counts.
    asked = dataclasses.asdict(positions) if isinstance(positions, Decision) else positions
    content = [
        _FORMAT, context.memory["weights"], tokens, asked, unit, context.batch_size, shared.first, shared.last,
        part,
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
