"""``sweep/sweep.json`` of a run whose alpha was chosen: every alpha that was measured, and the one that was picked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.metrics import Rate
from sku.evaluate.record_files import check_schema, read_json_object

SWEEP_FILE = Path("sweep") / "sweep.json"
_SCHEMA_VERSION = 2
_AGAIN = "run sku sweep again"


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One alpha; None where something was not measured."""

    alpha: float
    harmful: Rate | None
    """Of free replies to harmful prompts."""
    forced: Rate | None
    """After a prefill; of several lengths the one with most harm."""
    forced_tokens: int | None
    """That length."""
    degenerate: Rate | None
    over_refusal: Rate | None
    ratio: tuple[float, float, float] | None
    """Perplexity of normal answers as a multiple of the base's, with its 95 % interval."""
    unasked: str
    """Why the model was not asked, empty where it was."""

    @property
    def worst(self) -> Rate | None:
        """The larger of the two harmful rates."""
        rates = [rate for rate in (self.harmful, self.forced) if rate is not None]
        return max(rates, key=lambda rate: rate.value) if rates else None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All points, the base model as alpha 0 first, and what was made of them."""

    points: tuple[SweepPoint, ...]
    pick: float | None
    met: bool
    """Whether the pick does what was asked for; if not it is the nearest."""
    why: str
    notes: tuple[str, ...]


def read_sweep(path: Path) -> Sweep:
    """Reads ``sweep.json``.

    Raises:
        EvaluationError: The file is broken, of another version or of a sweep that is under way.
    """
    content = read_json_object(path, _AGAIN)
    check_schema(content, _SCHEMA_VERSION, str(path), _AGAIN)
    if content.get("pick") is None:
        raise EvaluationError(f"{path} is of a sweep that is not finished: {_AGAIN}, it goes on where it stopped")
    try:
        pick = content["pick"]
        points = [_point(point) for point in (content["base"], *content["points"])]
        return Sweep(
            points=tuple(sorted(points, key=lambda point: point.alpha)),
            pick=None if pick["alpha"] is None else float(pick["alpha"]),
            met=bool(pick["met"]),
            why=str(pick["why"]),
            notes=tuple(map(str, content["notes"])),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} doesn't fit its schema ({error!r}): {_AGAIN}") from None


def _point(plain: Mapping[str, Any]) -> SweepPoint:
    replies, perplexity = plain["replies"] or {}, plain["perplexities"].get("retain_validation")
    forced = {int(tokens): Rate(**rate) for tokens, rate in replies.get("forced", {}).items()}
    tokens = max(forced, key=lambda length: (forced[length].value, -length)) if forced else None
    return SweepPoint(
        alpha=float(plain["alpha"]),
        harmful=_rate(replies, "harmful"),
        forced=None if tokens is None else forced[tokens],
        forced_tokens=tokens,
        degenerate=_rate(replies, "degenerate"),
        over_refusal=_rate(replies, "over_refusal"),
        ratio=None
        if perplexity is None
        else (float(perplexity["value"]), float(perplexity["low"]), float(perplexity["high"])),
        unasked=str(plain["unasked"]),
    )


def _rate(replies: Mapping[str, Any], name: str) -> Rate | None:
    return Rate(**replies[name]) if replies else None
