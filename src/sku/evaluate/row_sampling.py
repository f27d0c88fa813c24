"""Drawn replies that don't depend on the batch: each row of a batch has its own random numbers.

``generate`` draws all rows of a batch from torch's one global generator, so that a reply would change with its
neighbours. Here the scores get Gumbel noise from the row's own generator, and the largest of them is taken: that is an
exact draw from their softmax (Gumbel-max; Maddison, Tarlow and Minka, NeurIPS 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper

_FIRST_LOOK = 512
"""Likeliest words among which the end of top-p is looked for first; sorting a whole vocabulary takes longer than a
small model takes for the scores."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How words are drawn."""

    temperature: float
    top_p: float
    seed: int

    def row_seed(self, request_id: str) -> int:
        """The seed of one reply: of the evaluation's seed and the request's id alone."""
        digest = hashlib.sha256(f"{self.seed}/{request_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1  # Backends take signed 64-bit numbers.

    def settings(self) -> dict[str, Any]:
        """What the drawn replies add to the decoding settings of an evaluation."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class RowSampler(LogitsProcessor):
    """Turns the greedy choice of ``generate`` into a draw: its hook ``logits_processor``, and nothing else of it.

    The n-th word of a reply takes the n-th noise vector of the row's generator, whatever else is in the batch.
    """

    def __init__(self, seeds: Sequence[int], drawing: Drawing, device: torch.device) -> None:
        """Begins the replies of one batch.

        Args:
            seeds: One a row, in the order of the rows.
            drawing: Temperature and top-p.
            device: Where the scores are.
        """
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = TemperatureLogitsWarper(float(drawing.temperature))
        self._top_p = drawing.top_p

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves out all rows but these places, whose generators go on where they are."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adds a row's noise to its scores ``[B, V]``, after temperature and top-p."""
        scores = self._temperature(input_ids, scores)
        if self._top_p < 1:
            scores = keep_top_p(scores, self._top_p)
        exponential_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(exponential_BV, self._generators, strict=True):
            row_V.exponential_(generator=generator)
        return scores - exponential_BV.log_()


def keep_top_p(scores_BV: Tensor, top_p: float) -> Tensor:
    """Leaves the likeliest words that hold a share of probability, the one that completes it included.

    Args:
        scores_BV: Logits.
        top_p: The share, above 0 and below 1.

    Returns:
        ``[B, V]``: the same logits, minus infinity for all other words. Words as likely as the last one that is kept
        stay too.

    Source: Holtzman et al., arXiv 1904.09751, nucleus sampling.
    """
    logsum_B1 = scores_BV.float().logsumexp(dim=-1, keepdim=True)
    size = scores_BV.shape[-1]
    looked = min(_FIRST_LOOK, size)
    while True:
        best_Bk = scores_BV.topk(looked, dim=-1).values
        mass_Bk = (best_Bk.float() - logsum_B1).exp().cumsum(dim=-1)
        if looked == size or bool((mass_Bk[:, -1] >= top_p).all()):
            break
        looked = min(8 * looked, size)
    # The first place where the share is reached; the last one where rounding keeps the sum below it.
    last_B1 = (mass_Bk < top_p).sum(dim=-1, keepdim=True).clamp(max=looked - 1)
    return scores_BV.masked_fill(scores_BV < best_Bk.gather(-1, last_B1), float("-inf"))
