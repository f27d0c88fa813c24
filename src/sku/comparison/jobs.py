"""What is run: one job for each row of the table and each seed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sku.config import MethodConfig, Recipe, TwinShares, plain_data
from sku.errors import RecipeError, did_you_mean
from sku.evaluate.results import EvaluationResult
from sku.from_file import SUFFIX, file_sha256
from sku.methods import METHODS, method_named
from sku.report.method_records import MethodRecord, Point, asked_of, tokens_of
from sku.reproducibility import content_sha256, environment

Kind = Literal["method", "base", "always_refuse", "always_gibberish", "random_direction"]
CONTROLS: dict[str, str] = {
    "base": "Base model",
    "always_refuse": "Always refuses",
    "always_gibberish": "Always gibberish",
    "random_direction": "Random direction",
}
"""Control rows, always there, with their titles."""
SKU_URL = "https://arxiv.org/abs/2402.10058"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table, trained with one seed."""

    name: str
    """Of the row: ``npo``, ``no_random_disassociation``, ``base``, ..."""
    title: str
    paper_url: str
    kind: Kind
    recipe: Recipe
    """With the row's method and settings, and the seed as ``acquire.seed``."""
    seed: int

    @property
    def id(self) -> str:
        """Name of the record's file without its ending."""
        return f"{self.name}--seed{self.seed}"


def comparison_jobs(recipe: Recipe, methods: Sequence[str] = (), seeds: int | None = None) -> list[Job]:
    """The jobs of ``sku compare``: controls that need no training, every method, then the random direction.

    Args:
        recipe: ``compare`` says what is left out here.
        methods: Names, or files that define one; those of the recipe, or all, where this is empty.
        seeds: Number of training seeds; that of the recipe if None.

    Returns:
        Jobs in the order in which they are run: all rows with the first seed, then with the next.

    Raises:
        RecipeError: An unknown method, or two of one name.
    """
    names = methods or recipe.compare.methods or [method.name for method in METHODS]
    chosen = {name: method_named(name) for name in names}
    rows = [
        (method.name, method.title, method.paper_url, _with_method(given, recipe.methods.get(method.name)))
        for given, method in chosen.items()
    ]
    twice = [row for row, count in Counter(row[0] for row in rows).items() if count > 1]
    if twice:
        raise RecipeError(f"two of the methods are named {twice[0]}: give the one of the file another name")
    # The other rows don't know the methods of files: to them their settings would be an unknown key.
    from_files = {method.name for given, method in chosen.items() if given.endswith(SUFFIX)}
    shared = {name: own for name, own in recipe.methods.items() if name not in from_files}
    return _jobs(dataclasses.replace(recipe, methods=shared), rows, recipe.compare.seeds if seeds is None else seeds)


