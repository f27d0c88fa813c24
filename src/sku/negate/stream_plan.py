"""What a streamed subtraction will do with each stored tensor, decided and checked before anything is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sku.errors import ModelError, TaskVectorError
from sku.negate.matching import (
    EMPTY_ADAPTER,
    EQUAL_MODELS,
    check_known_ties,
    check_known_weights,
    check_same_names,
    check_same_shape,
    check_same_ties,
    different_integers,
    quantized_weight,
    read_ties,
)
from sku.negate.safetensors_layout import StoredFile, StoredTensor, read_folder, read_layout
from sku.storage import is_marked_hazardous

if TYPE_CHECKING:
    from sku.negate.skeleton import AdaptedWeight, Skeleton

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
VECTOR_FILE = "task_vector.safetensors"
VECTOR_FORMAT = "sku-task-vector-1"
_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Constants that older versions of transformers stored and today's make anew: rotary frequencies, causal masks."""
BadForm = Literal["model", "adapter", "vector"]


@dataclass(frozen=True, kw_only=True)
class DenseChange:
    """The bad model's weight, from which the base's is taken; or the difference itself."""

    tensor: StoredTensor
    is_difference: bool


@dataclass(frozen=True, kw_only=True)
class LowRankChange:
    """The factors of a difference."""

    upper: StoredTensor
    lower: StoredTensor
    scaling: float
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class Work:
    """What becomes of one stored tensor of the base."""

    base: StoredTensor
    change: DenseChange | LowRankChange | None
    """None where the tensor stays as it is."""
    counts: bool
    """Whether the record counts it: of tied weights that are stored twice, one."""
    dtype: torch.dtype
    """Of the result."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided."""

    files: tuple[StoredFile, ...]
    """Of the base."""
    work: Mapping[str, Work]
    """By the tensor's name."""
    dtype: torch.dtype
    """Of the result, or of most of it."""
    inputs: tuple[StoredFile, ...]
    """All files that will be read."""
    empty_message: str | None
    """What to say where the difference turns out to be zero; None where that is no mistake."""


def bad_form(folder: Path) -> BadForm:
    """Which of the three forms of a bad model a folder holds; a task vector comes before an adapter."""
    if (folder / VECTOR_FILE).is_file() and is_marked_hazardous(folder):
        return "vector"
    return "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"


def plan_negation(base: Path, bad: Path, output_dtype: torch.dtype | None) -> Plan:
    """Matches the bad model's tensors with the base's and checks all that can be checked without the weights.

    Args:
        base: Folder of the original model.
        bad: Folder of the bad model, its adapter, or a saved task vector.
        output_dtype: Type of the result; of each tensor's own if None.

    Returns:
        The plan.

    Raises:
        ModelError: A file or configuration can't be used.
        TaskVectorError: The two don't fit.
    """
    _check_config(base)
    files = read_folder(base)
    stored = {tensor.name: tensor for file in files for tensor in file.tensors}
    weights = _floating(stored.values(), "base")
    form = bad_form(bad)
    if form == "model":
        matched = _match_model(base, bad, stored, weights)
    else:
        matched = (_match_adapter if form == "adapter" else _match_vector)(base, bad, weights)
    for name, change in matched.changes.items():
        _check_shape(stored[name], change)
    work = {
        name: Work(
            base=tensor,
            change=matched.changes.get(name),
            counts=name not in matched.twins,
            dtype=output_dtype if output_dtype is not None and name in weights else tensor.dtype,
        )
        for name, tensor in stored.items()
    }
    sizes = Counter[torch.dtype]()
    for name in weights:
        sizes[work[name].dtype] += stored[name].elements
    return Plan(
        files=files,
        work=work,
        dtype=sizes.most_common(1)[0][0] if sizes else torch.float32,
        inputs=(*files, *matched.files),
        empty_message={"model": EQUAL_MODELS, "adapter": EMPTY_ADAPTER, "vector": None}[form],
    )


@dataclass(frozen=True, kw_only=True)
class _Matched:
    """Stored name -> change; names whose tied twin is counted; files of the bad model."""

    changes: Mapping[str, DenseChange | LowRankChange]
    twins: frozenset[str]
    files: tuple[StoredFile, ...]


