"""Which rows a comparison and an ablation have, and what a run of one is."""

from __future__ import annotations

import dataclasses

import pytest

from sku.comparison import ABLATIONS, ablation_rows, comparison_rows, seeds_of
from sku.config import load_recipe
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
def test_a_run_chooses_its_strength(method: str) -> None:
    recipe = load_recipe("embedded-paper", ["negate.alpha=1.5", "evaluate.xstest=x.csv"])
    (row, random) = comparison_rows(recipe, [method])
    run = row.recipe_of(7)
    assert run.chooses_alpha
    assert (run.seed, run.acquire.seed) == (0, 7), "data and test prompts stay the same"
    assert (run.sweep.harm_target, run.evaluate.xstest) == (None, None)
    assert run.forget_validation > 0
    resolve_method(run)
    assert random.recipe_of(7).method == "sku"


def test_each_module_mode_and_number_of_answers_is_a_row() -> None:
    recipe = load_recipe("embedded-paper", ["acquire.weights.preservation_divergence=0"])
    rows = {row.name: row.recipe.acquire for row in ablation_rows(recipe)}
    assert [*rows] == ["sku", *(name for group in ABLATIONS.values() for name, _, _ in group), "random_direction"]
    for module in ("guided_distortion", "random_disassociation"):
        weights = dataclasses.asdict(rows["sku"].weights) | {module: 0.0}
        assert dataclasses.asdict(rows[f"no_{module}"].weights) == weights
    capped, retention = rows["divergence_capped"], rows["retention_all"]
    assert (capped.preservation_mode, capped.preservation_cap) == ("divergence", 1.0)
    assert (retention.preservation_mode, retention.preservation_tokens) == ("retention", "all")
    assert retention.weights.preservation_divergence == 1.0, "or a mode would change nothing"
    assert [rows[f"k{number}"].random_answers for number in (1, 5, 10)] == [1, 5, 10]


def test_rows_that_there_are_not() -> None:
    for make, settings, names, named in (
        (comparison_rows, (), ["nqo"], "nqo"),
        (comparison_rows, ("methods.rmuu.settings={}",), ["npo"], "methods.rmuu"),
        (ablation_rows, (), ["modes"], "modes"),
        (ablation_rows, ("method=npo",), [], "npo"),
    ):
        with pytest.raises(RecipeError, match=named):
            make(load_recipe("embedded-paper", settings), names)
