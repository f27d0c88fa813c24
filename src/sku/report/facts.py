"""What a run's manifest says, in words: what it takes to make the run again, and what its task vector is like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sku.evaluate.judges import JudgeCard
from sku.evaluate.results import EvaluationResult
from sku.report.tables import NOTHING, percent

DATA_COLUMNS = ("set", "format", "location", "revision", "SHA-256", "rows read", "licence")
_FORMATS = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8", "nf4-sim": "NF4, simulated"}
Manifest = Mapping[str, Any]
Words = tuple[tuple[str, str], ...]
"""Name and value."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Of one run, in words."""

    command: str
    recipe_yaml: str
    """The whole recipe; as a file it makes the same run."""
    facts: Words
    packages: Words
    data: tuple[tuple[str, ...], ...]
    """Rows of ``DATA_COLUMNS``."""
    splits: Words
    seconds: Words


def reproduction_of(manifest: Manifest, unlearned: EvaluationResult) -> Reproduction:
    """Reads it from a manifest and, for judge and weights, from the run's evaluation.

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
                str(config.get("license") or source["licence"] or "unknown"),
            )
            for role, config, source in _data_sets(manifest)
        ),
        splits=tuple((str(name), f"{count:,}") for name, count in data["splits"].items()),
        seconds=tuple(
            (str(name).replace("_", " "), f"{float(value):.1f}")
            for name, value in (*seconds.items(), ("in all", sum(seconds.values())))
        ),
    )


def _data_sets(manifest: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """What each set of data is, its part of the recipe and its source, in the order in which they were read."""
    data = manifest["recipe"]["data"]
    others = {f"{kind} {name}": found for kind in ("normal", "harmful") for name, found in data.get(kind, {}).items()}
    refusals = {name: data[name] for name in ("refusals", "misplaced_refusals") if data.get(name)}
    sets = {"forget": data["forget"], "retain": data["retain"], **others, **refusals}
    for (name, config), source in zip(sets.items(), manifest["data"]["sources"], strict=False):
        yield name, config, source


def _facts(manifest: Manifest, unlearned: EvaluationResult) -> Iterator[tuple[str, str]]:
    recipe, environment, model = manifest["recipe"], manifest["environment"], manifest["model"]
    training, after = recipe["acquire"]["seed"], unlearned.setup
    yield "recipe", f"{recipe['name']}, SHA-256 {manifest['recipe_sha256']}"
    yield "method", str(recipe["method"])
    yield "seed", f"{recipe['seed']}" + ("" if training is None else f", of training {training}")
    yield "SKU", f"{environment['sku']}, commit {environment['commit'] or 'not known: an installed package'}"
    yield "model", f"{model['name']}, revision {model['revision'] or NOTHING}, {model['parameters']:,} parameters"
    yield "weights after", f"{after.model['dtype']}, fingerprint {after.model['fingerprint']}"
    yield "prompts", f"format {after.prompt_format}"
    yield "judge", _judge(unlearned.judge)
    yield "Python", f"{environment['python']}, {environment['platform']}"
    yield "hardware", f"{environment['device']}; {environment['cpu']}, {environment['cpu_count']} cores"


def _judge(card: JudgeCard) -> str:
    revision = "" if card.revision is None else f", revision {card.revision}"
    return f"{card.name}, version {card.version}{revision}; errors: {card.errors_in_words}"


@dataclass(frozen=True, kw_only=True)
class TaskVectorFacts:
    """Diagnostics of a run that subtracted a task vector: how long it is and where."""

    layers: Mapping[str, float]
    """Number of a decoder layer, or ``others`` -> Euclidean norm."""
    modules: Mapping[str, float]
    """Kind of module -> Euclidean norm."""
    facts: Words
    warning: str | None


def task_vector_facts(negation: Mapping[str, Any]) -> TaskVectorFacts | None:
    """Reads ``negation.diagnostics`` of a manifest; None where they were not measured.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: They hold something else.
    """
    found = negation.get("diagnostics")
    if found is None:
        return None
    facts = [("alpha", f"{float(negation['alpha']):g}"), ("Euclidean norm", f"{float(found['norm']):.4g}")]
    if found["relative_norm"] is not None:
        facts.append(("norm in units of the changed weights' own", percent(float(found["relative_norm"]))))
    if "normal_share" in found:
        share, expected = (percent(float(found[name])) for name in ("normal_share", "normal_share_of_directions"))
        facts.append(("energy in the main directions of normal inputs", f"{share} (a random vector has {expected})"))
    if "normal_cosine" in found:
        facts.append(("cosine with normal training", f"{float(found['normal_cosine']):+.3f}"))
    ranks = [float(rank) for rank in found["effective_rank"].values()]
    if ranks:
        facts.append(("effective rank of a weight's change", f"{min(ranks):.1f} to {max(ranks):.1f}"))
    return TaskVectorFacts(
        layers={str(name): float(norm) for name, norm in found["layers"].items()},
        modules={str(name): float(norm) for name, norm in found["modules"].items()},
        facts=tuple(facts),
        warning=None if found["warning"] is None else str(found["warning"]),
    )


def survival_rows(negation: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Reads ``negation.survival_by_format``: format, length kept along the vector, entries that still differ.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It holds something else.
    """
    return tuple(
        (_FORMATS.get(name, name), f"{100 * float(kept['projection']):.2f} %", percent(float(kept["changed"])))
        for name, kept in negation.get("survival_by_format", {}).items()
    )
