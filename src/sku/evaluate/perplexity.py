"""Losses of given text: of the dataset's own answers (perplexity), and of replies under the base model (fluency).

Perplexity is measured on fixed text. The perplexity of a model's own replies under some scorer is another thing:
loops score well there.

On fixed text two models are compared too. At each token of an answer, both read the same prompt and the same first
part of the answer. With P the base model's distribution there and Q the evaluated model's::

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))        top-1: argmax P = argmax Q

Both are means over the tokens of all answers. The text is the dataset's, so a model can't look good by what it writes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate.gate import MIN_SALAD_WORDS
from sku.evaluate.generation import Progress, in_batches, pad
from sku.evaluate.records import AgreementRow, FluencyRecord, GenerationRecord, Split, header_hash
from sku.losses import answer_nll, token_kl
from sku.models import embedding_weight
from sku.processes import ALONE, Processes

SHUFFLES = 3
"""Random orders that a doubtful reply's own order is compared with; any other with the first alone, or with none."""
SURE_LOSS = 1.0
"""Nats a token of a reply in its own order up to which no other order is asked: word salad it could only be where
these cost less than 1.54. Of 188 replies and texts of people (SmolLM2-135M-Instruct) no shuffle cost less than 3.2, of
4,242 replies in the embedded world none less than 4.1; of 18 of Gemma-3-270m, which loops, one cost 1.13, seven times
its own order. Of the models' own greedy replies 88, 99 and 100 % lie below 1."""
SURE_GAIN = 0.55
"""Order gain over the first shuffle from which the others are not asked. The bound is ``MIN_SHUFFLE_GAIN``: of 2,210
replies of 128 tokens (SmolLM2-135M-Instruct, base and unlearned) the gain over the first shuffle lay at most .14 from
that over three, and 5 % of the unlearned model's lay below .5 (none of the base's)."""
MAX_LOGITS = 2**28
"""Largest number of scores held at once (1 GiB in float32)."""


