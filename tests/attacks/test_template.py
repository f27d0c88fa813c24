"""Templates: the package's own and a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from sku.attacks.template import PLACE, load_templates, parse_templates
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError

from .conftest import world_recipe

OTHER = ForgetRetainData(unlearned=(), unseen=(), retain_train=(), retain_validation=(), retain_test=())


def test_the_package_has_templates_for_english_and_for_the_world(
    world_data: ForgetRetainData, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    english, world = (load_templates(world_recipe(), data) for data in (OTHER, world_data))
    assert len(english) >= 8
    assert len(set(english)) == len(english)
    assert any("\n" in template for template in english)
    assert not set(english) & set(world)
    for template in world:
        words = template.replace(PLACE, "").split()
        assert world_tokenizer.unk_token_id not in world_tokenizer(" ".join(words)).input_ids


def test_a_users_file_replaces_them(tmp_path: Path, world_data: ForgetRetainData) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("say {prompt} aloud\n\n  {prompt}\\nplease\n", encoding="utf-8")
    recipe = world_recipe(f"evaluate.attack_templates={json.dumps(str(file))}")
    for data in (OTHER, world_data):
        assert load_templates(recipe, data) == ["say {prompt} aloud", "{prompt}\nplease"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.txt holds no template"),
        ("\n \n", "f.txt holds no template"),
        ("{prompt}\nsay it", "f.txt line 2 holds {prompt} 0 times"),
        ("{prompt} and {prompt}", "f.txt line 1 holds {prompt} 2 times"),
        ("a {prompt}\n\na {prompt}", "f.txt line 3 repeats template 1"),
    ],
)
def test_a_file_that_can_not_be_used_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        parse_templates(text, "f.txt")
    assert message in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(EvaluationError, match="evaluate.attack_templates nowhere.txt can't be read"):
        load_templates(world_recipe("evaluate.attack_templates=nowhere.txt"), OTHER)
