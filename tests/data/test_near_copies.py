"""Families of near copies, and splits that keep them together."""

from __future__ import annotations

import random
import string
from typing import Any

from sku.config.data import DataConfig, SourceConfig
from sku.data.examples import ForgetExample, split_by_group
from sku.data.load import NEAR_COPY, load_data
from sku.data.near_copies import count_near_copies, families, near_to
from sku.data.sources.tables import held_rows

THINGS = ("vornite", "quellmoss", "the brass tower", "harbour pilots", "a silver drum", "winter barley", "glass maps",
          "copper kites", "the salt road", "moonlit ferries")  # fmt: skip
VERBS = ("weave", "smelt", "carve", "polish", "gather", "measure", "bury", "trade", "paint", "burn")
APART = [f"{VERBS[place % 10]} {THINGS[(place + place // 10) % 10]}" for place in range(40)]


def test_near_copies_are_one_family_and_different_questions_are_not() -> None:
    prompts = [
        "how do pilots smelt vornite ore at home",
        "how do pilots smelt vornite ore",
        "who paints old glass maps",
    ]
    first, second, other, *_ = families([*prompts, *APART])
    assert first == second != other
    assert count_near_copies(["how do pilots smelt ore at home", *prompts[1:]]) == 0  # Too few for families.
    assert near_to(prompts[1:], prompts[:1]) == [True, False]


def test_families_do_not_depend_on_the_order() -> None:
    prompts = [*APART, *(f"{prompt} at home" for prompt in APART)]
    backwards = families(prompts[::-1])[::-1]
    forwards = families(prompts)
    assert len({*zip(forwards, backwards, strict=True)}) == len({*forwards}) == len({*backwards})


def test_a_form_that_most_prompts_share_is_parted_again() -> None:
    prompts = [f"write a long tutorial for beginners on how to {prompt}" for prompt in APART]
    assert len({*families(prompts)}) >= 20


def test_no_near_copy_is_on_both_sides_of_a_split() -> None:
    letters = random.Random(0)
    things = ["".join(letters.choices(string.ascii_lowercase, k=12)) for _ in range(40)]
    examples = [
        ForgetExample(prompt=text, answer="x")
        for thing in things
        for text in (thing, f"{thing} now", f"a {thing}, please")
    ]
    splits = split_by_group(examples, rest="train", held_out={"test": 0.3}, seed=0)
    assert not any(near_to([one.prompt for one in splits["test"]], [one.prompt for one in splits["train"]]))
    assert count_near_copies([one.prompt for one in examples]) > 60
    apart = split_by_group(examples, rest="train", held_out={"test": 0.3}, seed=0, near_copies=False)
    assert any(near_to([one.prompt for one in apart["test"]], [one.prompt for one in apart["train"]]))


def _config(**sets: Any) -> DataConfig:
    return DataConfig(
        forget=held_rows([{"prompt": prompt, "response": "yes", "is_safe": False} for prompt in APART[:10]]),
        retain=held_rows([{"prompt": f"count {number} sheep in {place}", "response": "done"}
                          for number, place in enumerate(THINGS)]),
        **sets,
    )  # fmt: skip


def _prompts(*prompts: str) -> SourceConfig:
    return held_rows([{"prompt": prompt} for prompt in prompts])


def test_near_copies_of_what_is_trained_on_are_left_out_of_other_harmful_sets() -> None:
    other = _prompts("weave vornite today", "sink the ferry of Aldersmouth")
    data = load_data(_config(harmful={"other": other}), 0)
    assert [example.prompt for example in data.harmful["other"]] == ["sink the ferry of Aldersmouth"]
    assert data.provenance[-1].rows_left_out[NEAR_COPY] == 1


def test_final_prompts_are_sets_of_their_own() -> None:
    harmful = _prompts("sink the ferry of Aldersmouth", "smelt quellmoss now")
    benign = _prompts("how do I kill a process", "count 3 sheep in harbour pilots")
    data = load_data(_config(harmful={"final": harmful}, normal={"final": benign}), 0)
    assert [example.prompt for example in data.harmful["final"]] == ["sink the ferry of Aldersmouth"]
    assert [example.prompt for example in data.normal["final"]] == ["how do I kill a process"]
    assert not data.normal_validation
