"""Attention of a packed row along its paths, for every model that takes transformers' attention interface.

Whether a model does is told by its settings, then by a look at what it answers (``choose_packing``).

Two ways to the same numbers: on a GPU in half precision one variable-length flash call over gathered keys; anywhere
else a loop over segments (a prefix is a plain causal square, a branch sees its prefix and itself). Without a plan it
is transformers' ``sdpa``, mask and all, so that a model can be asked in the usual way between steps.

Shapes: H = heads, G = heads of keys and values, T = tokens, D = width of a head.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sku.config.stages import Packing
from sku.data.batches import AttentionPaths, Segment, plan_paths
from sku.errors import ModelError, SkuError, one_line
from sku.models import embedding_weight, plain_model
from sku.training import evaluation_mode

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # Older than torch 2.10.
    varlen_attn = None  # type: ignore[assignment]

NAME = "sku_packed"
"""Of this attention among those of transformers (``attn_implementation``)."""
_HARMLESS = {
    "position_ids", "use_cache", "cache_position", "is_causal", "output_hidden_states", "output_router_logits",
    "return_dict",
}  # fmt: skip
"""Arguments of attention layers that say nothing which the plan or the function doesn't know."""
_LARGEST_FLASH_HEAD = 256
_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_SHARED, _BRANCHES, _ALONE = 5, (4, 6), 4
"""Tokens of the trial row: a prefix, what goes on from it, and a row of its own."""
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
"""Largest difference between packed and plain scores, relative to their size. Rounding stays far below; a token that
sees too much, too little, or from the wrong place does not."""
_log = logging.getLogger(__name__)
_in_packed_forward: ContextVar[bool] = ContextVar("_in_packed_forward", default=False)