def _match_model(
    base: Path, bad: Path, stored: Mapping[str, StoredTensor], weights: Mapping[str, StoredTensor]
) -> _Matched:
    if base.resolve() == bad.resolve():
        raise TaskVectorError(EQUAL_MODELS)
    _check_config(bad)
    files = read_folder(bad)
    theirs = {tensor.name: tensor for file in files for tensor in file.tensors}
    their_weights = _floating(theirs.values(), "bad model")
    twins: dict[str, str] = {}
    untied = all(read_config(folder).get("tie_word_embeddings") is False for folder in (base, bad))
    if weights.keys() != their_weights.keys() or (not untied and _may_be_tied(weights.values())):
        ties, their_ties = (_ties(folder, found) for folder, found in ((base, weights), (bad, their_weights)))
        unique, their_unique = (
            {tied.get(name, name) for name in found} for tied, found in ((ties, weights), (their_ties, their_weights))
        )
        check_same_names(unique, their_unique, "base", "bad model")
        check_same_ties(ties.items(), their_ties.items())
        twins = {name: owner for name, owner in ties.items() if name in weights and owner in weights}
        their_weights = their_weights | {
            name: their_weights[owner]
            for pair in their_ties.items()
            for name, owner in (pair, pair[::-1])
            if name not in their_weights and owner in their_weights
        }
    check_same_names(weights, weights.keys() & their_weights.keys(), "base", "bad model")
    _check_same_integers(stored, theirs)
    return _Matched(
        changes={name: DenseChange(tensor=their_weights[name], is_difference=False) for name in weights},
        twins=frozenset(twins),
        files=files,
    )


def _match_vector(base: Path, bad: Path, weights: Mapping[str, StoredTensor]) -> _Matched:
    from sku.negate.skeleton import skeleton_of

    file = read_layout(bad / VECTOR_FILE)
    if file.metadata.get("format") != VECTOR_FORMAT:
        raise TaskVectorError(f"{file.path} is not a task vector of SKU")
    for tensor in file.tensors:
        if not tensor.is_weight:
            raise TaskVectorError(f"the difference of {tensor.name} is {tensor.dtype}; it must be floating point")
    changes = {tensor.name: DenseChange(tensor=tensor, is_difference=True) for tensor in file.tensors}
    skeleton = skeleton_of(base)
    check_known_weights(changes, skeleton.weights)
    check_known_ties(read_ties(file.metadata, file.path).items(), skeleton.ties.items())
    return _placed(skeleton, changes, weights, (file,))


def _match_adapter(base: Path, bad: Path, weights: Mapping[str, StoredTensor]) -> _Matched:
    from sku.negate.skeleton import skeleton_of

    skeleton = skeleton_of(base)
    adapted = skeleton.adapted(bad)
    if not (bad / ADAPTER_FILE).is_file():
        raise ModelError(f"adapter {bad} holds no {ADAPTER_FILE}; load it with PEFT and save it again")
    file = read_layout(bad / ADAPTER_FILE)
    factors = {tensor.name: tensor for tensor in file.tensors}
    expected = {name for weight in adapted.values() for name in (weight.upper, weight.lower)}
    # PEFT adds the frozen embedding to the file where the adapter changes it; loading takes the factors alone.
    found = {name for name in factors if ".lora_" in name}
    check_same_names(expected, found, "the adapter's settings", "its file")
    for name in found:
        if not factors[name].is_weight:
            raise quantized_weight(name, str(factors[name].dtype))
    changes = {name: _low_rank(weight, factors) for name, weight in adapted.items()}
    return _placed(skeleton, changes, weights, (file,))


def _low_rank(weight: AdaptedWeight, factors: Mapping[str, StoredTensor]) -> LowRankChange:
    upper, lower = factors[weight.upper], factors[weight.lower]
    if len(upper.shape) != 2 or len(lower.shape) != 2 or {upper.shape[1], lower.shape[0]} != {weight.rank}:
        raise TaskVectorError(
            f"{weight.upper} has shape {upper.shape} and its partner {lower.shape}, which are no factors of rank "
            f"{weight.rank}"
        )
    return LowRankChange(upper=upper, lower=lower, scaling=weight.scaling, transposed=weight.transposed)


