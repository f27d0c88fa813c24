"""Recipes: every key and type is checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

import sku
from sku.config import (
    EMBEDDED,
    AcquireConfig,
    Recipe,
    load_recipe,
    recipe_from_dict,
    recipe_names,
)
from sku.errors import RecipeError
from sku.methods.run import resolve_method
from sku.training.run import adapter_settings

TERMS = ("guided_distortion", "random_disassociation", "preservation_divergence")
RECIPES = Path(sku.__file__).parent / "recipes"
PAPER = ("opt-2.7b-paper", "llama-2-7b-paper", "llama-2-13b-paper")


def minimal() -> dict[str, Any]:
    return {
        "name": "mine",
        "model": {"path": "some/model"},
        "data": {"forget": {"path": "f.csv"}, "retain": {"path": "r.csv"}},
    }


def changed(key: str, value: Any) -> dict[str, Any]:
    content = minimal()
    node = content
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return content


def test_defaults_are_those_that_measured_best() -> None:
    """docs/results.md: ``divergence`` left 25 % of the exact answers on the embedded world, ``retention`` 99 %."""
    recipe = recipe_from_dict(minimal())
    assert recipe.acquire.preservation_mode == "retention"
    assert dataclasses.astuple(recipe.acquire.weights) == (1.0, 0.5, 1.0)
    assert recipe.acquire.random_answers == 5
    assert recipe.negate.alpha == 1.0
    assert not recipe.keep_bad_model


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_spell_out_what_is_the_papers(name: str) -> None:
    """No default decides them, so none that changes can."""
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["acquire"]
    # Depth is of a good twin, and framings are ours.
    others = {"tuning", "lora", "training", "seed", "check", "deep_refusal_fraction", "depth_tokens", "framed_share"}
    modules = {field.name for field in dataclasses.fields(AcquireConfig)} - others
    assert modules <= written.keys()
    assert written["weights"] == {
        "guided_distortion": 2.5, "random_disassociation": 2.5, "preservation_divergence": 1.0
    }  # fmt: skip
    assert (written["random_answers"], written["preservation_mode"]) == (5, "divergence")
    assert (written["twin"], written["normal_per_harmful"]) == ("none", 1)


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {*PAPER}))
def test_all_other_recipes_retain(name: str) -> None:
    found = load_recipe(name).acquire
    # Beside a good twin, which always retains, the bad one may be steered to refusals; none diverges without bound.
    assert found.preservation_mode == ("targeted" if found.twin == "good" else "retention")


@pytest.mark.parametrize(
    ("key", "value", "offending"),
    [
        ("sed", 1, "Did you mean seed?"),
        ("acquire.weights.guided_distorsion", 1, "Did you mean acquire.weights.guided_distortion?"),
        ("alpha", 1, "Did you mean negate.alpha or acquire.lora.alpha?"),
        ("evaluate.max_steps", 1, "acquire.training.max_steps"),
        ("data.forget.unsafe_column", "is_safe", "data.forget.unsafe_column"),
        ("seed", True, "seed"),
        ("keep_bad_model", "yes", "keep_bad_model"),
        ("negate.alpha", "much", "negate.alpha"),
        ("negate.alpha", float("nan"), "negate.alpha"),
        ("negate.alpha", -1.0, "negate.alpha"),
        ("acquire.tuning", "loar", "Did you mean lora?"),
        ("acquire.lora.target_modules", [1, 2], "acquire.lora.target_modules[0]"),
        ("acquire.weights", dict.fromkeys(TERMS, 0), "acquire.weights"),
        ("model", None, "model"),
        ("data", {"forget": {"path": "f.csv"}}, "data.retain is missing"),
        ("data.unseen_fraction", 0, "data.unseen_fraction"),
        ("data.max_answer_tokens", 512, "data.max_answer_tokens"),
        ("data.forget.limit", 0, "data.forget.limit"),
        ("evaluate.prefill_tokens", [3, 0], "evaluate.prefill_tokens[1]"),
        ("sweep.alphas", [0.5, 0.0], "sweep.alphas[1]"),
        ("sweep.utility_budget", 1.0, "sweep.utility_budget"),
        ("sweep.harm_target", 2.0, "sweep.harm_target"),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: Any, offending: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(changed(key, value), "mine.yaml")
    assert offending in str(caught.value)
    assert "(mine.yaml)" in str(caught.value)


@pytest.mark.parametrize("override", ["seed", "=3", "seed=[", "seed.sub=3"])
def test_wrong_overrides(override: str, tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(minimal() | {"seed": 1}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert override in str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 would read 2e-1 as text; 1 is an integer."""
    path = write(tmp_path, yaml.safe_dump(minimal()) + "negate:\n  alpha: 2e-1\nacquire:\n  preservation_cap: 1\n")
    recipe = load_recipe(path)
    assert recipe.negate.alpha == 0.2
    assert recipe.acquire.preservation_cap == 1.0
    assert isinstance(recipe.acquire.preservation_cap, float)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(minimal()))
    recipe = load_recipe(
        path,
        [
            "seed=3", "negate.alpha=2e-1", "acquire.training.max_steps=20", "acquire.preservation_cap=",
            "acquire.lora.target_modules=[q_proj, v_proj]", "data.forget.path=other=file.csv", "keep_bad_model=true",
            "seed=4",
        ],
    )  # fmt: skip
    assert recipe.seed == 4, "the last one holds"
    assert recipe.negate.alpha == 0.2
    assert recipe.acquire.training == {"max_steps": 20}
    assert recipe.acquire.preservation_cap is None
    assert recipe.acquire.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.data.forget.path == "other=file.csv"
    assert recipe.keep_bad_model
    assert recipe.data.retain.path == "r.csv"


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe file"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="must hold keys and values"):
        load_recipe(write(tmp_path, "- a\n- b\n"))
    with pytest.raises(RecipeError, match="is not YAML") as caught:
        load_recipe(write(tmp_path, "a: [1\nb: }"))
    assert "\n" not in str(caught.value)
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(
        RecipeError, match=r"no recipe named embeded\. Did you mean embedded or embedded-paper\? Known: "
    ):
        load_recipe("embeded")


