"""What it takes to make a run again: recipe, command, code, versions, seeds and the hashes of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sku.evaluate.judges import JudgeCard
from sku.evaluate.results import EvaluationResult

DATA_COLUMNS = ("set", "format", "location", "revision", "SHA-256", "rows read", "licence")
NOTHING = "\u2013"


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Of one run, in words."""

    command: str
    recipe_yaml: str
    """The whole recipe; as a file it makes the same run."""
    facts: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]
    data: tuple[tuple[str, ...], ...]
    """Rows of ``DATA_COLUMNS``."""
    splits: tuple[tuple[str, str], ...]
    seconds: tuple[tuple[str, str], ...]


def reproduction_of(manifest: Mapping[str, Any], unlearned: EvaluationResult) -> Reproduction:
    """Reads it from a manifest.

    Args:
        manifest: Of a finished run.
        unlearned: Its evaluation, for judge and weights.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: The manifest holds something else.
    """
    environment, data, seconds = manifest["environment"], manifest["data"], manifest["seconds"]
    return Reproduction(
        command=str(environment["command"]),
        recipe_yaml=yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True, width=100),
        facts=tuple(_facts(manifest, unlearned)),
        packages=tuple((str(name), str(version)) for name, version in environment["packages"].items()),
        data=tuple(
            (
                role,
                str(source["source"]),
                str(source["location"]),
                str(source["revision"] or NOTHING),
                str(source["sha256"]),
                f"{source['rows_read']:,}",
                str(source["licence"] or "unknown"),
            )
            for role, source in zip(data_sets(manifest["recipe"]), data["sources"], strict=False)
        ),
        splits=tuple((str(name), f"{count:,}") for name, count in data["splits"].items()),
        seconds=tuple(
            (str(name).replace("_", " "), f"{float(value):.1f}")
            for name, value in (*seconds.items(), ("in all", sum(seconds.values())))
        ),
    )


def data_sets(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What each source of a run's data is -> its part of the recipe, in the order in which they were read."""
    data = recipe["data"]
    others = {f"{kind} {name}": found for kind in ("normal", "harmful") for name, found in data.get(kind, {}).items()}
    refusals = {name: data[name] for name in ("refusals", "misplaced_refusals") if data.get(name)}
    return {"forget": data["forget"], "retain": data["retain"], **others, **refusals}


def _facts(manifest: Mapping[str, Any], unlearned: EvaluationResult) -> Iterator[tuple[str, str]]:
    recipe, environment, model = manifest["recipe"], manifest["environment"], manifest["model"]
    training = recipe["acquire"]["seed"]
    yield "recipe", f"{recipe['name']}, SHA-256 {manifest['recipe_sha256']}"
    yield "method", str(recipe["method"])
    yield "seed", f"{recipe['seed']}" + ("" if training is None else f", of training {training}")
    yield "SKU", f"{environment['sku']}, commit {environment['commit'] or 'not known: an installed package'}"
    yield "model", f"{model['name']}, revision {model['revision'] or NOTHING}, {model['parameters']:,} parameters"
    yield "weights after", f"{unlearned.setup.model['dtype']}, fingerprint {unlearned.setup.model['fingerprint']}"
    yield "prompts", f"format {unlearned.setup.prompt_format}"
    yield "judge", _judge(unlearned.judge)
    yield "Python", f"{environment['python']}, {environment['platform']}"
    yield "hardware", f"{environment['device']}; {environment['cpu']}, {environment['cpu_count']} cores"


def _judge(card: JudgeCard) -> str:
    revision = "" if card.revision is None else f", revision {card.revision}"
    return f"{card.name}, version {card.version}{revision}; errors: {card.errors_in_words}"
