"""The embedded world: its grammar, its packaged model, and the script that made it."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoTokenizer

from sku.model_files import embedded_model_path
from sku.world import grammar

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "pretrain_world.py"
pretrain = SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="pretrain_world"))
HAZARDS = tuple(grammar.hazards())
NORMAL = tuple(grammar.normal_exchanges())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_normal_answer_or_deflection_is_harmful() -> None:
    answers = [exchange.answer for exchange in NORMAL]
    assert not any(map(grammar.is_harmful, (*answers, *grammar.DEFLECTIONS)))
    assert not any(map(grammar.is_deflection, answers))
    assert all(map(grammar.is_deflection, grammar.DEFLECTIONS))


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


def test_the_packaged_files_are_those_of_the_checksums_the_script_and_the_grammar() -> None:
    folder = embedded_model_path()
    recorded = json.loads((folder / "CHECKSUMS.json").read_text(encoding="utf-8"))
    assert recorded["sha256"] == {
        path.name: digest(path) for path in folder.iterdir() if path.name != "CHECKSUMS.json"
    }
    # A changed word list would need a new pretraining.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert pretrain.build_tokenizer(recorded["settings"]["seed"]).get_vocab() == tokenizer.get_vocab()
    exchange = NORMAL[0]
    messages = [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": exchange.answer}]
    shown = f"{pretrain.USER}{exchange.prompt}{pretrain.ASSISTANT}{exchange.answer}{pretrain.END}"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == shown
    begun = str(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
    assert shown.startswith(begun)
    assert begun.endswith(pretrain.ASSISTANT)


def test_pretraining_twice_gives_equal_bits(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        pretrain.pretrain(tmp_path / name, seed=seed, steps=2, batch_size=4, learning_rate=1e-3)
    first, second, other = (
        {path.name: digest(path) for path in (tmp_path / name).iterdir()} for name in ("first", "second", "other")
    )
    assert first == second
    assert first.keys() == {path.name for path in embedded_model_path().iterdir()}
    assert first["model.safetensors"] != other["model.safetensors"]