def test_plain_data_and_back() -> None:
    recipe = recipe_from_dict(changed("acquire.lora.target_modules", ["q_proj"]))
    plain = recipe.to_dict()
    assert plain["acquire"]["lora"]["target_modules"] == ["q_proj"]
    assert plain["evaluate"]["prompts"] == 500
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(plain))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_can_be_run_as_it_is(name: str, tmp_path: Path) -> None:
    """Keys, types and values, those of transformers and PEFT included."""
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.description
    training = {key: value for key, value in recipe.acquire.training.items() if key not in ("bf16", "fp16", "tf32")}
    acquire = dataclasses.replace(recipe.acquire, training=training)
    settings = resolve_method(dataclasses.replace(recipe, acquire=acquire), tmp_path, device="cpu").training
    assert settings.max_steps > 0 or settings.num_train_epochs > 0
    assert isinstance(settings.learning_rate, float)
    assert (adapter_settings(recipe.acquire) is None) == (recipe.acquire.tuning == "full")


def test_alpha_is_a_number_or_auto() -> None:
    chosen = recipe_from_dict(changed("negate.alpha", "auto"))
    assert (chosen.negate.alpha, chosen.strength("sku"), chosen.chooses_alpha) == ("auto", 1.0, True)
    assert chosen.forget_validation == 0.2
    given = recipe_from_dict(changed("negate.alpha", 1.5))
    assert (given.strength("sku"), given.chooses_alpha, given.forget_validation) == (1.5, False, 0.0)
    other = recipe_from_dict(changed("negate.alpha", "auto") | {"method": "npo"})
    assert (other.chooses_alpha, other.forget_validation) == (False, 0.0)


def test_only_the_embedded_recipes_choose_alpha_and_other_papers_take_1() -> None:
    choosing = {name for name in recipe_names() if load_recipe(name).chooses_alpha}
    assert choosing == {EMBEDDED, "embedded-paper"}
    assert {load_recipe(name).negate.alpha for name in {*recipe_names()} - choosing if name.endswith("-paper")} == {
        1.0
    }
