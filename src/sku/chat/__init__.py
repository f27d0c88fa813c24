"""Talking with a run: base and unlearned model answer the same prompt side by side, at any alpha."""

from sku.chat.pair import Pair, Side

__all__ = ["Pair", "Side"]
