"""What a sweep leaves: ``sweep.json``, which is written anew after every point, so that a killed sweep goes on.

Keys of the file:

- ``schema_version``, ``status`` (``running`` or ``complete``), ``key``: hash of all that decides a point's figures
  (original weights, task vector, prompts, decoding, judge). Points of a file with the same key are taken over, so that
  another rule, target or grid costs only what was not measured.
- ``model``, ``seed``, ``judge`` (its card), ``settings`` (the recipe's ``sweep``), ``asked`` (number of prompts of
  each kind), ``left_out`` (what could not be asked), ``notes`` (sentences that a reader of the figures needs).
- ``base``: the original model as a point with alpha 0.
- ``border``: where the utility budget binds: ``strength``, the largest alpha found within it, and ``bound_by``,
  what is beyond its limit a little above; null where nothing is, up to the largest alpha tried. The whole is null
  where alphas were given.
- ``points``: one an alpha that was asked for, from the smallest: ``alpha``; ``perplexities`` (normal set -> value,
  low, high: the perplexity of its answers over the base model's, with a bootstrap interval over examples) and ``kl``
  (normal set -> nats a token), both empty where the weights broke; ``cost`` (``value`` in shares of the budget, up to
  1 within it, and ``bound_by``, the worst part; null where the weights broke); ``replies`` (null where the model was
  not asked, ``unasked`` says why): ``harmful``, ``gibberish``, ``prefill`` and ``prefill_gibberish`` (by number of
  prefill tokens), ``over_refusal``, ``normal_gibberish``, ``exact_answer``, each count, total, value, low, high
  (Wilson, 95 %).
- ``not_measured``: given alphas after a hopeless one. ``spare``: points that an earlier call with the same key
  measured and this one did not ask for; the rule doesn't see them.
- ``pick``: ``alpha``, ``met``, ``why``, ``todo`` (what to set where it is not met); null while the sweep is running.

The file holds no text of a prompt or a reply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.config import SweepConfig, plain_data
from sku.errors import EvaluationError, NoAlphaError
from sku.evaluate.judges import JudgeCard
from sku.evaluate.record_files import check_schema, from_plain, read_json_object
from sku.evaluate.results import Line, Tabular
from sku.evaluate.utility_cost import Border
from sku.storage import write_json
from sku.sweep.rule import Pick, SweepPoint, cost_of

SWEEP_FILE = "sweep.json"
SCHEMA_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Sweep(Tabular):
    """A sweep, finished or under way."""

    key: str
    model: str
    seed: int
    judge: JudgeCard
    config: SweepConfig
    asked: Mapping[str, int]
    left_out: Mapping[str, int]
    base: SweepPoint
    border: Border | None = None
    notes: tuple[str, ...] = ()
    points: tuple[SweepPoint, ...] = ()
    spare: tuple[SweepPoint, ...] = ()
    not_measured: tuple[float, ...] = ()
    pick: Pick | None = None

    def lines(self) -> Iterator[Line]:
        """Each alpha, the original model's 0 first: rates of harm and of its cost, empty where it was not asked."""
        for point in (self.base, *self.points):
            found = point.replies
            prefills = () if found is None else found.prefill.values()
            yield {
                "alpha": point.alpha,
                "harmful": None if found is None else found.harmful.value,
                "worst prefill": max((one.value for one in prefills), default=None),
                "gibberish": None if found is None else found.gibberish.value,
                "refused, normal": None if found is None else found.over_refusal.value,
                "cost": cost_of(point, self.base, self.config).value if point.perplexities else None,
                "chosen": self.pick is not None and self.pick.alpha == point.alpha,
            }

    def to_dict(self) -> dict[str, Any]:
        """As ``sweep.json`` holds it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "status": "running" if self.pick is None else "complete",
            "key": self.key,
            "model": self.model,
            "seed": self.seed,
            "judge": plain_data(self.judge),
            "settings": plain_data(self.config),
            "asked": dict(self.asked),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "base": self.base.to_dict(),
            "border": None if self.border is None else dataclasses.asdict(self.border),
            "points": [{**point.to_dict(), "cost": self._cost(point)} for point in self.points],
            "spare": [point.to_dict() for point in self.spare],
            "not_measured": list(self.not_measured),
            "pick": None if self.pick is None else dataclasses.asdict(self.pick),
        }

    def _cost(self, point: SweepPoint) -> dict[str, Any] | None:
        return dataclasses.asdict(cost_of(point, self.base, self.config)) if point.perplexities else None

    def alpha(self) -> float:
        """The chosen alpha, or the nearest where ``sweep.if_none`` says so.

        Raises:
            NoAlphaError: None does what the rule asks for, and none may be taken instead.
        """
        pick = self.pick
        assert pick is not None, "the sweep is under way"
        if pick.alpha is None or not (pick.met or self.config.if_none == "nearest"):
            raise NoAlphaError(f"{pick.why}. To do: {pick.todo}")
        return pick.alpha


def read_sweep(path: Path, remedy: str) -> Sweep:
    """Reads a ``sweep.json``, that of a killed call too.

    Args:
        path: The file.
        remedy: What a user can do where it holds something else.

    Raises:
        EvaluationError: The file is missing, damaged or of another version of SKU.
    """
    content = read_json_object(path, remedy)
    check_schema(content, SCHEMA_VERSION, str(path), remedy)
    try:
        for point in content["points"]:
            point.pop("cost", None)  # It follows from the others.
        content["config"] = content.pop("settings")
        del content["schema_version"], content["status"]
        return from_plain(Sweep, content, str(path), remedy)
    except (AttributeError, KeyError, TypeError):
        raise EvaluationError(f"{path} is damaged: {remedy}") from None


def read_kept(folder: Path, key: str) -> Sweep | None:
    """The sweep of an earlier call in a folder; None where there was none, or it measured something else.

    Args:
        folder: With or without a ``sweep.json``.
        key: Of this sweep.

    Raises:
        EvaluationError: As ``read_sweep``.
    """
    path = folder / SWEEP_FILE
    found = read_sweep(path, "remove it and sweep again") if path.exists() else None
    return None if found is None or found.key != key else found


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes ``sweep.json``, the old one or the new one and never a part.

    Raises:
        OutputError: It can't be written.
    """
    write_json(folder / SWEEP_FILE, sweep.to_dict())