_HAS_VARLEN = varlen_attn is not None and {"scale", "window_size", "enable_gqa"} <= set(
    inspect.signature(varlen_attn).parameters
)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    packed_paths: AttentionPaths | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in which each token sees its own path and nothing else.

    ``o_t = sum_s softmax_s(scaling q_t . k_s) v_s`` over the tokens s of t's path with ``0 <= t - s < window``,
    distances along the path.

    Args:
        module: The attention layer; not used.
        query: ``[1, H, T, D]``.
        key: ``[1, G, T, D]``; H is a multiple of G.
        value: As ``key``.
        attention_mask: None: the plan tells all.
        dropout: Probability of dropping an attention weight.
        scaling: Of the scores; ``D ** -0.5`` if None.
        packed_paths: The plan. None makes this ``sdpa``.
        sliding_window: Most tokens that one sees, itself included; all if None.
        **options: Whatever else the layer passes.

    Returns:
        ``[1, T, H, D]`` in the type of ``query``, and None in place of attention weights.

    Raises:
        ModelError: The layer asks for something that the plan can't give: a mask, a soft cap, sinks, a bias, ...
    """
    if packed_paths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    _check_call(attention_mask, options)
    packed_paths.windows_seen.append(sliding_window)
    if _suits_varlen(query, value, dropout):
        return _by_varlen(query, key, value, packed_paths, sliding_window, scaling), None
    attended = _by_segments(query, key, value, packed_paths, sliding_window, dropout, scaling)
    return attended.transpose(1, 2).contiguous(), None


def _packed_mask(*arguments: Any, **options: Any) -> Tensor | None:
    return None if _in_packed_forward.get() else sdpa_mask(*arguments, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _packed_mask)


def use_packed_attention(model: PreTrainedModel | PeftModel) -> None:
    """Switches a model to this attention, which stays ``sdpa`` for all forward passes without a plan."""
    if not follows_paths(model):
        plain_model(model).set_attn_implementation(NAME)


def follows_paths(model: PreTrainedModel | PeftModel) -> bool:
    """Whether ``use_packed_attention`` was called and nothing has switched the model back."""
    config = plain_model(model).config
    return all(part._attn_implementation == NAME for part in (config, config.get_text_config()))


@contextmanager
def packed_forward_pass(model: PreTrainedModel | PeftModel, paths: AttentionPaths) -> Iterator[None]:
    """Surrounds a forward pass of a packed row, and stops where the plan was not followed.

    transformers takes position ids that start again for plain packing, and a model whose attention gets no plan reads
    a tree as such: each branch would be blind to its prompt, and no error would tell.

    Args:
        model: Not wrapped for distributed training.
        paths: The plan that the forward pass is given as ``packed_paths``.

    Raises:
        ModelError: The model has another attention, or no layer of it has followed the plan.
    """
    if not follows_paths(model):
        raise ModelError(
            f"a packed row was given to a model with attention {plain_model(model).config._attn_implementation}, "
            "which would misread it without an error: call use_packed_attention on it, or set packing to padded"
        )
    paths.windows_seen.clear()
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)
    if not paths.windows_seen:
        raise ModelError(
            f"no attention layer of {type(plain_model(model)).__name__} has followed the plan of the packed row: it "
            "doesn't hand packed_paths on; set packing to padded"
        )


def _check_call(attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ModelError("the model makes an attention mask of its own (ALiBi, say), which can't be packed")
    asked = sorted(
        name for name, value in options.items() if value is not None and value is not False and name not in _HARMLESS
    )
    if options.get("is_causal") is False:
        asked.append("is_causal=False")
    if asked:
        raise ModelError(f"the attention layers ask for {', '.join(asked)}, which packed attention doesn't have")


def _by_segments(
    query: Tensor, key: Tensor, value: Tensor, paths: AttentionPaths, window: int | None, dropout: float,
    scaling: float | None,
) -> Tensor:  # fmt: skip
    # Half-precision attention is slower than float32 on a CPU, its backward most of all.
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if is_half and query.device.type == "cpu" else query.dtype
    lengths = [segment.length for segment in paths.segments]
    # The backward of one split is one concatenation; slices would each fill a tensor of the whole row.
    queries = query.to(wide).split(lengths, dim=2)
    keys = _for_each_head(key.to(wide), query.shape[1]).split(lengths, dim=2)
    values = _for_each_head(value.to(wide), query.shape[1]).split(lengths, dim=2)
    attended = []
    with torch.autocast(query.device.type, enabled=False):
        for index, (_, prefix) in enumerate(paths.segments):
            mask = paths.segment_mask(index, window)
            attended.append(
                functional.scaled_dot_product_attention(
                    queries[index],
                    keys[index] if prefix is None else torch.cat([keys[prefix], keys[index]], dim=2),
                    values[index] if prefix is None else torch.cat([values[prefix], values[index]], dim=2),
                    attn_mask=mask,
                    is_causal=mask is None,
                    dropout_p=dropout,
                    scale=scaling,
                )
            )
    return torch.cat(attended, dim=2).to(query.dtype)


def _suits_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    return (
        _HAS_VARLEN
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _LARGEST_FLASH_HEAD
        and dropout == 0.0
    )


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, paths: AttentionPaths, window: int | None, scaling: float | None
) -> Tensor:
    keys, values = (tensor[0].transpose(0, 1) for tensor in (key, value))
    if paths.shares:
        # The backward of this index sorts and adds in a fixed order; that of index_select adds as threads come.
        keys, values = keys[paths.key_index_K], values[paths.key_index_K]
    # Causal is aligned to the last key of each path, so a branch sees all of its prefix.
    attended = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        paths.query_starts,
        paths.key_starts,
        paths.longest_segment,
        paths.longest_path,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended[None]


def _for_each_head(tensor: Tensor, heads: int) -> Tensor:
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


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
    own = plain_model(model).config._attn_implementation
    if reason is None and asked == "auto" and own not in ("sdpa", NAME):
        reason = f"the model was loaded with attention {own}, which is kept"
    if reason is None:
        return "tree" if asked == "auto" else asked
    if asked != "auto":
        raise ModelError(f"packing is {asked}, but {reason}: set packing to padded")
    _log.warning("packing: padded, since %s", reason)
    return "padded"


def why_not_packed(model: PreTrainedModel | PeftModel) -> str | None:
    """Why a model can't be given packed rows, None if it can; its attention is the same afterwards.

    The trial compares the scores of a small packed row with those of the same rows on their own: recurrent layers,
    positions taken from an attention mask, biases and sinks all show there. What needs more tokens to show (windows)
    is read from what the attention layers ask for.
    """
    return _from_settings(model) or _from_trial(model)


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
            any(weight.is_meta for weight in inner.parameters()),
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
