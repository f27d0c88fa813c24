"""Splits by prompt: disjoint, complete, the same everywhere, and near copies together."""

from __future__ import annotations

import dataclasses
import random
import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku.data.examples import (
    ForgetExample,
    ForgetRetainData,
    RetainExample,
    check_disjoint,
    content_hash,
    normalise_prompt,
)
from sku.data.splits import draw_prompts, families, near_to, split_by_group
from sku.errors import DataError

SHARES = {"validation": 0.1, "test": 0.2}


def example(number: int, category: str | None = None, answer: str = "a") -> RetainExample:
    return RetainExample(prompt=f"question {number}", answer=answer, category=category)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from([None, *"abcdefgh"]),
            st.sampled_from([None, "x", "y"]),
            st.sampled_from(["question {}", "  QUESTION {}?", "Question: {}!"]),
        ),
        max_size=80,
    ),
    seed=st.integers(0, 5),
    validation=st.floats(0.01, 0.4),
    test=st.floats(0.01, 0.5),
)
def test_splits_are_disjoint_complete_and_in_order(
    rows: list[tuple[int, str | None, str | None, str]], seed: int, validation: float, test: float
) -> None:
    examples = [
        RetainExample(prompt=form.format(number), answer=str(index), category=category, group=group)
        for index, (number, group, category, form) in enumerate(rows)
    ]
    try:
        splits = split_by_group(examples, rest="train", held_out={"validation": validation, "test": test}, seed=seed)
    except DataError:
        assert len({normalise_prompt(row.prompt) for row in examples}) < 30
        return
    assert list(splits) == ["train", "validation", "test"]
    assert all(splits.values())
    check_disjoint(dict(splits))
    assert Counter(row for part in splits.values() for row in part) == Counter(examples)
    for part in splits.values():
        numbers = [int(row.answer) for row in part]
        assert numbers == sorted(numbers)


def test_the_same_split_whatever_pythons_hash_seed() -> None:
    """Each run of the tests has another one. The numbers are those of the first version that split so."""
    rows = [RetainExample(prompt=f"q {n}", answer="a", group=f"g {n // 2}", category=str(n % 3)) for n in range(60)]
    splits = split_by_group(draw_prompts(rows, 50, 4), rest="train", held_out={"a": 0.2, "b": 0.2}, seed=4)
    assert [int(row.prompt.split()[1]) for row in splits["a"]] == [0, 1, 4, 5, 20, 21, 28, 42, 56, 57]


def test_shares_are_of_groups_and_of_each_category() -> None:
    copies = [example(number, answer=str(copy)) for number in range(50) for copy in range(1 + number % 3)]
    splits = split_by_group(copies, rest="train", held_out=SHARES, seed=0)
    groups = {name: len({normalise_prompt(row.prompt) for row in part}) for name, part in splits.items()}
    assert groups == {"train": 35, "validation": 5, "test": 10}
    of_kinds = [example(number, category="large" if number < 80 else "small") for number in range(100)]
    for seed in range(10):
        test = split_by_group(of_kinds, rest="train", held_out=SHARES, seed=seed)["test"]
        assert Counter(row.category for row in test) == {"large": 16, "small": 4}


def test_too_few_groups_are_an_error() -> None:
    for count in range(3):
        examples = [example(number, answer=str(copy)) for number in range(count) for copy in range(9)]
        with pytest.raises(DataError, match=f"the data x has {count} "):
            split_by_group(examples, rest="train", held_out=SHARES, seed=0, what="the data x")
    assert all(split_by_group([*map(example, range(3))], rest="train", held_out=SHARES, seed=0).values())


def test_limit_keeps_whole_prompts_and_grows_by_adding() -> None:
    examples = [ForgetExample(prompt=f"q{number % 10}", answer=str(number)) for number in range(30)]
    few, more = draw_prompts(examples, 3, seed=1), draw_prompts(examples, 6, seed=1)
    assert (len(few), len({row.prompt for row in few})) == (9, 3)
    assert set(few) < set(more)
    assert few == [row for row in examples if row in few]
    assert draw_prompts(examples, 99, seed=1) == draw_prompts(examples, None, seed=1) == examples
    assert draw_prompts(examples, 3, seed=2) != few


