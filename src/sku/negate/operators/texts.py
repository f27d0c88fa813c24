"""Batches of tokenized examples, what a model says before an answer's tokens, and which positions tell of a text.

Positions are of two parts. ``shared`` ones tell no text from another: the first, whose input depends on one token
alone and can be a hundred times as long as others (the attention sink), all tokens that every prompt, harmful or
normal, begins with (chat template, system prompt), and those that every prompt ends with (generation prompt) but for
the last, where the answer begins. The others are the text's ``own``. Counted together, the shared ones would be the
largest part of every text and say nothing of it.

Where the positions that decide are asked for, the last tokens of the prompt count although all prompts
end with them: beyond the first layer their inputs hold what the model has read, and the reply begins from there.

Shapes: B = examples, T = tokens of the longest, N = answer tokens of all, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from sku.config.check import Count, validated
from sku.data.batches import JointCollator, PaddedRows, SourceRow
from sku.data.examples import RowType
from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll
from sku.models import embedding_weight
from sku.negate.matching import unique_weights

Part = Literal["own", "shared"]
DECISION_TOKENS = 8
"""Of the prompt's last tokens, and of the answer's first, where the positions that decide are asked for."""


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


def batch_of(examples: Sequence[TokenizedExample], device: torch.device) -> PaddedRows:
    """Pads examples to one batch.

    Args:
        examples: At least one.
        device: Where the tensors go.

    Returns:
        The batch. What pads the ids is never read: attention is causal and the padding comes last.
    """
    rows = [SourceRow(kind=RowType.RETAIN, example=place, tokens=example) for place, example in enumerate(examples)]
    laid_out = JointCollator().lay_out(rows, len(rows)).to(device)
    assert isinstance(laid_out, PaddedRows)
    return laid_out


def targets_of(batch: PaddedRows) -> Tensor:
    """``[N]``, the answers' tokens, row by row."""
    return batch.kept[RowType.RETAIN].targets_N


def batches(examples: Sequence[TokenizedExample], batch_size: int, device: torch.device) -> Iterator[PaddedRows]:
    """All examples, those of similar length together."""
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    for start in range(0, len(order), batch_size):
        yield batch_of(order[start : start + batch_size], device)


def answer_logits(model: PreTrainedModel, batch: PaddedRows, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Scores at the positions before the answers' tokens.

    Args:
        model: In evaluation mode.
        batch: The examples.
        weights: Stand in for the model's own of these names.

    Returns:
        ``[N, V]``.
    """
    inputs = {**batch.model_inputs, "use_cache": False}
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
    tokens = sum(len(targets_of(batch)) for batch in batches(examples, batch_size, device_of(model)))
    weights = unique_weights(model)[0]
    # Leaves that share the model's memory: its own parameters may be frozen and stay as they are.
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    sums = {name: torch.zeros(leaf.shape) for name, leaf in leaves.items()}
    for batch in batches(examples, batch_size, device_of(model)):
        nll_N = answer_nll(answer_logits(model, batch, leaves), targets_of(batch))
        gradients = torch.autograd.grad(nll_N.sum() / tokens, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:  # Else the loss doesn't depend on it: a bias that only chooses experts.
                sums[name] += gradient.float().cpu()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise TaskVectorError(f"the gradient of {name} holds NaN or infinity: load the model in float32")
    return sums


@validated
class InputSettings:
    """What counts as an input of normal text; shared by operators that look at inputs."""

    positions: Literal["all", "prompt", "answer", "decision"] = "all"
    """Token positions whose inputs are protected: ``all``, those of the ``prompt``, those before the ``answer``'s
    tokens, or those at which it is decided how to reply, the last ones of the prompt and the first of the answer. What
    every prompt begins or ends with (system prompt, chat template) is measured apart."""
    prompt_tokens: Count = DECISION_TOKENS
    """For ``decision``: how many of the prompt's last tokens, those of the chat template counted."""
    answer_tokens: Annotated[int, Field(ge=0)] = DECISION_TOKENS
    """For ``decision``: how many of the answer's first tokens."""
    unit: bool = False
    """Each input counts by its direction alone. Else a few tokens whose inputs are many times as long as others can
    be the whole trace of a layer."""
    examples: Count = 256
    """Most normal examples that are looked at, drawn by the seed."""
    other_weights: Literal["drop", "keep"] = "drop"
    """What becomes of the change of weights that are no linear layer's: embeddings, norms, biases."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens"):
            if self.positions != "decision" and getattr(self, name) != DECISION_TOKENS:
                raise RecipeError(f"{name} counts where positions is decision, and it is {self.positions}")


@dataclass(frozen=True, kw_only=True)
class SharedTokens:
    """What all prompts have in common, harmful and normal ones alike."""

    first: int
    """Tokens that each begins with; at least 1."""
    last: int
    """Tokens that each ends with, before the answer."""


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


def counted_positions(batch: PaddedRows, settings: InputSettings, shared: SharedTokens, part: Part) -> Tensor:
    """``[B, T]``, true where a position counts."""
    real_BT, answer_BT = batch.attention_mask == 1, batch.kept_RT
    places_T = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    last_B1 = answer_BT.int().argmax(1, keepdim=True)  # Of the prompt: the first that an answer is read from.
    shared_BT = (places_T < shared.first).expand_as(real_BT)
    if settings.positions == "decision":
        near_BT = (places_T > last_B1 - settings.prompt_tokens) & (places_T <= last_B1 + settings.answer_tokens)
        return real_BT & (shared_BT if part == "shared" else near_BT & ~shared_BT)
    shared_BT = shared_BT | ((places_T > last_B1 - shared.last) & (places_T < last_B1))
    asked_BT = {"all": real_BT, "answer": answer_BT, "prompt": real_BT & ~answer_BT}[settings.positions]
    return asked_BT & (shared_BT if part == "shared" else ~shared_BT)
