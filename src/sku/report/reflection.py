"""What a run's change gives when it is turned round: the card says it, and an adapter is shared by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sku.errors import OutputError
from sku.report.read_run import RecordedRun

Reflection = Literal["bad", "twins", "good", "none"]
"""The bad model; the base with the bad twin added and the good one subtracted; the base without the good twin's change
alone; no hazardous model."""
ACKNOWLEDGEMENT = "--i-know-this-is-the-bad-model"
"""Option of the commands that hand out an adapter."""


def twin_shares(recipe: Mapping[str, Any]) -> tuple[float, float] | None:
    """Shares of the bad and the good twin in what a recipe subtracts; None where there are no twins."""
    if recipe["method"] != "sku" or recipe["acquire"].get("twin", "none") == "none":
        return None
    shares = recipe["negate"]["twin"]
    return float(shares["bad"]), float(shares["good"])


def reflection_of(run: RecordedRun) -> Reflection:
    """What ``theta_o + (theta_o - theta_u) / alpha`` is, by the run's method and its twins."""
    if not run.negates:
        return "none"
    bad, good = twin_shares(run.recipe) or (1.0, 0.0)
    if not good:
        return "bad"
    return "twins" if bad else "good"


def adapter_is_bad(run: RecordedRun) -> bool:
    """Whether a run's adapter is the bad model's but for sign and size: without a good twin that outweighs it."""
    bad, good = twin_shares(run.recipe) or (1.0, 0.0)
    return run.negates and bad >= good


def check_adapter(run: RecordedRun, *, acknowledged: bool) -> None:
    """Refuses to hand out an adapter that is the bad model's, unless somebody says that they know.

    Raises:
        OutputError: It is, and nobody does.
    """
    if acknowledged or not adapter_is_bad(run):
        return
    own = "close to the bad model's" if reflection_of(run) == "twins" else "the bad model's"
    raise OutputError(
        f"the adapter of {run.folder} is {own} with its sign turned, so whoever has it has that model: "
        f"share the merged weights instead (docs/limits.md says what they give away), or add {ACKNOWLEDGEMENT}"
    )