def ablation_jobs(recipe: Recipe, groups: Sequence[str] = (), seeds: int | None = None) -> list[Job]:
    """The jobs of ``sku ablate``: SKU as the recipe has it, without each module, and with each other setting.

    Args:
        recipe: Of SKU.
        groups: Names of ``ABLATIONS``; all where this is empty.
        seeds: As in ``comparison_jobs``.

    Returns:
        As in ``comparison_jobs``.

    Raises:
        RecipeError: An unknown group, or a recipe of another method.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}; sku ablate takes SKU apart: set method sku")
    for group in groups:
        if group not in ABLATIONS:
            raise RecipeError(
                f"there is no ablation {group}.{did_you_mean(group, ABLATIONS)} Known: {', '.join(ABLATIONS)}"
            )
    rows: list[Row] = [("sku", "SKU, as the recipe", SKU_URL, lambda given: given)]
    for group in dict.fromkeys(groups or ABLATIONS):
        rows += [(name, title, SKU_URL, change) for name, title, change in ABLATIONS[group]]
    return _jobs(recipe, rows, recipe.compare.seeds if seeds is None else seeds)


Change = Callable[[Recipe], Recipe]
Row = tuple[str, str, str, Change]


def changed(recipe: Recipe, weights: Mapping[str, float] | None = None, **changes: Any) -> Recipe:
    """A recipe with other settings of stage 1, and other weights of its modules."""
    own = recipe.acquire
    acquire = dataclasses.replace(own, weights=dataclasses.replace(own.weights, **(weights or {})), **changes)
    return dataclasses.replace(recipe, acquire=acquire)


def _without(module: str) -> Change:
    def change(recipe: Recipe) -> Recipe:
        if module == "guided_distortion":  # The good twin learns its refusals by it.
            acquire = dataclasses.replace(recipe.acquire, twin="none")
            # In one step: shares are of twins.
            negate = dataclasses.replace(recipe.negate, twin=TwinShares())
            recipe = dataclasses.replace(recipe, acquire=acquire, negate=negate)
        return changed(recipe, {module: 0.0})

    return change


def _preservation(mode: str, cap: float | None, tokens: str) -> Change:
    def change(recipe: Recipe) -> Recipe:
        # Without its module a mode would change nothing.
        weights = {"preservation_divergence": recipe.acquire.weights.preservation_divergence or 1.0}
        return changed(recipe, weights, preservation_mode=mode, preservation_cap=cap, preservation_tokens=tokens)

    return change


def _random_answers(number: int) -> Change:
    return lambda recipe: changed(recipe, random_answers=number)


ABLATIONS: dict[str, list[tuple[str, str, Change]]] = {
    "modules": [
        ("no_guided_distortion", "without guided distortion", _without("guided_distortion")),
        ("no_random_disassociation", "without random disassociation", _without("random_disassociation")),
        ("no_preservation_divergence", "without preservation divergence", _without("preservation_divergence")),
    ],
    "preservation": [
        ("retention_answer", "retention, answer tokens", _preservation("retention", None, "answer")),
        ("retention_all", "retention, all tokens", _preservation("retention", None, "all")),
        ("divergence_capped", "divergence, capped at 1 nat", _preservation("divergence", 1.0, "answer")),
        ("divergence_uncapped", "divergence, no cap (paper)", _preservation("divergence", None, "answer")),
    ],
    "random_answers": [(f"k{number}", f"K = {number}", _random_answers(number)) for number in (1, 5, 10)],
}
"""Group -> rows: name, title, and what is changed in the recipe."""


def row_names() -> list[str]:
    """Names of all rows that the package knows, in the order of the tables: methods, ablations, controls."""
    ablations = [name for rows in ABLATIONS.values() for name, _, _ in rows]
    return [*(method.name for method in METHODS), *ablations, *CONTROLS]


def _with_method(given: str, own: MethodConfig | None) -> Change:
    """Sets the method, under the name that it was given by, which can be that of a file, with its own settings."""
    settings = {} if own is None else {method_named(given).name: own}
    return lambda recipe: dataclasses.replace(recipe, method=given, methods={**recipe.methods, **settings})


def _jobs(recipe: Recipe, rows: Sequence[Row], seeds: int) -> list[Job]:
    def control(kind: Kind, own: Recipe, seed: int) -> Job:
        own = changed(own, seed=seed)
        return Job(name=kind, title=CONTROLS[kind], paper_url="", kind=kind, recipe=own, seed=seed)

    first = recipe.seed if recipe.acquire.seed is None else recipe.acquire.seed
    kinds: tuple[Kind, ...] = ("base", "always_refuse", "always_gibberish")
    jobs = [control(kind, recipe, first) for kind in kinds]
    for seed in range(first, first + seeds):
        jobs += [
            Job(name=name, title=title, paper_url=url, kind="method", recipe=changed(own, seed=seed), seed=seed)
            for name, title, url, change in rows
            for own in (change(recipe),)
        ]
        # Takes the size of SKU's vector, whatever methods are compared.
        jobs.append(control("random_direction", dataclasses.replace(recipe, method="sku"), seed))
    return jobs


RECORD_VERSION = 3
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
    return content_sha256([dataclasses.asdict(recipe.acquire), recipe.method, *_transform(recipe).values()])


def _transform(recipe: Recipe) -> dict[str, str]:
    """A user's own file goes by its content: it can change under its name."""
    path = recipe.negate.transform
    return {} if path is None else {"transform": file_sha256(path)}


def _training_settings(job: Job) -> dict[str, Any]:
    """What decides a method's training and strength; the settings of other methods don't."""
    acquire = dataclasses.asdict(job.recipe.acquire)
    if job.recipe.method == "sku":
        return {"acquire": acquire, "alpha": job.recipe.negate.given_alpha, **_transform(job.recipe)}
    own = job.recipe.methods.get(job.name)
    shared = {name: acquire[name] for name in ("tuning", "lora", "training")}
    # A user's own file can change under its name.
    source = file_sha256(job.recipe.method) if job.recipe.method.endswith(SUFFIX) else job.recipe.method
    return {"method": source, "acquire": shared, "own": None if own is None else dataclasses.asdict(own)}


def record_of(
    job: Job,
    key: str,
    *,
    failure: str | None = None,
    data: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    result: EvaluationResult | None = None,
    points: Sequence[Point] = (),
) -> MethodRecord:
    """The record of a job; one that did not end well stays in the table, with the reason.

    Args:
        job: What was run.
        key: Of ``record_key``.
        failure: Why it failed, in one line; None where it is complete.
        data: An account of its data.
        training: An account of its training.
        result: An evaluation of what was asked at each of the points.
        points: What was measured.
    """
    return MethodRecord(
        name=job.name,
        title=job.title,
        method=method_named(job.recipe.method).name if job.kind == "method" else job.kind,
        paper_url=job.paper_url,
        control=job.kind != "method",
        seed=job.seed,
        status="complete" if failure is None else "failed",
        failure=failure,
        key=key,
        recipe=job.recipe.to_dict(),
        environment=environment(),
        data=data or {},
        training=training or {},
        asked={} if result is None else asked_of(result),
        tokens={} if result is None else tokens_of(result),
        points=tuple(points),
        judge={} if result is None else plain_data(result.judge),
    )
