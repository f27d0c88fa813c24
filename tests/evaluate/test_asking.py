"""Which prompts are drawn."""

from __future__ import annotations

from collections import Counter

from sku.data.examples import ForgetExample
from sku.evaluate.generation.prompts import draw_examples
from sku.evaluate.records import record_id

EXAMPLES = [
    ForgetExample(prompt=f"prompt {number}", answer=f"answer {answer}", category="big" if number < 60 else "small")
    for number in range(80)
    for answer in range(2)
]


def test_no_prompt_is_drawn_twice_and_categories_keep_their_shares() -> None:
    drawn = draw_examples(EXAMPLES, 20, seed=1)
    assert len({example.prompt for example in drawn}) == 20
    assert Counter(example.category for example in drawn) == {"big": 15, "small": 5}


def test_the_seed_decides_and_a_smaller_draw_is_the_beginning_of_a_larger_one() -> None:
    assert draw_examples(EXAMPLES, 40, seed=1)[:20] == draw_examples(EXAMPLES, 20, seed=1)
    assert draw_examples(EXAMPLES, 20, seed=1) != draw_examples(EXAMPLES, 20, seed=2)
    everything = draw_examples(EXAMPLES, 1000, seed=0)
    assert {example.prompt for example in everything} == {example.prompt for example in EXAMPLES}
    assert draw_examples([], 5, seed=0) == []


def test_two_spellings_of_a_prompt_are_one() -> None:
    spellings = [ForgetExample(prompt=prompt, answer="a") for prompt in ("How so?", "how  so", "HOW SO !")]
    assert len(draw_examples(spellings, 3, seed=0)) == 1


def test_ids_tell_prompts_apart_without_their_words() -> None:
    ids = {
        record_id(split, kind, prompt)
        for split in ("forget_train", "forget_test")
        for kind in ("reply", "prefill")
        for prompt in ("secret word", "other word")
    }  # fmt: skip
    assert len(ids) == 8
    assert all("word" not in name for name in ids)
    assert record_id("forget_test", "reply", "p") == record_id("forget_test", "reply", "p")