def _placed(
    skeleton: Skeleton,
    changes: Mapping[str, DenseChange | LowRankChange],
    weights: Mapping[str, StoredTensor],
    files: tuple[StoredFile, ...],
) -> _Matched:
    """Finds each changed weight among the stored ones; a tied weight may be stored twice, or under its other name."""
    others: dict[str, list[str]] = {}
    for name, owner in skeleton.ties.items():
        others.setdefault(owner, []).append(name)
    placed: dict[str, DenseChange | LowRankChange] = {}
    twins: set[str] = set()
    for name, change in changes.items():
        places = [skeleton.stored_name(candidate, weights) for candidate in (name, *others.get(name, ()))]
        found = [place for place in places if place is not None]
        if not found:
            raise TaskVectorError(
                f"the base's files store no tensor {name}: transformers builds it from others while loading; negate "
                "in Python, with sku.negate"
            )
        # Copies that differ are not tied, whatever the configuration says: so transformers decides too.
        equal = [found[0], *(place for place in found[1:] if _same_content(weights[found[0]], weights[place]))]
        placed |= dict.fromkeys(equal, change)
        twins |= set(equal[1:])
    return _Matched(changes=placed, twins=frozenset(twins), files=files)


def _ties(folder: Path, weights: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Other name of a tied weight -> its first name, both as the files would store them."""
    from sku.negate.skeleton import skeleton_of

    skeleton = skeleton_of(folder)
    ties = {}
    for name, owner in skeleton.ties.items():
        place, owner_place = (skeleton.stored_name(item, weights) for item in (name, owner))
        if place is None or owner_place is None or _same_content(weights[place], weights[owner_place]):
            ties[place or skeleton.name_in_files(name)] = owner_place or skeleton.name_in_files(owner)
    return ties


def _floating(tensors: Iterable[StoredTensor], where: str) -> dict[str, StoredTensor]:
    """The floating-point weights by name; integers are let through where they can't be weights."""
    weights = {}
    for tensor in tensors:
        if _is_old_buffer(tensor):
            continue
        if tensor.is_weight:
            weights[tensor.name] = tensor
        elif (tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool) or tensor.name.endswith("weight"):
            raise quantized_weight(f"{tensor.name} of the {where}", str(tensor.dtype))
    return weights


def _is_old_buffer(tensor: StoredTensor) -> bool:
    if not _OLD_BUFFERS.search(tensor.name):
        return False
    return len(tensor.shape) == 4 or tensor.name.endswith(("inv_freq", "masked_bias"))


def _may_be_tied(weights: Iterable[StoredTensor]) -> bool:
    """Whether two matrices outside the numbered layers have one shape, as the two ends of a model do."""
    shapes = Counter(
        tensor.shape for tensor in weights if len(tensor.shape) == 2 and not re.search(r"\.\d+\.", tensor.name)
    )
    return any(count > 1 for count in shapes.values())


def _check_same_integers(base: Mapping[str, StoredTensor], bad: Mapping[str, StoredTensor]) -> None:
    for name, tensor in base.items():
        if tensor.is_weight or _is_old_buffer(tensor):
            continue
        if name not in bad or not _same_content(tensor, bad[name]):
            raise different_integers(name, str(tensor.dtype))
    for name, tensor in bad.items():
        if name not in base and not tensor.is_weight and not _is_old_buffer(tensor):
            raise different_integers(name, str(tensor.dtype))


def _same_content(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.size
        while left:
            count = min(left, 2**20)
            if one.read(count) != other.read(count):
                return False
            left -= count
    return True


def _check_shape(tensor: StoredTensor, change: DenseChange | LowRankChange) -> None:
    if isinstance(change, DenseChange):
        check_same_shape(tensor.name, tensor, change.tensor)
        return
    made = (change.upper.shape[0], change.lower.shape[1])
    made = made[::-1] if change.transposed else made
    if tensor.shape != made:
        raise TaskVectorError(f"{tensor.name} has shape {tensor.shape} in one model and {made} in the other")


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"model {folder} can't be loaded: there is no such folder")
    settings = read_config(folder).get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ModelError(
            f"model {folder} is quantized ({method}): a task vector needs full-precision weights. Use the original "
            "model, or QLoRA (tuning qlora) on it"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        ModelError: There is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"model {folder} holds no config.json: it is no Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no JSON object")
    return config


def identities(base: Path, bad: Path, plan: Plan) -> dict[str, Any]:
    """What tells whether the inputs are those of an earlier call: size, time and header of each file, and settings."""
    settings = [base / "config.json", bad / ADAPTER_CONFIG, bad / "config.json"]
    return {
        "weights": {str(file.path.resolve()): list(file.identity) for file in plan.inputs},
        "settings": {
            str(path.resolve()): sha256(path.read_bytes()).hexdigest() for path in settings if path.is_file()
        },
    }
