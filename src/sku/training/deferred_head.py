"""A model's forward pass that stops before its head where the scores would take too much memory.

The model is called as always, so wrappers for distributed training, autocast and checkpointing see nothing of it; only
its head looks at how many positions it is given, and beyond the budget hands them on as they are.

Shapes: N = kept positions, H = width of the hidden states, V = vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sku.losses import Head, HeadScores
from sku.models import embedding_weight

_LOG = logging.getLogger(__name__)
_MEGABYTE = 2**20
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True)
class HeadShape:
    """What a model does between its last hidden states and its scores."""

    module: nn.Linear
    scale: float
    softcap: float | None

    def head(self, dtype: torch.dtype | None = None) -> Head:
        """The head as ``sku.losses`` takes it, with the type of its product."""
        module = self.module
        return Head(weight_VH=module.weight, bias_V=module.bias, scale=self.scale, softcap=self.softcap, dtype=dtype)


class DeferredHead:
    """Runs a model and leaves out its head beyond a budget."""

    def __init__(self, model: PreTrainedModel, budget_mb: float | None, *, watched: bool = False) -> None:
        """Finds out how a model without adapter makes its scores, with one forward pass over two tokens.

        ``budget_mb`` is the most megabytes of float32 scores that are held at once; None for no limit. Where DDP looks
        in what the model returns for weights that have no part in it (``watched``), a head that is trained would be
        one of them if it were applied later, so its scores are then made whatever they take.
        """
        self.budget_mb, self._watched = budget_mb, watched
        self.shape: HeadShape | None = None
        """None where scores are always made: there is no limit, or the head is one that can't be left out."""
        if budget_mb is None:
            return
        try:
            self.shape = _shape_of(model)
        except _UnknownHeadError as reason:
            _LOG.warning("logits_budget_mb can't be kept, scores are always made at once: %s", reason)

    def fits(self, rows: int) -> bool:
        """Whether the scores of so many positions are within the budget."""
        if self.budget_mb is None or self.shape is None:
            return True
        return 4 * rows * self.shape.module.weight.shape[0] <= self.budget_mb * _MEGABYTE

    def run(self, call: Callable[[], Any], *, copy: PreTrainedModel | None = None, defer: bool = False) -> Any:
        """Calls a model and puts ``HeadScores`` in the place of its logits where these don't fit.

        Args:
            call: Calls the model, or what is wrapped around it.
            copy: What is called, where it isn't the model this was made for but a copy of it.
            defer: Leave the head out whatever the number of positions.

        Returns:
            What the model returns.
        """
        shape = self.shape
        if shape is None or not _is_whole(shape.module.weight):
            return call()
        if copy is not None:
            module = copy.get_output_embeddings()
            assert isinstance(module, nn.Linear)
            shape = HeadShape(module, shape.scale, shape.softcap)
        seen: list[HeadScores] = []

        def head_or_nothing(hidden: Tensor) -> Tensor:
            made_at_once = self._watched and shape.module.weight.requires_grad
            if not defer and (made_at_once or self.fits(hidden.shape[:-1].numel())):
                return original(hidden)
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            seen.append(HeadScores(hidden_NH=hidden, head=shape.head(dtype)))
            return hidden[..., :0]

        with _replaced_forward(shape.module, head_or_nothing) as original:
            outputs = call()
        if seen:
            (outputs.logits,) = seen
        return outputs


class _UnknownHeadError(Exception):
    """Why a head can't be left out."""


def _shape_of(model: PreTrainedModel) -> HeadShape:
    """How a model makes its scores, checked against two of its own.

    Raises:
        _UnknownHeadError: Its head is no plain matrix product, or something unknown happens to the scores after it.
    """
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        raise _UnknownHeadError(f"the model's head is a {type(module).__name__}, not a plain linear layer")
    if module.weight.is_meta or not _is_whole(module.weight):
        raise _UnknownHeadError("the head's weight is not on this device, or spread over several processes")
    if not module.weight.is_floating_point():
        raise _UnknownHeadError(f"the head's weight is {module.weight.dtype}")
    config = model.config.get_text_config()
    scale = math.prod(float(getattr(config, name, None) or 1) for name in _SCALES)
    scale /= float(getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    shape = HeadShape(module, scale, None if softcap is None else float(softcap))
    _check(model, shape)
    return shape


def _check(model: PreTrainedModel, shape: HeadShape) -> None:
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return original(hidden)

    device = embedding_weight(model).device
    # The numbers that dropout draws must be there for training.
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        with _replaced_forward(shape.module, keep) as original:
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
        if len(seen) != 1:
            raise _UnknownHeadError(f"the model calls its head {len(seen)} times in one forward pass")
        own = HeadScores(hidden_NH=seen[0], head=shape.head()).logits()
    tolerance = 1e-4 if own.dtype == torch.float32 else 3e-2
    if own.shape != logits.shape or float((own - logits).abs().max()) > tolerance * max(1.0, float(own.abs().max())):
        raise _UnknownHeadError("the model changes its scores after the head in a way that isn't known here")


def _is_whole(weight: Tensor) -> bool:
    """Whether this process holds the weight as it is: FSDP and ZeRO-3 leave a part or nothing."""
    return type(weight) is nn.Parameter and weight.numel() > 0


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
