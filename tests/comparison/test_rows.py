"""Which rows a comparison and an ablation have, and what a run of one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sku.comparison import ABLATIONS, Row, ablation_rows, comparison_rows, seeds_of
from sku.config import Recipe, load_recipe
from sku.errors import RecipeError
from sku.methods import METHODS
from sku.methods.run import resolve_method


def test_rows_and_seeds_are_those_of_the_recipe_or_of_the_call() -> None:
    recipe = load_recipe("embedded-paper", ["seed=5"])
    assert [row.name for row in comparison_rows(recipe, ["npo", "sku", "npo"])] == ["npo", "sku", "random_direction"]
    every = comparison_rows(load_recipe("embedded-paper"))
    assert [row.name for row in every] == [*(method.name for method in METHODS), "random_direction"]
    assert [row.name for row in every if row.control] == ["random_direction"]
    assert list(seeds_of(recipe, 2)) == [5, 6]


@pytest.mark.parametrize("method", ["sku", "npo"])
def test_a_run_chooses_its_strength(method: str, tmp_path: Path) -> None:
    recipe = load_recipe("embedded-paper", ["negate.alpha=1.5", "evaluate.xstest=x.csv"])
    (row, random) = comparison_rows(recipe, [method])
    run = row.recipe_of(7)
    assert run.chooses_alpha
    assert (run.seed, run.acquire.seed) == (0, 7), "data and test prompts stay the same"
    assert (run.sweep.harm_target, run.evaluate.xstest) == (None, None)
    assert run.forget_validation > 0
    resolve_method(run, tmp_path)
    assert random.recipe_of(7).method == "sku"


def by_name(recipe: Recipe, *groups: str) -> dict[str, Row]:
    return {row.name: row for row in ablation_rows(recipe, groups) if not row.control}


def test_each_module_is_left_out_once() -> None:
    rows = by_name(load_recipe("embedded-paper"), "modules")
    whole = rows.pop("sku").recipe.acquire.weights
    for name, row in rows.items():
        left_out = name.removeprefix("no_")
        assert getattr(row.recipe.acquire.weights, left_out) == 0
        assert sum(row.recipe.acquire.weights != whole for row in rows.values()) == 3


def test_every_mode_of_preservation_and_every_k() -> None:
    rows = by_name(load_recipe("embedded-paper", ["acquire.weights.preservation_divergence=0"]))
    assert {name for group in ABLATIONS.values() for name, _, _ in group} < set(rows)
    modes = {
        name: (own.preservation_mode, own.preservation_cap, own.preservation_tokens)
        for name, own in ((name, row.recipe.acquire) for name, row in rows.items())
    }
    assert modes["divergence_uncapped"] == ("divergence", None, "answer")
    assert modes["divergence_capped"] == ("divergence", 1.0, "answer")
    assert modes["retention_all"] == ("retention", None, "all")
    assert rows["retention_all"].recipe.acquire.weights.preservation_divergence == 1.0, (
        "or a mode would change nothing"
    )
    assert [rows[f"k{number}"].recipe.acquire.random_answers for number in (1, 5, 10)] == [1, 5, 10]


@pytest.mark.parametrize(
    ("settings", "methods", "ablated", "named"),
    [
        ((), ("nqo",), None, "nqo"),
        (("methods.rmuu.settings={}",), ("npo",), None, "methods.rmuu"),
        ((), (), ("modes",), "modes"),
        (("method=npo",), (), (), "npo"),
    ],
)
def test_rows_that_there_are_not(
    settings: tuple[str, ...], methods: tuple[str, ...], ablated: tuple[str, ...] | None, named: str
) -> None:
    recipe = load_recipe("embedded-paper", settings)
    with pytest.raises(RecipeError, match=named):
        ablation_rows(recipe, ablated) if ablated is not None else comparison_rows(recipe, methods)
