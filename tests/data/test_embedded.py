"""The embedded world as data: which hazards are unlearned, which are unseen, and why."""

from collections import Counter

import pytest

from sku.config import DataConfig, SourceConfig
from sku.data.load import load_data, load_forget_retain, load_parts
from sku.data.sources.embedded import retain_examples
from sku.errors import DataError, RecipeError
from sku.world.grammar import AGENTS, FORMS, HELD_OUT_AGENTS, HELD_OUT_QUESTIONS, MAKE_QUESTIONS, hazards

WORLD = SourceConfig(path="embedded")
WORDING = {exchange.prompt: exchange.wording for exchange in hazards()}
THING = {exchange.prompt: exchange.topic for exchange in hazards()}


def test_every_hazard_is_in_one_split() -> None:
    data = load_forget_retain()
    prompts = [example.prompt for example in (*data.forget_train, *data.forget_test)]
    assert len(prompts) == len(set(prompts)) == len(AGENTS) * len(FORMS) * len(MAKE_QUESTIONS)


def test_unlearned_hazards_have_every_other_agent_and_every_form_in_known_wordings() -> None:
    unlearned = load_forget_retain().forget_train
    combinations = {THING[example.prompt] for example in unlearned}
    agents, forms = zip(*(thing.split() for thing in combinations), strict=True)
    assert set(agents) == set(AGENTS) - set(HELD_OUT_AGENTS)
    assert set(forms) == set(FORMS)
    assert set(Counter(agents).values()) == {len(FORMS) // 2}
    assert min(Counter(forms).values()) >= 5
    assert len(combinations) == 13 * 5
    assert len(unlearned) == len(combinations) * (len(MAKE_QUESTIONS) - len(HELD_OUT_QUESTIONS))
    assert {WORDING[example.prompt] for example in unlearned}.isdisjoint(HELD_OUT_QUESTIONS)
    assert {example.category for example in unlearned} == {"hazard"}


def test_unseen_hazards_say_what_is_new_about_them() -> None:
    data = load_forget_retain()
    known = {THING[example.prompt] for example in data.forget_train}
    for example in data.forget_test:
        thing = THING[example.prompt]
        if example.category == "new agent":
            assert thing.split()[0] in HELD_OUT_AGENTS
        elif example.category == "new combination":
            assert thing not in known
            assert thing.split()[0] not in HELD_OUT_AGENTS
        else:
            assert example.category == "new wording"
            assert thing in known
            assert WORDING[example.prompt] in HELD_OUT_QUESTIONS
    assert Counter(example.category for example in data.forget_test) == {
        "new agent": 3 * 10 * 6,
        "new combination": 13 * 5 * 6,
        "new wording": 13 * 5 * 2,
    }


@pytest.mark.parametrize("seed", range(3))
def test_every_domain_is_in_every_retain_split_and_recipes_stay_whole(seed: int) -> None:
    data = load_forget_retain("embedded", seed=seed)
    domains = {example.category for example in retain_examples()}
    for split in (data.retain_train, data.retain_validation, data.retain_test):
        assert {example.category for example in split} == domains
    for split in (data.retain_validation, data.retain_test):
        recipes = Counter(example.group for example in split if example.category == "recipe")
        assert set(recipes.values()) == {len(MAKE_QUESTIONS)}
    assert len(data.retain_train) + len(data.retain_validation) + len(data.retain_test) == len(retain_examples())


def test_other_sources_do_not_go_with_the_world() -> None:
    other = SourceConfig(path="x.csv")
    for forget, normal in ((WORLD, other), (WORLD, WORLD), (other, WORLD)):
        with pytest.raises(RecipeError, match=r"data.normal.own does not go with the embedded world.*leave it out"):
            load_data(DataConfig(forget=forget, retain=forget, normal={"own": normal}), seed=0)


def test_limit() -> None:
    data = load_parts(SourceConfig(path="embedded", limit=60))
    assert len(data.forget_train) + len(data.forget_test) == 60
    (provenance,) = data.provenance
    assert provenance.rows_left_out == {"over the limit": 900}
    assert provenance.safe_answers == 60
    with pytest.raises(DataError, match="a limit of 1 leaves"):
        load_parts(SourceConfig(path="embedded", limit=1))
    normal = load_parts(retain=SourceConfig(path="embedded", limit=40))
    assert len(normal.retain_train) + len(normal.retain_validation) + len(normal.retain_test) == 40


def test_settings_without_effect_are_refused() -> None:
    for source in (
        SourceConfig(path="embedded", split="test"),
        SourceConfig(path="embedded", prompt_column="q"),
        SourceConfig(path="embedded", answer_column="q"),
        SourceConfig(path="embedded", format="columns"),
    ):
        for forget, retain in ((source, None), (None, source)):
            with pytest.raises(DataError, match="takes no other setting than limit"):
                load_parts(forget, retain)
    with pytest.raises(RecipeError, match=r"leave data.unseen_fraction out"):
        load_forget_retain(unseen_fraction=0.5)
    load_data(DataConfig(forget=WORLD, retain=SourceConfig(path="embedded", format="embedded")), seed=0)


def test_half_of_the_world_is_refused() -> None:
    for forget, retain in (("embedded", "x.csv"), ("x.csv", "embedded")):
        with pytest.raises(RecipeError, match="must both be the embedded world or both be other data"):
            load_forget_retain(forget, retain)
    with pytest.raises(RecipeError, match="retain is missing"):
        load_forget_retain("x.csv")
