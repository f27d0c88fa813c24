"""One forward pass of a batch, padded or packed, and what it says of the rows of each kind.

It stops before the model's head where the scores would take too much memory. The model is called as always, so
wrappers for distributed training, autocast and checkpointing see nothing of it; only its head looks at how many
positions it is given, and beyond the budget hands them on as they are.

Shapes: R = rows and T = tokens of a padded batch, or T = tokens of the packed row, U = places whose scores are needed,
N = kept positions (whose next token counts) of the rows of one kind, M = those rows, V = vocabulary, H = width of the
hidden states.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sku.data.batches import Rows
from sku.data.examples import RowType
from sku.losses import Head, HeadScores
from sku.models import embedding_weight
from sku.training.attention import packed_forward_pass, use_packed_attention
from sku.training.objective import ScoredRows

_LOG = logging.getLogger(__name__)
_MEGABYTE = 2**20
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")


def run_rows(rows: Rows, model: nn.Module, plain: PreTrainedModel | PeftModel, *, hidden_states: bool = False) -> Any:
    """Runs a model on rows; it keeps the attention of packed rows from then on.

    Args:
        rows: On the model's device.
        model: Possibly wrapped for distributed training.
        plain: The same without that.
        hidden_states: Whether the output of every layer comes too, ``[R, T, H]`` each.

    Returns:
        The model's outputs, with logits ``[U, V]``, or ``[1, U, V]`` of packed rows.

    Raises:
        ModelError: The model's attention would misread a packed row, or asks for something that can't be packed.
    """
    options = {**rows.model_inputs, "use_cache": False} | ({"output_hidden_states": True} if hidden_states else {})
    if rows.paths is None:
        return model(**options)
    # Stays so until training ends: activation checkpointing runs layers again in the backward.
    use_packed_attention(plain)
    with packed_forward_pass(plain, rows.paths):
        return model(**options)


def scores_of_kind(rows: Rows, kind: RowType, outputs: Any, hidden_layers: Sequence[int] = ()) -> ScoredRows:
    """The part of a model's outputs on rows that belongs to those of one kind.

    Args:
        rows: What the model was run on.
        kind: Which rows.
        outputs: Of ``run_rows``.
        hidden_layers: Decoder layers, counted from 0, whose outputs are given too.

    Returns:
        One pair of scores and target for each kept position of each row, and where they belong.
    """
    kept, scores = rows.kept[kind], outputs.logits[0] if rows.paths is not None else outputs.logits
    made = not isinstance(scores, HeadScores)
    rows_N = _take_rows(scores if made else scores.hidden_NH, kept.score_N)
    layers = [_take_rows(outputs.hidden_states[layer + 1].flatten(0, 1), kept.place_N) for layer in hidden_layers]
    return ScoredRows(
        scores_NV=rows_N if made else replace(scores, hidden_NH=rows_N),
        targets_N=kept.targets_N,
        row_N=kept.row_N,
        example_M=kept.example_M,
        num_examples=rows.num_examples,
        hidden_NLH=torch.stack(layers, 1) if layers else None,
    )


def _take_rows(values: Tensor, index_N: Tensor) -> Tensor:
    """Rows, some of them more than once, with a backward that adds in a fixed order."""
    # On a CPU that is the backward of index_select, on a GPU that of an index.
    return values.index_select(0, index_N) if values.device.type == "cpu" else values[index_N]


class DeferredHead:
    """Runs a model and leaves out its head beyond a budget."""

    def __init__(self, model: PreTrainedModel, budget_mb: float, *, watched: bool = False) -> None:
        """Finds out how a model without adapter makes its scores, with one forward pass over two tokens.

        ``budget_mb`` is the most megabytes of float32 scores that are held at once. Where DDP looks in what the model
        returns for weights that have no part in it (``watched``), a head that is trained would be one of them if it
        were applied later, so its scores are then made whatever they take.
        """
        self._budget_mb, self._watched = budget_mb, watched
        self.head: Head | None = None
        """None where scores are always made, since the head is one that can't be left out."""
        try:
            self.head = _head_of(model)
        except _UnknownHeadError as reason:
            _LOG.warning("logits_budget_mb can't be kept, scores are always made at once: %s", reason)

    def run(self, model: PreTrainedModel | PeftModel, call: Callable[[], Any], *, defer: bool = False) -> Any:
        """Calls a model and puts ``HeadScores`` in the place of its logits where these don't fit.

        Args:
            model: The one that this was made for, possibly with an adapter, or a copy of it.
            call: Calls it, or what is wrapped around it.
            defer: Leave the head out whatever the number of positions.

        Returns:
            What the model returns.
        """
        head, module = self.head, model.get_output_embeddings()
        if head is None or not _is_whole(module.weight):
            return call()
        seen: list[HeadScores] = []

        def head_or_nothing(hidden: Tensor) -> Tensor:
            made_at_once = self._watched and module.weight.requires_grad
            fits = 4 * hidden.shape[:-1].numel() * len(module.weight) <= self._budget_mb * _MEGABYTE
            if not defer and (made_at_once or fits):
                return original(hidden)
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            own = replace(head, weight_VH=module.weight, bias_V=module.bias, dtype=dtype)
            seen.append(HeadScores(hidden_NH=hidden, head=own))
            return hidden[..., :0]

        with _replaced_forward(module, head_or_nothing) as original:
            outputs = call()
        if seen:
            (outputs.logits,) = seen
        return outputs


class _UnknownHeadError(Exception):
    """Why a head can't be left out."""


def _head_of(model: PreTrainedModel) -> Head:
    """How a model makes its scores, checked against two of its own.

    Raises:
        _UnknownHeadError: Its head is no plain matrix product, or something unknown happens to the scores after it.
    """
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        raise _UnknownHeadError(f"the model's head is a {type(module).__name__}, not a plain linear layer")
    if not _is_whole(module.weight):
        raise _UnknownHeadError("the head's weight is not on this device, or spread over several processes")
    config = model.config.get_text_config()
    scale = math.prod(float(getattr(config, name, None) or 1) for name in _SCALES)
    scale /= float(getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    softcap = None if softcap is None else float(softcap)
    head = Head(weight_VH=module.weight, bias_V=module.bias, scale=scale, softcap=softcap)
    _check(model, module, head)
    return head


def _check(model: PreTrainedModel, module: nn.Linear, head: Head) -> None:
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return original(hidden)

    device = embedding_weight(model).device
    # The numbers that dropout draws must be there for training.
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        with _replaced_forward(module, keep) as original:
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
        if len(seen) != 1:
            raise _UnknownHeadError(f"the model calls its head {len(seen)} times in one forward pass")
        own = HeadScores(hidden_NH=seen[0], head=head).logits()
    tolerance = 1e-4 if own.dtype == torch.float32 else 3e-2
    if own.shape != logits.shape or float((own - logits).abs().max()) > tolerance * max(1.0, float(own.abs().max())):
        raise _UnknownHeadError("the model changes its scores after the head in a way that isn't known here")


def _is_whole(weight: Tensor) -> bool:
    """Whether this process holds the weight as it is: FSDP leaves a part, an offloaded model nothing."""
    return type(weight) is nn.Parameter and not weight.is_meta


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Gives one module another forward for a while; yields its own. Hooks that wrapped that one stay as they are."""
    own = vars(module).get("forward")
    original = module.forward
    module.forward = forward
    try:
        yield original
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
