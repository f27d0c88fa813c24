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
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


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
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(drawing.temperature))]
        if drawing.top_p < 1:
            self._warpers.append(TopPLogitsWarper(drawing.top_p))

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves out all rows but these places, whose generators go on where they are."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adds a row's noise to its scores ``[B, V]``, after temperature and top-p."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        exponential_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(exponential_BV, self._generators, strict=True):
            row_V.exponential_(generator=generator)
        return scores - exponential_BV.log_()
