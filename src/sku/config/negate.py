"""Key ``negate``: stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sku.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class TwinShares:
    """Shares of the two models of ``acquire.twin: good`` in what is subtracted."""

    bad: float = 1.0
    good: float = 1.0

    def __post_init__(self) -> None:
        for name in ("bad", "good"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"negate.twin.{name} is {getattr(self, name)}; it must be 0 or more and finite")
        if not (self.bad or self.good):
            raise RecipeError("negate.twin is 0 for both twins: there is nothing to subtract")


@dataclass(frozen=True, kw_only=True)
class NegateConfig:
    """Stage 2: knowledge negation."""

    alpha: float | Literal["auto"] = 1.0
    """theta_u = theta_o - alpha * (theta_bad - theta_o); the paper uses 1. ``auto`` chooses it on held-out data, as
    ``sweep`` says; ``sku compare`` and ``sku ablate``, which try strengths of their own, then begin at 1."""
    twin: TwinShares = field(default_factory=TwinShares)
    """With ``acquire.twin: good`` theta_u = theta_o - alpha * (bad * (theta_bad - theta_o) - good * (theta_good -
    theta_o)); without it there is no good twin and both must be 1."""
    output_dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Type of the saved weights. bfloat16 rounds small updates away; the share that survived is recorded."""
    operators: tuple[Mapping[str, Any], ...] = ()
    """Applied to what stage 1 learned, one after the other, before it is subtracted: a list of one operator with its
    settings each, such as ``[{null_space: {energy: 0.9}}, {layers: {8-20: 1.0, rest: 0}}]``; the plain vector where
    it is empty. ``src/sku/negate/operators/`` holds one file for each; a path ending in ``.py`` is one of your own."""
    operator_cache: str | None = None
    """Private folder in which operators keep what depends on the original model and the data alone."""
    diagnostics: bool = True
    """Measure where the vector points (layers, rank, normal inputs, quantized formats) and write it into the
    manifest."""

    def __post_init__(self) -> None:
        if not abs(self.given_alpha) < float("inf"):
            raise RecipeError(f"negate.alpha is {self.alpha}; it must be a finite number, or auto")
        for place, entry in enumerate(self.operators):
            if len(entry) != 1:
                raise RecipeError(
                    f"negate.operators[{place}] names {len(entry)} operators; it must hold one name with its "
                    "settings, such as {null_space: {energy: 0.9}}"
                )

    @property
    def given_alpha(self) -> float:
        """``alpha`` where it is a number, else the paper's."""
        return 1.0 if self.alpha == "auto" else self.alpha

    @property
    def fits_operators(self) -> bool:
        """Whether an operator is fitted to harmful prompts that stage 1 must not train on."""
        return any("learned" in entry for entry in self.operators)
