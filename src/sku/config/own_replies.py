"""Key ``data.own``: how a model's own replies are asked for and which are kept."""

from __future__ import annotations

from dataclasses import dataclass

from sku.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class OwnRepliesConfig:
    """Settings of ``sku data own``, and of a run that trains on the model's own replies."""

    draws: int = 3
    """Sampled replies to each harmful prompt, beside the greedy one."""
    max_new_tokens: int = 96
    """Longest reply; one that is cut there teaches no end."""
    refusals: int = 3
    """Refusals asked for and at most kept of each harmful prompt."""
    refuse_tokens: int = 48
    """Longest refusal."""
    repeat_share: float = 0.02
    """Share of the refusals that may read the same, case and spacing aside. A prompt keeps one all the same."""
    temperature: float = 0.8
    """Of sampled replies."""
    top_p: float = 0.95
    """Of sampled replies: words are drawn from the likeliest that hold this share of probability."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "refusals", "refuse_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} of own replies is {getattr(self, name)}; it must be 1 or more")
        if self.draws < 0:
            raise RecipeError(f"draws of own replies is {self.draws}; it must be 0 or more")
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"temperature of own replies is {self.temperature}; it must be above 0 and finite")
        for name in ("repeat_share", "top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"{name} of own replies is {getattr(self, name)}; it must be above 0 and at most 1")
