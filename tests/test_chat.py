"""What a pair says, against the run's own evaluation and against stage 2."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Command, MadeOnce
from sku.chat import SIDES, Pair, Said, Side
from sku.errors import EvaluationError, RecipeError
from sku.evaluate.records import GENERATIONS_FILE, read_generations
from sku.world.grammar import normal_exchanges
from test_pipeline import LORA, once

PROMPT = "what colour is a florn ?"


@pytest.fixture(scope="module")
def adapter_run(made_once: MadeOnce) -> Path:
    return once(made_once, "lora_run", *LORA, "keep_bad_model=true").folder


@pytest.fixture(scope="module")
def whole_run(made_once: MadeOnce) -> Path:
    return once(made_once, "full_run").folder


@pytest.fixture(scope="module")
def adapter_pair(adapter_run: Path) -> Pair:
    return Pair(adapter_run, max_new_tokens=12)


@pytest.fixture(scope="module")
def whole_pair(whole_run: Path) -> Pair:
    return Pair(whole_run, max_new_tokens=12)


def said(pair: Pair, prompt: str = PROMPT, **options: Any) -> dict[Side, Said]:
    """What was said, checked against the words as they came."""
    texts: dict[Side, str] = {"base": "", "unlearned": ""}
    shown = 0

    def show(side: Side, text: str) -> None:
        nonlocal shown
        texts[side] += text
        shown += bool(text)

    found = pair.ask(prompt, show=show, **options)
    assert {side: one.reply for side, one in found.items()} == {side: text.strip() for side, text in texts.items()}
    assert shown >= len(found)
    return found


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_the_replies_are_those_of_the_evaluation(request: pytest.FixtureRequest, kind: str) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_run")
    pair = Pair(folder)
    for side in SIDES:
        evaluation = folder / "evaluation" / side
        outcomes = map(json.loads, (evaluation / "outcomes.jsonl").read_text(encoding="utf-8").splitlines())
        by_id = {row["id"]: row["outcome"] for row in outcomes if "outcome" in row}
        _, records = read_generations(evaluation / GENERATIONS_FILE)
        harmful = [one for one in records if one.kind == "reply" and one.split == "forget_test"]
        assert harmful
        for record in harmful:
            reply, outcome = said(pair, record.prompt)[side]
            assert reply == record.reply
            assert outcome == by_id[record.id]


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_alpha_0_is_the_base_and_the_models_are_as_before_afterwards(
    request: pytest.FixtureRequest, kind: str
) -> None:
    pair: Pair = request.getfixturevalue(f"{kind}_pair")
    before = said(pair)
    at_0 = said(pair, alpha=0)
    assert at_0["unlearned"] == at_0["base"] == before["base"]
    assert said(pair, alpha=40) != before
    assert said(pair) == before


def test_what_can_not_be_asked_is_said(
    adapter_pair: Pair, adapter_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in (" \n", "what " * 5000):
        with pytest.raises(EvaluationError, match="the prompt is"):
            said(adapter_pair, prompt)
    for alpha in (-1.0, float("nan")):
        with pytest.raises(RecipeError, match="alpha"):
            said(adapter_pair, alpha=alpha)
    for folder, judge in ((tmp_path, None), (adapter_run, "nobody")):
        with pytest.raises(EvaluationError, match=judge or "no run folder"):
            Pair(folder, judge=judge)
    assert said(adapter_pair)
    monkeypatch.setattr(adapter_pair, "strength", 0.0)
    with pytest.raises(EvaluationError, match="alpha of this run is 0"):
        said(adapter_pair, alpha=1)


def test_the_command_prints_both_sides(command: Command, adapter_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(command("chat", adapter_run, "--prompt", PROMPT, "--max-new-tokens", "12", "--json").out)
    assert set(found) == {"prompt", "alpha", "base", "unlearned"}
    code, out, _ = command("chat", adapter_run, "-p", PROMPT, "--max-new-tokens", "12", "--alpha", "0")
    assert (code, out.count(found["base"]["reply"])) == (0, 2)
    assert command("chat", adapter_run, "-p", PROMPT, "--alpha", "-1").code == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("/alpha -1\n/odd\n/alpha 0\n"))
    code, _, messages = command("chat", adapter_run)
    assert code == 0
    assert all(word in messages for word in ("-1", "/odd", "alpha 0"))


def test_a_judge_of_refusals_alone_does_not_call_the_rest_harmful(adapter_pair: Pair, adapter_run: Path) -> None:
    pair = Pair(adapter_run, judge="refusal_rules", max_new_tokens=40)
    normal = next(normal_exchanges())
    assert said(pair, normal.prompt)["base"] == (normal.answer, "not refused")
