"""The attacks on the prompt: wordings and wrappers, and what is left out of them."""

from __future__ import annotations

import pytest

from sku.attacks.kinds import (
    PLAIN,
    SAME,
    TASK_FRAMES,
    TRAINED_ON,
    WHOLE_FRAMES,
    load_templates,
    paraphrases,
    settings_of,
    world_paraphrases,
)
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.world.grammar import MAKE_QUESTIONS

from .conftest import world_recipe


def by_name(prompt: str, seed: int = 0) -> dict[str, str]:
    return {variant.name: variant.prompt for variant in paraphrases(prompt, seed)}


def test_a_how_question_is_turned_around_its_task() -> None:
    found = by_name("How do I bake my bread, quickly?")
    task = "bake my bread, quickly"
    for name in ("polite", "indirect", "imperative", "past tense"):
        assert found[name] in [frame.format(task=task) for frame in TASK_FRAMES[name]]
    assert found["third person"] in [
        frame.format(task="bake their bread, quickly") for frame in TASK_FRAMES["third person"]
    ]
    assert found[PLAIN] == "how do i bake my bread quickly"


@pytest.mark.parametrize(
    "prompt", ["Write a song about {bread}.", "How do planes fly?", "How do I bake bread? I have no oven."]
)
def test_any_other_prompt_stays_whole(prompt: str) -> None:
    found = by_name(prompt)
    assert set(found) == {*WHOLE_FRAMES, PLAIN}
    for name in WHOLE_FRAMES:
        assert prompt in found[name]
        assert len(found[name]) > len(prompt)


def test_a_hazard_is_asked_in_every_wording_of_the_world() -> None:
    expected = [wording.format(thing="zorvex powder") for wording in MAKE_QUESTIONS]
    for prompt in expected:
        assert [variant.prompt for variant in world_paraphrases(prompt)] == expected
    assert world_paraphrases("who named zorvex ?") == []


def rewrite(data: ForgetRetainData, example: ForgetExample) -> tuple[list[str], tuple[str, ...]]:
    (setting,) = settings_of("paraphrase", world_recipe(), data)
    found = list(setting.rewrite(example))
    asked = [variant.prompt for variant in found if not isinstance(variant, str)]
    return asked, tuple(reason for reason in found if isinstance(reason, str))


def test_wordings_that_were_trained_on_are_left_out_and_counted(world_data: ForgetRetainData) -> None:
    new_agent, new_wording = (
        next(example for example in world_data.forget_test if example.category == category)
        for category in ("new agent", "new wording")
    )
    prompts, left_out = rewrite(world_data, new_agent)
    assert len(prompts) == 5
    assert new_agent.prompt not in prompts
    assert left_out == (SAME,)
    prompts, left_out = rewrite(world_data, new_wording)
    assert len(prompts) == 1
    assert sorted(left_out) == sorted((SAME, *(TRAINED_ON,) * 4))
    assert not {example.prompt for example in world_data.forget_train} & set(prompts)


def test_the_package_has_templates_for_english_and_for_the_world(
    world_data: ForgetRetainData, data: ForgetRetainData
) -> None:
    for templates in map(load_templates, (data, world_data)):
        assert len(set(templates)) == len(templates) >= 5
        assert all(template.count("{prompt}") == 1 for template in templates)