THINGS = ("vornite", "quellmoss", "the brass tower", "harbour pilots", "a silver drum", "winter barley", "glass maps",
          "copper kites", "the salt road", "moonlit ferries")  # fmt: skip
VERBS = ("weave", "smelt", "carve", "polish", "gather", "measure", "bury", "trade", "paint", "burn")
APART = tuple(f"{VERBS[place % 10]} {THINGS[(place + place // 10) % 10]}" for place in range(40))


def test_near_copies_are_one_family_and_different_questions_are_not() -> None:
    prompts = ("how do pilots smelt vornite ore at home", "how do pilots smelt vornite ore", "who paints glass maps")
    first, second, other, *_ = families((*prompts, *APART))
    assert first == second != other
    assert near_to(prompts[1:], prompts[:1]) == (True, False)
    # A form that most prompts share is parted again.
    assert len({*families(tuple(f"write a long tutorial for beginners on how to {prompt}" for prompt in APART))}) >= 20


def test_no_near_copy_is_on_both_sides_of_a_split() -> None:
    letters = random.Random(0)
    things = ["".join(letters.choices(string.ascii_lowercase, k=12)) for _ in range(40)]
    texts = [text for thing in things for text in (thing, f"{thing} now", f"a {thing}, please")]
    examples = [ForgetExample(prompt=text, answer="x") for text in texts]
    for together in (True, False):
        splits = split_by_group(examples, rest="train", held_out={"test": 0.3}, seed=0, near_copies=together)
        held_out, trained = (tuple(one.prompt for one in splits[name]) for name in ("test", "train"))
        assert any(near_to(held_out, trained)) != together


def test_prompts_that_differ_in_writing_alone_are_the_same() -> None:
    for one, other in (("What is rain?", "  what IS   rain "), ("Straße", "STRASSE"), ("caf\u00e9", "cafe\u0301"),
                       ("a_b-c", "A B C"), ("full\uff57idth", "fullwidth")):  # fmt: skip
        assert normalise_prompt(one) == normalise_prompt(other)
    # The first are Hindi syllables that differ in their vowel sign.
    for one, other in (("\u0915\u093f", "\u0915\u0940"), ("?!", "..."), ("\U0001f600", "\U0001f622")):
        assert normalise_prompt(one) != normalise_prompt(other)


BAD, GOOD = (ForgetExample(prompt="How so?", answer="a"),), (RetainExample(prompt="how so", answer="b", group="g"),)
SAME_GROUP = (RetainExample(prompt="another", answer="b", group="g"),)


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"forget_train": BAD, "retain_test": GOOD}, "forget_train and retain_test share 1"),
        ({"retain_train": GOOD, "retain_test": SAME_GROUP}, "retain_train and retain_test share 1"),
        ({"forget_train": BAD, "harmful": {"own": BAD}}, "forget_train and harmful share 1"),
    ],
)
def test_a_prompt_or_group_in_two_splits_is_refused(splits: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ForgetRetainData(**splits)  # type: ignore[arg-type]


def test_few_prompts_are_said_once_for_all_splits() -> None:
    def split(name: str, count: int) -> tuple[RetainExample, ...]:
        # Two answers to each prompt: prompts are counted.
        return tuple(RetainExample(prompt=f"{name} {n // 2}", answer=f"{n}") for n in range(2 * count))

    (note,) = ForgetRetainData(forget_test=BAD, retain_train=split("a", 49), retain_test=split("b", 50)).notes()
    assert note.startswith("few prompts: forget_test 1, retain_train 49; ")
    assert ForgetRetainData(retain_test=split("b", 50)).notes() == ()


def test_content_hash_sees_order_borders_and_cut_answers_but_no_safe_answers() -> None:
    def pair(prompt: str, answer: str) -> ForgetExample:
        return ForgetExample(prompt=prompt, answer=answer)

    one, other = pair("a", "b"), pair("c", "d")
    cut, safe = dataclasses.replace(one, finished=False), dataclasses.replace(one, safe_answer="no")
    different = ([one, other], [other, one], [one], [pair("ab", "")], [pair("", "ab")], [cut], [pair("\ud800", "b")])
    assert len({content_hash(examples) for examples in different}) == len(different)
    assert content_hash([one]) == content_hash([safe])
