"""How the frozen original model is asked."""

from __future__ import annotations

from typing import Literal, get_args

from sku.errors import RecipeError

ReferenceMode = Literal["auto", "cache", "forward", "copy"]
"""``cache``: hidden states from one pass before training; ``forward``: the model with its adapter off, in each step;
``copy``: a second model, in each step; ``auto``: cache where it can be, else forward with an adapter and copy
without."""


def check_reference_mode(mode: str) -> None:
    """Refuses an unknown way.

    Raises:
        RecipeError: With the ways there are.
    """
    if mode not in get_args(ReferenceMode):
        raise RecipeError(f"reference is {mode!r}; it must be one of {', '.join(get_args(ReferenceMode))}")


def resolved_mode(mode: ReferenceMode, *, has_adapter: bool, no_cache: str) -> ReferenceMode:
    """The way that is taken.

    Args:
        mode: What is asked for.
        has_adapter: Whether the original weights are still there under an adapter.
        no_cache: Why there can't be a cache; empty where there can.

    Returns:
        Not ``auto``.

    Raises:
        RecipeError: What is asked for can't be.
    """
    if mode == "forward" and not has_adapter:
        raise RecipeError("reference is forward, which needs an adapter to switch off; full tuning has copy and cache")
    if mode == "copy" and has_adapter:
        raise RecipeError("reference is copy, but with an adapter the original is there already; use forward or cache")
    if mode == "cache" and no_cache:
        raise RecipeError(f"reference is cache, but {no_cache}; set reference to {_other(has_adapter)} or auto")
    if mode == "auto":
        return _other(has_adapter) if no_cache else "cache"
    return mode


def _other(has_adapter: bool) -> ReferenceMode:
    return "forward" if has_adapter else "copy"
