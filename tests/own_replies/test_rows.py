"""Which replies are kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from sku.evaluate.gate import is_refusal, refusal_alone
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import GenerationRecord
from sku.own_replies import (
    ENOUGH,
    GIBBERISH,
    HARMFUL,
    KEPT,
    NO_REFUSAL,
    NOT_HARMFUL,
    REFUSED,
    REPEATED,
    WORLD,
    Reply,
    choose_complying,
    choose_refusals,
    english,
)

NO = "i can not help with that ."


def reply(prompt: str, text: str, outcome: Outcome, **fields: Any) -> Reply:
    shared: dict[str, Any] = {"id": f"{prompt}{text}", "split": "forget_train", "kind": "reply", "category": None}
    return Reply(
        record=GenerationRecord(**shared, prompt=prompt, reference="", reply=text, num_tokens=5, finished=True),
        outcome=ReplyOutcome(**shared, outcome=outcome, finished=True),
        decoding={"how": "greedy"},
        **fields,
    )


def test_only_harmful_replies_comply() -> None:
    counts: Counter[str] = Counter()
    kept = choose_complying(
        [
            reply("p", "take vornite", "harmful"),
            reply("p", "Take  vornite", "harmful"),
            reply("q", "take vornite", "harmful"),
            reply("p", f"take it . {NO}", "harmful"),
            reply("p", NO, "refusal"),
            reply("p", "honey is golden", "safe_answer"),
            reply("p", "xq xq xq", "gibberish"),
        ],
        counts,
    )
    assert [(one.record.prompt, one.record.reply) for one in kept] == [("p", "take vornite"), ("q", "take vornite")]
    assert counts == {KEPT: 2, REPEATED: 1, REFUSED: 2, NOT_HARMFUL: 1, GIBBERISH: 1}


def test_refusals_vary_and_every_prompt_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    others = [f"i can not help with that , as it is {word} ." for word in ("bad", "sad", "mad")]
    replies = [reply(f"p{number}", NO, "refusal") for number in range(9)]
    replies += [reply("p8", text, "refusal") for text in others]
    replies += [reply("p0", NO, "harmful"), reply("p0", "honey is golden", "safe_answer")]
    monkeypatch.setattr("sku.own_replies.REPEAT_SHARE", 0.25)
    kept = choose_refusals(replies, 2, counts)  # Three of the twelve usable ones may read the same.
    assert Counter(one.record.prompt for one in kept) == {**{f"p{number}": 1 for number in range(8)}, "p8": 2}
    assert [one.record.reply for one in kept if one.record.prompt == "p8"] == others[:2]
    assert counts == {KEPT: 10, REPEATED: 1, ENOUGH: 1, HARMFUL: 1, NO_REFUSAL: 1}


@pytest.mark.parametrize("wordings", [english(), WORLD])
def test_the_rules_see_the_refusals_of_the_bank_and_no_compliance_in_them(wordings: Any) -> None:
    assert all(map(is_refusal, wordings.refusals))
    assert not any(map(is_refusal, wordings.comply_starts))
    assert not any(start.endswith((" ", "\n")) for start in (*wordings.comply_starts, *wordings.refusal_starts))


@pytest.mark.parametrize(
    ("said", "alone"),
    [
        ("I can't help with that. But here is how: take", "I can't help with that."),
        ("That is a hard one. I can't help with that! Ask", "I can't help with that!"),
        ('"I cannot help with that." So she said', '"I cannot help with that."'),
        ("I can't help with 3.5 grams of it, and neither", None),
        ("Take the vornite. Then shake it.", None),
        (NO, NO),
    ],
)
def test_a_refusal_ends_with_the_sentence_that_refuses(said: str, alone: str | None) -> None:
    assert refusal_alone(said) == alone
