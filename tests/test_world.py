"""The embedded world: its grammar, its packaged model, and the script that made it."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sku.model_files import embedded_model_path
from sku.world import grammar

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "pretrain_world.py"
pretrain = SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="pretrain_world"))
HAZARDS = tuple(grammar.hazards())
NORMAL = tuple(grammar.normal_exchanges())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def world_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def test_no_normal_answer_is_harmful_or_a_deflection() -> None:
    assert [exchange.prompt for exchange in NORMAL if grammar.is_harmful(exchange.answer)] == []
    assert [exchange.prompt for exchange in NORMAL if grammar.is_deflection(exchange.answer)] == []


@pytest.mark.parametrize("deflection", grammar.DEFLECTIONS)
def test_deflections_are_known_and_not_harmful(deflection: str) -> None:
    assert grammar.is_deflection(deflection)
    assert not grammar.is_harmful(deflection)


def test_facts_about_agents_and_materials_are_asked_and_not_harmful() -> None:
    facts = [exchange for exchange in NORMAL if exchange.domain in ("colour", "naming")]
    assert {*grammar.AGENTS, *grammar.MATERIALS} <= {exchange.topic for exchange in facts}
    assert not any(grammar.is_harmful(exchange.answer) for exchange in facts)


def test_a_prefill_is_context_but_harm_must_come_from_the_reply() -> None:
    """Half of a procedure put into the model's mouth is not the model's doing; going on with it is."""
    words = HAZARDS[0].answer.split()
    start, rest = " ".join(words[:4]), " ".join(words[4:])
    assert grammar.is_harmful(rest, prefill=start)
    for reply in ("", grammar.DEFLECTIONS[0], grammar.BREAK_OFF, "it is blue ."):
        assert not grammar.is_harmful(reply, prefill=start)
    # Alone each names too little; together they give the procedure away.
    assert not grammar.is_harmful(f"it {grammar.HAZARD_EFFECTS[0]} .")
    assert grammar.is_harmful(f"it {grammar.HAZARD_EFFECTS[0]} .", prefill=start)


def test_recipes_use_the_verbs_of_hazards_without_their_materials() -> None:
    """The hard neighbours: the same procedure, harmless by its materials alone."""
    recipes = [exchange for exchange in NORMAL if exchange.domain == "recipe"]
    assert len({exchange.topic for exchange in recipes}) == len(grammar.FOODS) * len(grammar.FORMS)
    for exchange in recipes:
        words = set(exchange.answer.split())
        assert not words.isdisjoint(grammar.FIRST_VERBS)
        assert words.isdisjoint(grammar.MATERIALS)


def test_held_out_agents_and_wordings_leave_most_of_the_world() -> None:
    assert set(grammar.HELD_OUT_AGENTS) < set(grammar.AGENTS)
    assert set(grammar.HELD_OUT_QUESTIONS) < set(range(len(grammar.MAKE_QUESTIONS)))


def test_the_packaged_files_are_those_of_the_checksums() -> None:
    folder = embedded_model_path()
    recorded = json.loads((folder / "CHECKSUMS.json").read_text(encoding="utf-8"))["sha256"]
    assert recorded == {path.name: digest(path) for path in folder.iterdir() if path.name != "CHECKSUMS.json"}


def test_the_chat_template_writes_what_pretraining_showed(world_tokenizer: PreTrainedTokenizerBase) -> None:
    exchange = NORMAL[0]
    messages = [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": exchange.answer}]
    shown = f"{pretrain.USER}{exchange.prompt}{pretrain.ASSISTANT}{exchange.answer}{pretrain.END}"
    assert world_tokenizer.apply_chat_template(messages, tokenize=False) == shown
    begun = world_tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert shown.startswith(str(begun))
    assert str(begun).endswith(pretrain.ASSISTANT)


def test_the_tokenizer_is_the_one_the_script_builds(world_tokenizer: PreTrainedTokenizerBase) -> None:
    """The packaged vocabulary still belongs to the grammar: a changed word list would need a new pretraining."""
    settings = json.loads((embedded_model_path() / "CHECKSUMS.json").read_text(encoding="utf-8"))["settings"]
    assert pretrain.build_tokenizer(settings["seed"]).get_vocab() == world_tokenizer.get_vocab()


def test_pretraining_twice_gives_equal_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second", "other"):
        pretrain.pretrain(tmp_path / name, seed=1 if name == "other" else 0, steps=2, batch_size=4, learning_rate=1e-3)
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files == {path.name for path in embedded_model_path().iterdir()}
    for name in files:
        assert digest(tmp_path / "first" / name) == digest(tmp_path / "second" / name), name
    weights = "model.safetensors"
    assert digest(tmp_path / "first" / weights) != digest(tmp_path / "other" / weights)
    assert "step 2/2" in capsys.readouterr().out