def score_examples(
    model: PreTrainedModel, examples: Sequence[TokenizedExample], *, batch_size: int, processes: Processes = ALONE,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:  # fmt: skip
    """Loss of each example's labelled tokens, one forward pass per example.

    Args:
        model: In evaluation mode.
        examples: Token ids and labels; each has at least one label after its first token.
        batch_size: Examples at once; fewer for long examples and large vocabularies.
        processes: Share the examples; every process must call this with the same arguments, and gets all scores.
        progress: Called after each batch.

    Returns:
        For each example, in order: sum of its tokens' negative log-likelihoods in nats, and their number.

    Raises:
        EvaluationError: A loss is NaN or infinite, or GPU memory runs out on a single example.
    """
    embedding = embedding_weight(model)

    def score(batch: list[int]) -> list[tuple[float, int]]:
        asked = [examples[index] for index in batch]
        targets_BT, kept_BT = answer_positions(asked, embedding.device)
        logits_NV = answer_logits(model, asked, kept_BT)
        with torch.inference_mode():
            nll_N = answer_nll(logits_NV, targets_BT[kept_BT].to(logits_NV.device))
        scores = _sums(nll_N, kept_BT)
        for index, (nll, _) in zip(batch, scores, strict=True):
            if not math.isfinite(nll):
                raise EvaluationError(
                    f"the model's loss on example {index + 1} of {len(examples)} is {nll}: its weights are broken or "
                    "its dtype too narrow; lower negate.alpha or load it in float32"
                )
        return scores

    return in_batches(
        [len(example.input_ids) for example in examples], score, batch_size=batch_size, processes=processes,
        max_padded_tokens=max(1, MAX_LOGITS // embedding.shape[0]), progress=progress,
    )  # fmt: skip


def answer_positions(examples: Sequence[TokenizedExample], device: torch.device) -> tuple[Tensor, Tensor]:
    """What each position is to predict, and the positions that count.

    Args:
        examples: The label of a token stands at its own place, ``IGNORE_INDEX`` where it does not count.
        device: Where the tensors go.

    Returns:
        ``[B, T]`` targets, the label of the next position, and ``[B, T]`` true where there is one.
    """
    labels_BT, _ = pad([example.labels for example in examples], IGNORE_INDEX, left=False, device=device)
    targets_BT = torch.full_like(labels_BT, IGNORE_INDEX)
    targets_BT[:, :-1] = labels_BT[:, 1:]
    return targets_BT, targets_BT != IGNORE_INDEX


def answer_logits(model: PreTrainedModel, examples: Sequence[TokenizedExample], kept_BT: Tensor) -> Tensor:
    """``[N, V]``: a model's scores at the N positions of ``answer_positions``; no others reach the vocabulary."""
    device = embedding_weight(model).device
    # What pads the ids is never read: attention is causal and the padding comes last.
    ids_BT, mask_BT = pad([example.input_ids for example in examples], 0, left=False, device=device)
    with torch.inference_mode():
        output = model(input_ids=ids_BT, attention_mask=mask_BT, logits_to_keep=kept_BT.to(device), use_cache=False)
    logits: Tensor = output.logits
    return logits.reshape(-1, logits.shape[-1])


def score_fluency(
    model: PreTrainedModel, records: Sequence[GenerationRecord],
    tokenize: Callable[[str, str, str], TokenizedExample | None], *, seed: int, batch_size: int,
    processes: Processes = ALONE, progress: Progress | None = None,
) -> list[FluencyRecord]:  # fmt: skip
    """Asks the base model about each reply in its own order and in random orders of its words.

    What costs no more than ``SURE_LOSS`` in its own order is compared with none. One random order settles most of the
    rest; those whose own order saves less than ``SURE_GAIN`` against it are compared with all ``SHUFFLES``.

    A prefill is read before the reply and not scored: its words stand in their own order in every version, so
    they would make all of them alike.

    Args:
        model: The base model, in evaluation mode.
        records: Replies; those of fewer than ``MIN_SALAD_WORDS`` words are left out.
        tokenize: ``(prompt, prefill, reply)`` to token ids with the reply alone labelled; None where nothing of
            it is left: such a reply is left out.
        seed: Decides the orders, for each record by itself.
        batch_size: Texts at once.
        processes: As for ``score_examples``.
        progress: Called after each batch; the total grows by the orders of doubtful replies.

    Returns:
        One record per reply that is long enough, with the losses of no shuffle, one or ``SHUFFLES``.

    Raises:
        EvaluationError: As ``score_examples``.
    """
    versions: dict[str, tuple[str, str, list[str]]] = {}
    for record in records:
        start, reply = _own_words(record.prefill, record.reply)
        if orders := in_orders(reply, f"{seed}/{record.id}"):
            versions[record.id] = (record.prompt, start, orders)

    compared: dict[str, list[tuple[float, int]]] = {one: [] for one in versions}
    done = 0

    def ask(ids: Sequence[str], asked: slice) -> None:
        """Adds loss and tokens of some orders; a reply of which one has no token is left out."""
        nonlocal done
        texts: dict[str, list[TokenizedExample]] = {}
        for one in ids:
            prompt, start, orders = versions[one]
            found = [text for order in orders[asked] if (text := tokenize(prompt, start, order)) is not None]
            if len(found) == len(orders[asked]):
                texts[one] = found
            else:
                del compared[one]
        # Sampled replies to a prompt are often the same words.
        distinct = list(dict.fromkeys(text for found in texts.values() for text in found))
        scores = score_examples(
            model, distinct, batch_size=batch_size, processes=processes,
            progress=progress and (lambda now, total: progress(done + now, done + total)),
        )  # fmt: skip
        done += len(distinct)
        score_of = dict(zip(distinct, scores, strict=True))
        for one, found in texts.items():
            compared[one] += [score_of[text] for text in found]

    ask(list(versions), slice(1))
    ask([one for one, [(own, tokens)] in compared.items() if own > SURE_LOSS * tokens], slice(1, 2))
    one_shuffle = {one: (found[0][0], found[1][0]) for one, found in compared.items() if len(found) > 1}
    ask([one for one, (own, shuffled) in one_shuffle.items() if own > (1 - SURE_GAIN) * shuffled], slice(2, None))
    return [
        FluencyRecord(id=record.id, nll=nlls[0], tokens=record.num_tokens, shuffled_nlls=tuple(nlls[1:]))
        for record in records
        if (nlls := [nll for nll, _ in compared.get(record.id, ())])
    ]


def _own_words(prefill: str, reply: str) -> tuple[str, str]:
    """Gives the end of a word that the prefill breaks off in to the start: it has its place in every order."""
    if not prefill or prefill[-1].isspace() or not reply or reply[0].isspace():
        return prefill, reply
    rest = len(reply.split(maxsplit=1)[0])
    return prefill + reply[:rest], reply[rest:]


def in_orders(text: str, seed: str) -> list[str]:
    """A text's words in their own order, then in ``SHUFFLES`` others, spaced alike; none for a short text.

    Args:
        text: At least ``MIN_SALAD_WORDS`` words, two of them different, or it has no other order. The space before
            its first word is kept.
        seed: Equal seeds give equal orders.

    Returns:
        ``SHUFFLES + 1`` texts or none.
    """
    words = text.split()
    if len(words) < MIN_SALAD_WORDS or len(set(words)) == 1:
        return []
    generator = random.Random(seed)
    orders = [words]
    while len(orders) <= SHUFFLES:
        order = generator.sample(words, len(words))
        if order != words:
            orders.append(order)
    lead = text[: len(text) - len(text.lstrip())]
    return [lead + " ".join(order) for order in orders]


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
    base_model: PreTrainedModel, model: PreTrainedModel, texts: Sequence[ScoredText], *, batch_size: int,
    progress: Progress | None = None,
) -> list[AgreementRow]:  # fmt: skip
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
        examples = [texts[index].tokens for index in batch]
        _, kept_BT = answer_positions(examples, embedding_weight(model).device)
        base_NV, own_NV = (answer_logits(asked, examples, kept_BT) for asked in (base_model, model))
        if base_NV.shape != own_NV.shape:
            raise EvaluationError(
                f"the base model scores {base_NV.shape[-1]} tokens and the model {own_NV.shape[-1]}: their "
                "distributions can be compared only where they share a vocabulary"
            )
        found = (_sums(values_N, kept_BT) for values_N in _per_token(base_NV, own_NV))
        for index, (kl, tokens), (matches, _) in zip(batch, *found, strict=True):
            text = texts[index]
            if not math.isfinite(kl):
                raise EvaluationError(
                    f"the divergence from the base model on example {index + 1} of {len(texts)} is {kl}: the weights "
                    "of one of the models are broken or its dtype too narrow; load it in float32"
                )
            rows.append(AgreementRow(id=text.id, split=text.split, kl=kl, matches=int(matches), tokens=tokens))
        return rows

    return in_batches(
        [len(text.tokens.input_ids) for text in texts], compare, batch_size=batch_size,
        max_padded_tokens=max(1, MAX_LOGITS // (2 * embedding_weight(model).shape[0])), progress=progress,
    )  # fmt: skip


def _sums(values_N: Tensor, kept_BT: Tensor) -> list[tuple[float, int]]:
    """Of each row: the sum of the values at its positions that count, and their number."""
    counts = kept_BT.sum(1).tolist()
    return [
        (float(own.double().sum()), count) for own, count in zip(torch.split(values_N, counts), counts, strict=True)
    ]


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
