"""What decides a job's figures, as one hash: a record whose hash is the same is not measured again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sku.comparison.jobs import Job
from sku.config import Recipe, plain_data
from sku.from_file import SUFFIX, file_sha256
from sku.reproducibility import content_sha256

RECORD_VERSION = 2
"""Raised whenever the same job could measure something else, so that cached records are not taken for it."""


def record_key(job: Job, inputs: Mapping[str, Any]) -> str:
    """Hash of all that decides what a job measures: settings, data, what the base model computes, seed.

    Args:
        job: What is run.
        inputs: What tells data and base model from others.

    Returns:
        Its SHA-256, in hexadecimal.
    """
    recipe = job.recipe.to_dict()
    measured = {name: recipe[name] for name in ("seed", "data", "evaluate")}
    if job.kind in ("method", "random_direction"):
        measured |= {"training": _training_settings(job), "points": recipe["compare"], "training_seed": job.seed}
        del measured["points"]["methods"], measured["points"]["seeds"]
        if job.recipe.compare.search is None:
            # Not in the keys of recipes without it, whose records stay as good as they were.
            del measured["points"]["search"]
        else:
            measured["asked_by_search"] = recipe["sweep"]
    return content_sha256(
        {
            "version": RECORD_VERSION,
            "kind": job.kind,
            "measured": measured,
            "inputs": dict(inputs),
            "prompt_format": job.recipe.model.prompt_format,
        }
    )


def norms_key(job: Job) -> str:
    """Hash of what decides SKU's change, and so its norms; jobs of equal hash share them."""
    recipe = job.recipe
    operators = [_operators(recipe)] if recipe.negate.operators else []
    return content_sha256([dataclasses.asdict(recipe.acquire), recipe.method, *operators])


def _operators(recipe: Recipe) -> Any:
    """A user's own file goes by its content: it can change under its name."""
    return plain_data(
        [
            {file_sha256(name) if name.endswith(SUFFIX) else name: settings for name, settings in entry.items()}
            for entry in recipe.negate.operators
        ]
    )


def _training_settings(job: Job) -> dict[str, Any]:
    """What decides a method's training and strength; the settings of other methods don't."""
    acquire = dataclasses.asdict(job.recipe.acquire)
    if job.recipe.method == "sku":
        # Not in the keys of recipes without operators, whose records stay as good as they were.
        operators = {"operators": _operators(job.recipe)} if job.recipe.negate.operators else {}
        return {"acquire": acquire, "alpha": job.recipe.negate.given_alpha, **operators}
    own = job.recipe.methods.get(job.name)
    shared = {name: acquire[name] for name in ("tuning", "lora", "training")}
    # A user's own file can change under its name.
    source = file_sha256(job.recipe.method) if job.recipe.method.endswith(SUFFIX) else job.recipe.method
    return {"method": source, "acquire": shared, "own": None if own is None else dataclasses.asdict(own)}
