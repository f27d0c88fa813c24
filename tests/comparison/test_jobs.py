"""Which rows and seeds a comparison and an ablation run."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from sku.comparison.jobs import ABLATIONS, CONTROLS, ablation_jobs, comparison_jobs
from sku.pipeline.compare import plan_comparison

from sku.config import Recipe, load_recipe
from sku.errors import RecipeError
from sku.methods import METHODS
from sku.models import load_tokenizer


def test_every_method_and_control_with_every_seed() -> None:
    recipe = load_recipe("embedded", ["seed=5", "compare.seeds=2"])
    jobs = comparison_jobs(recipe)
    names = [job.name for job in jobs]
    assert names[:3] == ["base", "always_refuse", "always_gibberish"]
    assert names[3:] == 2 * [*(method.name for method in METHODS), "random_direction"]
    assert [job.seed for job in jobs] == [5] * 3 + [5] * 15 + [6] * 15
    assert all(job.recipe.acquire.seed == job.seed for job in jobs)
    assert {job.recipe.seed for job in jobs} == {5}, "data and test prompts stay the same"
    assert {job.name for job in jobs if job.kind != "method"} == set(CONTROLS)


def test_named_methods_once_each_and_in_their_order() -> None:
    jobs = comparison_jobs(load_recipe("embedded"), ["npo", "sku", "npo"], seeds=1)
    assert [job.name for job in jobs if job.kind == "method"] == ["npo", "sku"]
    assert [job.recipe.method for job in jobs if job.kind == "method"] == ["npo", "sku"]
    assert jobs[-1].recipe.method == "sku", "the random direction is as large as SKU's vector"


def test_the_methods_of_the_recipe() -> None:
    recipe = load_recipe("embedded", ["compare.methods=[dpo]"])
    assert [job.name for job in comparison_jobs(recipe, seeds=1) if job.kind == "method"] == ["dpo"]


def test_an_unknown_method() -> None:
    with pytest.raises(RecipeError, match="no method named nqo. Did you mean npo"):
        comparison_jobs(load_recipe("embedded"), ["nqo"])


def by_name(recipe: Recipe, *groups: str) -> dict[str, Recipe]:
    return {job.name: job.recipe for job in ablation_jobs(recipe, groups, seeds=1) if job.kind == "method"}


def test_each_module_is_left_out_once() -> None:
    recipe = load_recipe("embedded")
    rows = by_name(recipe, "modules")
    assert list(rows) == ["sku", "no_guided_distortion", "no_random_disassociation", "no_preservation_divergence"]
    whole = recipe.acquire.weights
    assert rows["sku"].acquire.weights == whole
    for name in ("guided_distortion", "random_disassociation", "preservation_divergence"):
        weights = rows[f"no_{name}"].acquire.weights
        assert getattr(weights, name) == 0
        others = {"guided_distortion", "random_disassociation", "preservation_divergence"} - {name}
        assert all(getattr(weights, other) == getattr(whole, other) > 0 for other in others)


def test_every_mode_of_preservation_and_every_k() -> None:
    rows = by_name(load_recipe("embedded"), "preservation", "random_answers")
    modes = {
        name: (row.acquire.preservation_mode, row.acquire.preservation_cap, row.acquire.preservation_tokens)
        for name, row in rows.items()
    }
    assert modes["divergence_uncapped"] == ("divergence", None, "answer")
    assert modes["divergence_capped"] == ("divergence", 1.0, "answer")
    assert modes["retention_all"] == ("retention", None, "all")
    assert modes["retention_answer"] == ("retention", None, "answer")
    assert [rows[f"k{number}"].acquire.random_answers for number in (1, 5, 10)] == [1, 5, 10]


def test_a_mode_is_shown_also_where_the_recipe_has_the_module_off() -> None:
    recipe = load_recipe("embedded", ["acquire.weights.preservation_divergence=0"])
    assert by_name(recipe, "preservation")["retention_all"].acquire.weights.preservation_divergence == 1.0


def test_all_groups_are_the_default_and_names_are_unique() -> None:
    names = [job.name for job in ablation_jobs(load_recipe("embedded"), seeds=1)]
    assert len(names) == len(set(names))
    assert {name for group in ABLATIONS.values() for name, _, _ in group} <= set(names)


def test_impossible_ablations() -> None:
    with pytest.raises(RecipeError, match="no ablation modes. Did you mean modules"):
        ablation_jobs(load_recipe("embedded"), ["modes"])
    with pytest.raises(RecipeError, match="method is npo; sku ablate takes SKU apart"):
        ablation_jobs(load_recipe("embedded", ["method=npo"]))


def test_rows_share_what_is_read_of_the_model(tmp_path: Path) -> None:
    """Each gets an adapter of its own all the same, or the second could not be added."""
    recipe = load_recipe("embedded", ["acquire.tuning=lora", "negate.alpha=1"])
    jobs = comparison_jobs(recipe, ["sku", "npo", "grad_diff"], seeds=1)
    with patch("sku.pipeline.checks.load_tokenizer", wraps=load_tokenizer) as read:
        plan = plan_comparison(jobs, recipe, tmp_path / "out", command="sku compare")
    assert read.call_count == 1
    assert plan.settings["steps"].keys() == {"sku", "npo", "grad_diff"}
