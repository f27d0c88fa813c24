"""Recipes: every key and type is checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

import sku
from sku.config import EMBEDDED, AcquireConfig, load_recipe, recipe_from_dict, recipe_names
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


@pytest.mark.parametrize(
    ("key", "value", "offending"),
    [
        ("sed", 1, "Did you mean seed?"),
        ("acquire.weights.guided_distorsion", 1, "Did you mean acquire.weights.guided_distortion?"),
        ("alpha", 1, "Did you mean negate.alpha or acquire.lora.alpha?"),
        ("evaluate.max_steps", 1, "acquire.training.max_steps"),
        ("seed", True, "seed"),
        ("negate.alpha", float("nan"), "negate.alpha"),
        ("negate.alpha", -1.0, "negate.alpha"),
        ("acquire.tuning", "loar", "Did you mean lora?"),
        ("acquire.lora.target_modules", [1, 2], "acquire.lora.target_modules[0]"),
        ("acquire.weights", dict.fromkeys(TERMS, 0), "acquire.weights"),
        ("model", None, "model"),
        ("data", {"forget": {"path": "f.csv"}}, "data.retain is missing"),
        ("data.max_answer_tokens", 512, "data.max_answer_tokens"),
        ("data.forget.limit", 0, "data.forget.limit"),
        ("data.forget.where", {"a": []}, "data.forget.where.a"),
        ("evaluate.prefill_tokens", [3, 0], "evaluate.prefill_tokens[1]"),
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


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(minimal()))
    recipe = load_recipe(
        path,
        [
            "seed=3", "negate.alpha=2e-1", "sweep.utility_budget=2", "acquire.training.max_steps=20",
            "acquire.preservation_cap=", "acquire.lora.target_modules=[q_proj, v_proj]",
            "data.forget.path=other=file.csv", "keep_bad_model=true", "seed=4",
        ],
    )  # fmt: skip
    assert recipe.seed == 4, "the last one holds"
    assert (recipe.negate.alpha, recipe.sweep.utility_budget) == (0.2, 2.0), "YAML 1.1 would read 2e-1 as text"
    assert recipe.acquire.training == {"max_steps": 20}
    assert recipe.acquire.preservation_cap is None
    assert recipe.acquire.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.data.forget.path == "other=file.csv"
    assert recipe.keep_bad_model
    assert recipe.data.retain.path == "r.csv"


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    for content in (b"- a\n- b\n", b"a: [1\nb: }", b"\xff\xfe\x00", None):
        path = tmp_path / "mine.yaml"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"mine\.yaml") as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="Did you mean embedded"):
        load_recipe("embeded")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_can_be_run_as_it_is(name: str) -> None:
    """Keys, types and values, those of transformers and PEFT included."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    if name not in PAPER:
        # Beside a good twin, which always retains, the bad one may be steered to refusals.
        assert recipe.acquire.preservation_mode == ("targeted" if recipe.acquire.twin == "good" else "retention")
    assert recipe.chooses_alpha == (name in (EMBEDDED, "embedded-paper"))
    training = {key: value for key, value in recipe.acquire.training.items() if key not in ("bf16", "fp16", "tf32")}
    acquire = dataclasses.replace(recipe.acquire, training=training)
    settings = resolve_method(dataclasses.replace(recipe, acquire=acquire), device="cpu").training
    assert settings.max_steps > 0 or settings.num_train_epochs > 0
    assert isinstance(settings.learning_rate, float)
    assert (adapter_settings(recipe.acquire) is None) == (recipe.acquire.tuning == "full")


def test_alpha_is_a_number_or_auto() -> None:
    chosen = recipe_from_dict(changed("negate.alpha", "auto"))
    assert (chosen.negate.alpha, chosen.strength, chosen.chooses_alpha) == ("auto", 1.0, True)
    assert chosen.forget_validation == 0.2
    given = recipe_from_dict(changed("negate.alpha", 1.5))
    assert (given.strength, given.chooses_alpha, given.forget_validation) == (1.5, False, 0.0)
