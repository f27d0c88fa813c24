"""The rows of a comparison: a recipe for each method, variant of SKU and control."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.config import CompareConfig, MethodConfig, Recipe, TwinShares
from sku.errors import RecipeError, did_you_mean
from sku.methods import METHODS, method_named

RANDOM_DIRECTION = Path(__file__).with_name("random_direction.py")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the tables."""

    name: str
    """``npo``, ``no_random_disassociation``, ``random_direction``, ..."""
    title: str
    recipe: Recipe
    """Of the first seed, with the row's method and settings."""
    control: bool = False
    """Whether the row is there to be compared with, not to be proposed."""

    def recipe_of(self, seed: int) -> Recipe:
        """Of one run: its strength is chosen, and that of the method as published is evaluated beside it.

        Sampled replies, attacks and what needs files or models of its own are left to a run without a comparison.
        """
        recipe = changed(self.recipe, seed=seed, check=False)
        name = method_named(recipe.method).name
        published = recipe.strength(name)
        if recipe.method == "sku":
            recipe = dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, alpha="auto"), methods={})
        else:
            own = recipe.methods.get(name, MethodConfig())
            recipe = dataclasses.replace(recipe, methods={name: dataclasses.replace(own, strength="auto")})
        return dataclasses.replace(
            recipe,
            compare=CompareConfig(published=published),
            sweep=dataclasses.replace(recipe.sweep, harm_target=None, if_none="nearest"),
            evaluate=dataclasses.replace(
                recipe.evaluate, samples=0, similarity_model=None, xstest=None, lm_eval=(), attacks=()
            ),
            keep_bad_model=False,
        )


def comparison_rows(recipe: Recipe, methods: Sequence[str] = ()) -> list[Row]:
    """The rows of ``sku compare``: every method, then the random direction.

    Args:
        recipe: ``compare`` says what is left out here.
        methods: Names, or files that define one; all where this is empty.

    Raises:
        RecipeError: An unknown method, or two of one name.
    """
    names = methods or [method.name for method in METHODS]
    found = {name: method_named(name) for name in names}
    twice = [name for name, count in Counter(method.name for method in found.values()).items() if count > 1]
    if twice:
        raise RecipeError(f"two of the methods are named {twice[0]}: give the one of the file another name")
    known = [*(method.name for method in METHODS), *(method.name for method in found.values())]
    for name in recipe.methods:
        if name not in known:
            raise RecipeError(f"methods.{name} is not a method.{did_you_mean(name, known)} Known: {', '.join(known)}")
    rows = [
        Row(name=method.name, title=method.title, recipe=dataclasses.replace(recipe, method=given))
        for given, method in found.items()
    ]
    return [*rows, _random_direction(recipe)]


def ablation_rows(recipe: Recipe, groups: Sequence[str] = ()) -> list[Row]:
    """The rows of ``sku compare --ablate``: SKU as the recipe has it, without each module, with each other setting.

    Args:
        recipe: Of SKU.
        groups: Names of ``ABLATIONS``; all where this is empty.

    Raises:
        RecipeError: An unknown group, or a recipe of another method.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}; --ablate takes SKU apart: set method sku")
    for group in groups:
        if group not in ABLATIONS:
            raise RecipeError(
                f"there is no ablation {group}.{did_you_mean(group, ABLATIONS)} Known: {', '.join(ABLATIONS)}"
            )
    rows = [Row(name="sku", title="SKU, as the recipe", recipe=recipe)]
    for group in dict.fromkeys(groups or ABLATIONS):
        rows += [Row(name=name, title=title, recipe=change(recipe)) for name, title, change in ABLATIONS[group]]
    return [*rows, _random_direction(recipe)]


def _random_direction(recipe: Recipe) -> Row:
    negate = dataclasses.replace(recipe.negate, transform=str(RANDOM_DIRECTION))
    own = dataclasses.replace(recipe, method="sku", negate=negate)
    return Row(name="random_direction", title="Random direction", recipe=own, control=True)


Change = Callable[[Recipe], Recipe]


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
