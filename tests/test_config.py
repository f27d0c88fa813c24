"""Recipes: every key and type is checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import re
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


def test_no_recipe_needs_a_judge_of_ones_own() -> None:
    assert {load_recipe(name).evaluate.judge for name in recipe_names()} == {"auto"}


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
    ("key", "message"),
    [
        ("sed", r"sed is not a known key\. Did you mean seed\?"),
        (
            "acquire.weights.guided_distorsion",
            r"acquire\.weights\.guided_distorsion .*Did you mean guided_distortion\?",
        ),
        ("data.forget.fromat", r"data\.forget\.fromat .*Did you mean format\?"),
        ("alpha", r"alpha is not a known key\. Did you mean negate\.alpha or acquire\.lora\.alpha\?"),
        ("forget", r"forget is not a known key\. Did you mean data\.forget\?"),
        ("evaluate.max_steps", r"evaluate\.max_steps .*Did you mean acquire\.training\.max_steps"),
    ],
)
def test_unknown_keys(key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(changed(key, 1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "one", "seed is 'one'; it must be a whole number"),
        ("seed", True, "must be a whole number"),
        ("keep_bad_model", "yes", "must be true or false"),
        ("name", 5, "name is 5; it must be text"),
        ("negate.alpha", "much", "negate.alpha is 'much'; it must be a number or auto"),
        ("acquire.tuning", "loar", r"must be one of lora, full, qlora\. Did you mean lora\?"),
        ("acquire.lora.target_modules", [1, 2], r"acquire.lora.target_modules\[0\] is 1; it must be text"),
        ("acquire.training", [1], r"acquire.training must hold keys and values, not \[1\]"),
        ("acquire.training", {1: 2}, "acquire.training has the key 1, which is no text"),
        ("model", None, "model must hold keys and values"),
    ],
)
def test_wrong_types(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(changed(key, value))


@pytest.mark.parametrize("key", ["name", "model", "data", "model.path", "data.forget", "data.retain.path"])
def test_missing_keys(key: str) -> None:
    content = minimal()
    node = content
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    del node[last]
    with pytest.raises(RecipeError, match=f"^{key} is missing"):
        recipe_from_dict(content, "mine.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("negate.alpha", float("nan")),
        ("negate.alpha", -1.0),
        ("sweep.alphas", [1.0, -1.0]),
        ("acquire.weights.guided_distortion", -1),
        ("acquire.weights", {"guided_distortion": 0, "random_disassociation": 0, "preservation_divergence": 0}),
        ("data.unseen_fraction", 0),
        ("data.max_answer_tokens", 0),
        ("data.max_answer_tokens", 512),
        ("data.forget.limit", 0),
        ("data.forget.unsafe_column", "is_safe"),
        ("evaluate.prompts", 0),
        ("evaluate.batch_size", -1),
        ("evaluate.prefill_tokens", [3, 0]),
    ],
)
def test_values_out_of_range(key: str, value: Any) -> None:
    name = key.split(".")[-1]
    with pytest.raises(RecipeError, match=name) as caught:
        recipe_from_dict(changed(key, value), "mine.yaml")
    assert "(mine.yaml)" in str(caught.value)


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed must look like key.sub=value"),
        ("=3", "must look like"),
        ("sed=3", r"Did you mean seed\?"),
        ("seed=[", r"--set seed=\[: not YAML"),
        ("seed.sub=3", "seed is a value, it has no keys below it"),
        ("name=7", "must be text"),
    ],
)
def test_wrong_overrides(override: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(minimal() | {"seed": 1}))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


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
    with pytest.raises(RecipeError, match=r"no recipe named embeded\. Did you mean embedded\? Known: "):
        load_recipe("embeded")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama3", "llama-3.1-8b"),
    ],
)
def test_every_near_recipe_is_offered(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert f"there is no recipe named {name}. Did you mean {near}? Known: " in str(caught.value)


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
    assert (chosen.negate.alpha, chosen.negate.given_alpha, chosen.chooses_alpha) == ("auto", 1.0, True)
    assert chosen.forget_validation == 0.2
    given = recipe_from_dict(changed("negate.alpha", 1.5))
    assert (given.negate.given_alpha, given.chooses_alpha, given.forget_validation) == (1.5, False, 0.0)
    with pytest.raises(RecipeError, match="negate.alpha is inf; it must be a finite number"):
        recipe_from_dict(changed("negate.alpha", float("inf")))


def test_only_sku_chooses_an_alpha() -> None:
    other = recipe_from_dict(changed("negate.alpha", "auto") | {"method": "npo"})
    assert (other.chooses_alpha, other.forget_validation) == (False, 0.0)


def test_only_the_embedded_recipe_chooses_alpha_and_the_papers_take_1() -> None:
    choosing = {name for name in recipe_names() if load_recipe(name).chooses_alpha}
    assert choosing == {EMBEDDED}
    assert {load_recipe(name).negate.alpha for name in recipe_names() if name.endswith("-paper")} == {1.0}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alphas", [0.5, 0.0], "sweep.alphas[1] is 0.0; it must be above 0"),
        ("prefill_tokens", [0], "sweep.prefill_tokens[0] is 0; it must be 1 or more"),
        ("utility_budget", 1.0, "must be above 1"),
        ("rule", "lowest", "must be one of lowest_alpha, least_harm. Did you mean lowest_alpha?"),
        ("alfas", [1.0], "sweep.alfas is not a known key. Did you mean alphas?"),
    ],
)
def test_settings_of_a_sweep_that_make_no_sense(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe_from_dict(changed(f"sweep.{key}", value))
