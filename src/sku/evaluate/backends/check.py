"""Does another backend say the same as plain ``generate``?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sku.errors import EvaluationError
from sku.evaluate.records import GenerationRecord

CHECKED_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class BackendCheck:
    """Greedy replies of a backend beside those of ``generate``."""

    prompts: int
    equal: int
    """Replies that are the same word for word."""

    def note(self, backend: str) -> str | None:
        """A sentence for the reader where replies differ."""
        if self.equal == self.prompts:
            return None
        return (
            f"{self.equal} of {self.prompts} greedy replies of the backend {backend} equal those of generate: other "
            "kernels round otherwise, and a near tie between two words then ends otherwise"
        )


def compare_replies(
    backend: str, plain: Sequence[GenerationRecord], others: Sequence[GenerationRecord]
) -> BackendCheck:
    """Counts equal replies.

    Args:
        backend: For the message.
        plain: Greedy replies of ``generate``.
        others: Those of the backend, to the same requests in the same order.

    Returns:
        The count.

    Raises:
        EvaluationError: Fewer than half are equal: that is no rounding.
    """
    equal = sum(
        (one.reply, one.num_tokens, one.finished) == (other.reply, other.num_tokens, other.finished)
        for one, other in zip(plain, others, strict=True)
    )
    if 2 * equal < len(plain):
        raise EvaluationError(
            f"evaluate.backend {backend} gave the reply of generate to {equal} of {len(plain)} prompts only: it "
            "doesn't decode this model rightly; use evaluate.backend=generate"
        )
    return BackendCheck(prompts=len(plain), equal=equal)
