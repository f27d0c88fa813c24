"""How far a model's next-token distributions are from the base model's, on fixed human text.

At each token of an answer, both models read the same prompt and the same first part of the answer. With P the base
model's distribution there and Q the evaluated model's::

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))        top-1: argmax P = argmax Q

Both are means over the tokens of all answers. The text is the dataset's, so a model can't look good by what it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku.data.tokens import TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate.batching import Progress, in_batches
from sku.evaluate.perplexity import MAX_LOGITS, answer_logits, answer_positions
from sku.evaluate.record_files import header_hash
from sku.evaluate.records import AgreementRow, Split, by_split
from sku.evaluate.results import BaseAgreement
from sku.evaluate.statistics import ratio_interval
from sku.losses import token_kl
from sku.models import embedding_weight

_COPIES = 6
"""Tensors of one size that are alive while a divergence is computed: scores, log-softmax and products."""


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """One answer of the dataset, as it is scored."""

    id: str
    split: Split
    tokens: TokenizedExample


def texts_hash(texts: Sequence[ScoredText]) -> str:
    """Hash of what is scored, for the header of the rows."""
    return header_hash({"texts": [(text.id, list(text.tokens.input_ids), list(text.tokens.labels)) for text in texts]})


def compare_distributions(
    base_model: PreTrainedModel,
    model: PreTrainedModel,
    texts: Sequence[ScoredText],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[AgreementRow]:
    """Compares two models on the answer tokens of texts, one forward pass each.

    Args:
        base_model: P, in evaluation mode.
        model: Q, in evaluation mode, with the same vocabulary.
        texts: Each with at least one label after its first token.
        batch_size: Texts at once; fewer for long texts and large vocabularies.
        progress: Called after each batch.

    Returns:
        One row per text, in order.

    Raises:
        EvaluationError: The vocabularies differ in size, a divergence is NaN or infinite, or GPU memory runs out on a
            single text.
    """

    def compare(batch: list[int]) -> list[AgreementRow]:
        rows = []
        found = _per_row(base_model, model, [texts[index].tokens for index in batch])
        for index, kl, matches, tokens in zip(batch, *found, strict=True):
            text = texts[index]
            if not math.isfinite(kl):
                raise EvaluationError(
                    f"the divergence from the base model on example {index + 1} of {len(texts)} is {kl}: the weights "
                    "of one of the models are broken or its dtype too narrow; load it in float32"
                )
            rows.append(AgreementRow(id=text.id, split=text.split, kl=kl, matches=matches, tokens=tokens))
        return rows

    return in_batches(
        [len(text.tokens.input_ids) for text in texts],
        compare,
        batch_size=batch_size,
        max_padded_tokens=max(1, MAX_LOGITS // (2 * embedding_weight(model).shape[0])),
        progress=progress,
    )


def agreement_of(rows: Sequence[AgreementRow], *, seed: int) -> dict[str, BaseAgreement]:
    """Means over all tokens of each split, with bootstrap intervals over its examples.

    Args:
        rows: From ``compare_distributions``.
        seed: Of the bootstrap.

    Returns:
        Split -> agreement.
    """
    found: dict[str, BaseAgreement] = {}
    for split, own in by_split(rows).items():
        tokens = [row.tokens for row in own]
        total = sum(tokens)
        kl_low, kl_high = ratio_interval([row.kl for row in own], tokens, seed=seed)
        top1_low, top1_high = ratio_interval([row.matches for row in own], tokens, seed=seed)
        found[split] = BaseAgreement(
            kl=math.fsum(row.kl for row in own) / total,
            kl_low=kl_low,
            kl_high=kl_high,
            top1=sum(row.matches for row in own) / total,
            top1_low=top1_low,
            top1_high=top1_high,
            tokens=total,
            examples=len(own),
        )
    return found


def _per_row(
    base_model: PreTrainedModel, model: PreTrainedModel, examples: Sequence[TokenizedExample]
) -> tuple[list[float], list[int], list[int]]:
    """Summed divergence, top-1 matches and tokens of each example."""
    _, kept_BT = answer_positions(examples, embedding_weight(model).device)
    base_NV, own_NV = (answer_logits(asked, examples, kept_BT) for asked in (base_model, model))
    if base_NV.shape != own_NV.shape:
        raise EvaluationError(
            f"the base model scores {base_NV.shape[-1]} tokens and the model {own_NV.shape[-1]}: their distributions "
            "can be compared only where they share a vocabulary"
        )
    kl_N, same_N = _per_token(base_NV, own_NV)
    counts = kept_BT.sum(1).tolist()
    kl = [float(row.double().sum()) for row in torch.split(kl_N, counts)]
    return kl, [int(row.sum()) for row in torch.split(same_N, counts)], counts


def _per_token(base_NV: Tensor, own_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence, and whether both put the same token first, at each position; a few positions at a time."""
    step = max(1, MAX_LOGITS // (_COPIES * own_NV.shape[-1]))
    divergences, same = [], []
    with torch.inference_mode():
        for base, own in zip(base_NV.split(step), own_NV.split(step), strict=True):
            reference = base.to(own.device)
            # Rounding can bring a divergence of nothing below zero.
            divergences.append(token_kl(reference, own).clamp_min(0))
            same.append(reference.argmax(-1) == own.argmax(-1))
    return torch.cat(divergences), torch.cat(same)
