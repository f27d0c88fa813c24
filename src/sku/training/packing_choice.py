"""Whether a model can be given packed rows: told by its settings, then by a look at what it answers."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from sku.config import Packing
from sku.data.attention_paths import AttentionPaths, Segment, plan_paths
from sku.errors import ModelError, SkuError, one_line
from sku.models import embedding_weight, plain_model
from sku.training.evaluation_mode import evaluation_mode
from sku.training.packed_attention import packed_forward_pass, use_packed_attention

_log = logging.getLogger(__name__)
_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_SHARED, _BRANCHES, _ALONE = 5, (4, 6), 4
"""Tokens of the trial row: a prefix, what goes on from it, and a row of its own."""
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
"""Largest difference between packed and plain scores, relative to their size. Rounding stays far below; a token that
sees too much, too little, or from the wrong place does not."""


def choose_packing(model: PreTrainedModel | PeftModel, asked: Packing) -> Packing:
    """How rows go to a model.

    Args:
        model: On the device that it is trained on, not yet wrapped for distributed training.
        asked: ``auto`` takes ``tree`` where it can and says why where it can't.

    Returns:
        ``tree``, ``flat`` or ``padded``.

    Raises:
        ModelError: ``tree`` or ``flat`` is asked for and the model can't be given packed rows.
    """
    if asked == "padded":
        return "padded"
    reason = why_not_packed(model)
    if reason is None and asked == "auto":
        reason = _own_attention(model)
    if reason is None:
        return "tree" if asked == "auto" else asked
    if asked != "auto":
        raise ModelError(f"packing is {asked}, but {reason}: set packing to padded")
    _log.warning("packing: padded, since %s", reason)
    return "padded"


def why_not_packed(model: PreTrainedModel | PeftModel) -> str | None:
    """Why a model can't be given packed rows, None if it can.

    The trial compares the scores of a small packed row with those of the same rows on their own: recurrent layers,
    positions taken from an attention mask, biases and sinks all show there. What needs more tokens to show (windows)
    is read from what the attention layers ask for.

    Args:
        model: As for ``choose_packing``; its attention is the same afterwards.
    """
    return _from_settings(model) or _from_trial(model)


def _own_attention(model: PreTrainedModel | PeftModel) -> str | None:
    chosen = plain_model(model).config._attn_implementation
    if chosen in ("sdpa", "sku_packed"):
        return None
    return f"the model was loaded with attention {chosen}, which is kept"


def _from_settings(model: PreTrainedModel | PeftModel) -> str | None:
    inner = plain_model(model)
    config, name = inner.config.get_text_config(), type(inner).__name__
    odd_layers = sorted(set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS)
    # Each with its reason; the first that holds is told.
    checks: list[tuple[bool, str]] = [
        (bool(inner.config.is_encoder_decoder), f"{name} is an encoder-decoder"),
        (bool(odd_layers), f"{name} has layers of the kind {', '.join(odd_layers)}"),
        (
            isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning,
            "the adapter puts virtual tokens before the row",
        ),
        (not inner._can_set_attn_implementation(), f"{name} doesn't take attention functions of others"),
        (
            is_deepspeed_zero3_enabled() or any(weight.is_meta for weight in inner.parameters()),
            "the weights are spread over processes, so that the model can't be tried",
        ),
    ]
    return next((reason for holds, reason in checks if holds), None)


def _from_trial(model: PreTrainedModel | PeftModel) -> str | None:
    inner = plain_model(model)
    name = type(inner).__name__
    paths = plan_paths([Segment(_SHARED), *(Segment(length, 0) for length in _BRANCHES), Segment(_ALONE)])
    before = inner.config._attn_implementation
    try:
        with torch.no_grad(), evaluation_mode(model):
            plain = _plain_scores(model, paths)
            use_packed_attention(model)
            packed, windows = _packed_scores(model, paths)
    except (SkuError, TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"{name} can't be given a packed row ({one_line(error)})"
    finally:
        if inner.config._attn_implementation != before:
            inner.set_attn_implementation(before)
    if windows != _expected_windows(inner):
        return f"the attention layers of {name} don't all say what they see"
    difference = float((packed - plain).norm() / plain.norm())
    if not difference <= _TOLERANCE.get(plain.dtype, _HALF_TOLERANCE):
        return f"{name} gives other scores for a packed row than for its parts (relative difference {difference:.1g})"
    return None


def _trial_ids(model: PreTrainedModel | PeftModel, paths: AttentionPaths) -> Tensor:
    weight = embedding_weight(plain_model(model))
    # Any tokens do that are not all alike.
    return (torch.arange(paths.length, device=weight.device) * 7 + 5) % weight.shape[0]


def _plain_scores(model: PreTrainedModel | PeftModel, paths: AttentionPaths) -> Tensor:
    """``[T, V]``: each path as a row of its own, and of each what its segment adds."""
    ids_T = _trial_ids(model, paths)
    scores = []
    for index, (start, end) in enumerate(pairwise(paths.key_starts.tolist())):
        row = ids_T[paths.key_index_K[start:end].to(ids_T.device)]
        logits = model(input_ids=row[None], attention_mask=torch.ones_like(row[None]), use_cache=False).logits[0]
        scores.append(logits[-paths.segments[index].length :])
    return torch.cat(scores)


def _packed_scores(model: PreTrainedModel | PeftModel, paths: AttentionPaths) -> tuple[Tensor, list[int | None]]:
    ids_T = _trial_ids(model, paths)
    own = paths.to(ids_T.device)
    with packed_forward_pass(model, own):
        outputs: Any = model(
            input_ids=ids_T[None], position_ids=own.position_T[None], packed_paths=own, use_cache=False
        )
    scores: Tensor = outputs.logits[0]
    return scores, own.windows_seen


def _expected_windows(model: PreTrainedModel) -> list[int | None]:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window if getattr(config, "use_sliding_window", True) else None] * config.num_hidden_layers
