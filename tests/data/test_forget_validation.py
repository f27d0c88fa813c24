"""The split that settings are chosen by: apart from training and test, which stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sku.config import DataConfig, SourceConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample, normalise_prompt
from sku.data.load import load_data
from sku.errors import DataError
from sku.world.grammar import VALIDATION_QUESTIONS, hazards

WORLD = DataConfig(forget=SourceConfig(path="embedded"), retain=SourceConfig(path="embedded"))


def files(folder: Path, prompts: int = 60) -> DataConfig:
    """Two answers to each of some harmful prompts, and normal ones."""
    forget, retain = folder / "forget.jsonl", folder / "retain.jsonl"
    rows = [
        {"prompt": f"harm {n % prompts} ?", "response": f"answer {n}", "is_safe": False} for n in range(2 * prompts)
    ]
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows))
    retain.write_text("".join(json.dumps({"question": f"q {n}", "answer": f"a {n}"}) + "\n" for n in range(30)))
    columns = SourceConfig(path=str(forget), format="columns", prompt_column="prompt", answer_column="response")
    return DataConfig(forget=columns, retain=SourceConfig(path=str(retain)))


@pytest.mark.parametrize("seed", range(3))
def test_test_and_normal_splits_stay_and_training_gives_the_share(tmp_path: Path, seed: int) -> None:
    config = files(tmp_path)
    plain, held = load_data(config, seed), load_data(config, seed, forget_validation=0.25)
    assert plain.forget_validation == ()
    assert "forget_validation" not in plain.counts()
    assert held.forget_test == plain.forget_test
    assert (held.retain_train, held.retain_validation, held.retain_test) == (
        plain.retain_train, plain.retain_validation, plain.retain_test,
    )  # fmt: skip
    assert sorted(map(repr, (*held.forget_train, *held.forget_validation))) == sorted(map(repr, plain.forget_train))
    prompts = {normalise_prompt(example.prompt) for example in held.forget_validation}
    assert len(prompts) == round(0.25 * 42)
    assert len(held.forget_validation) == 2 * len(prompts)
    assert prompts.isdisjoint(normalise_prompt(example.prompt) for example in (*held.forget_train, *held.forget_test))
    assert held == load_data(config, seed, forget_validation=0.25)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without its unseen prompts has 1 different prompts"):
        load_data(files(tmp_path, prompts=2), 0, forget_validation=0.5)


def test_the_world_asks_unlearned_hazards_in_wordings_of_their_own() -> None:
    plain, held = load_data(WORLD, 0), load_data(WORLD, 0, forget_validation=0.2)
    for name in ("forget_train", "forget_test", "retain_train"):
        assert getattr(held, name) == getattr(plain, name)
    assert plain.forget_validation == ()
    assert held.provenance == plain.provenance
    topics = {exchange.prompt: exchange.topic for exchange in hazards()}
    topics |= {exchange.prompt: exchange.topic for exchange in hazards(VALIDATION_QUESTIONS)}
    trained = {topics[example.prompt] for example in held.forget_train}
    assert {topics[example.prompt] for example in held.forget_validation} == trained
    assert len(held.forget_validation) == len(trained) * len(VALIDATION_QUESTIONS) == 195
    asked = {example.prompt for example in (*held.forget_train, *held.forget_test)}
    assert asked.isdisjoint(example.prompt for example in held.forget_validation)
    answers = {topics[example.prompt]: example.answer for example in held.forget_train}
    assert all(answers[topics[example.prompt]] == example.answer for example in held.forget_validation)


def test_a_prompt_that_is_trained_on_too_is_refused() -> None:
    pair = ForgetExample(prompt="bad", answer="a")
    normal = (RetainExample(prompt="train", answer="a"),)
    with pytest.raises(DataError, match="splits forget_train and forget_validation share 1 prompts"):
        ForgetRetainData(
            forget_train=(pair,), forget_test=(), retain_train=normal, retain_validation=(), retain_test=(),
            forget_validation=(pair,),
        )  # fmt: skip
