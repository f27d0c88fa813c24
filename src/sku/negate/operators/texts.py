"""Batches of tokenized examples, and what a model says at the positions before an answer's tokens.

Shapes: B = examples, T = tokens of the longest, N = answer tokens of all, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sku.data.tokenization import TokenizedExample
from sku.errors import TaskVectorError
from sku.losses import IGNORE_INDEX, answer_nll
from sku.models import embedding_weight
from sku.negate.task_vector import unique_weights


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded on the right."""

    ids_BT: Tensor
    mask_BT: Tensor
    """1 on the examples' own tokens."""
    answer_BT: Tensor
    """True where the next token is one of the answer."""
    targets_N: Tensor
    """Those tokens, row by row."""


def drawn(examples: Sequence[TokenizedExample], count: int, seed: int) -> list[TokenizedExample]:
    """At most ``count`` examples, drawn by the seed, in their order."""
    if len(examples) <= count:
        return list(examples)
    return [examples[place] for place in sorted(random.Random(seed).sample(range(len(examples)), count))]


def with_first_tokens(examples: Sequence[TokenizedExample], count: int) -> list[TokenizedExample]:
    """The examples with at most ``count`` tokens of each answer: what follows changes nothing before it."""
    cut = []
    for example in examples:
        stop = example.answer_start + count
        cut.append(dataclasses.replace(example, input_ids=example.input_ids[:stop], labels=example.labels[:stop]))
    return cut


def batch_of(examples: Sequence[TokenizedExample], device: torch.device) -> Batch:
    """Pads examples to one batch.

    Args:
        examples: At least one.
        device: Where the tensors go.

    Returns:
        The batch. What pads the ids is never read: attention is causal and the padding comes last.
    """
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    ids_BT = pad_sequence(ids, batch_first=True).to(device)
    mask_BT = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
    labels_BT = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device)
    following_BT = torch.full_like(labels_BT, IGNORE_INDEX)
    following_BT[:, :-1] = labels_BT[:, 1:]
    answer_BT = following_BT != IGNORE_INDEX
    return Batch(ids_BT=ids_BT, mask_BT=mask_BT, answer_BT=answer_BT, targets_N=following_BT[answer_BT])


def batches(examples: Sequence[TokenizedExample], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All examples, those of similar length together."""
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    for start in range(0, len(order), batch_size):
        yield batch_of(order[start : start + batch_size], device)


def answer_logits(model: PreTrainedModel, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Scores at the positions before the answers' tokens.

    Args:
        model: In evaluation mode.
        batch: The examples.
        weights: Stand in for the model's own of these names.

    Returns:
        ``[N, V]``.
    """
    inputs = {
        "input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "logits_to_keep": batch.answer_BT,
        "use_cache": False,
    }  # fmt: skip
    output = model(**inputs) if weights is None else functional_call(model, dict(weights), kwargs=inputs)
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits.reshape(-1, logits.shape[-1])


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    return embedding_weight(model).device


def mean_gradient(
    model: PreTrainedModel, names: Sequence[str], examples: Sequence[TokenizedExample], batch_size: int
) -> dict[str, Tensor]:
    """Gradient of the answers' mean negative log-likelihood a token, by weight.

    Args:
        model: In evaluation mode. It is not changed.
        names: Weights.
        examples: At least one.
        batch_size: Examples at once.

    Returns:
        Name -> gradient on the CPU, float32.

    Raises:
        TaskVectorError: A gradient is not finite.
    """
    tokens = sum(len(batch.targets_N) for batch in batches(examples, batch_size, device_of(model)))
    weights = unique_weights(model)[0]
    # Leaves that share the model's memory: its own parameters may be frozen and stay as they are.
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    sums = {name: torch.zeros(leaf.shape) for name, leaf in leaves.items()}
    for batch in batches(examples, batch_size, device_of(model)):
        nll_N = answer_nll(answer_logits(model, batch, leaves), batch.targets_N)
        gradients = torch.autograd.grad(nll_N.sum() / tokens, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:  # Else the loss doesn't depend on it: a bias that only chooses experts.
                sums[name] += gradient.float().cpu()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise TaskVectorError(f"the gradient of {name} holds NaN or infinity: load the model in float32")
    return sums
