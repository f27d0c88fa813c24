"""Shapes of data, the form in which prompts are compared, and what splits may not share."""

import dataclasses

import pytest

from sku.data.examples import (
    ForgetExample,
    ForgetRetainData,
    RetainExample,
    check_disjoint,
    content_hash,
    count_safe_answers,
    normalise_prompt,
)
from sku.errors import DataError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is rain?", "  what IS   rain "),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("a_b-c", "A B C"),
        ("full\uff57idth", "fullwidth"),
    ],
)
def test_prompts_that_differ_in_writing_alone_are_the_same(one: str, other: str) -> None:
    assert normalise_prompt(one) == normalise_prompt(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u093f", "\u0915\u0940"),  # Hindi syllables that differ in their vowel sign
        ("?!", "..."),
        ("\U0001f600", "\U0001f622"),
        ("\u96e8", "\u96ea"),
    ],
)
def test_different_prompts_stay_different(one: str, other: str) -> None:
    assert normalise_prompt(one) != normalise_prompt(other)


def test_a_prompt_in_forget_and_retain_is_refused() -> None:
    with pytest.raises(DataError, match="splits forget_train and retain_test share 1 prompts"):
        ForgetRetainData(
            forget_train=(ForgetExample(prompt="How so?", answer="a"),),
            forget_test=(),
            retain_train=(),
            retain_validation=(),
            retain_test=(RetainExample(prompt="how so", answer="b"),),
        )


def test_a_group_in_two_splits_is_refused() -> None:
    with pytest.raises(DataError, match="share 1"):
        check_disjoint(
            {
                "one": [RetainExample(prompt="a", answer="x", group="g")],
                "two": [RetainExample(prompt="b", answer="x", group="g")],
            }
        )


def split_data(own: tuple[RetainExample, ...] = ()) -> ForgetRetainData:
    return ForgetRetainData(
        forget_train=(ForgetExample(prompt="bad", answer="a", safe_answer="no"),),
        forget_test=(),
        retain_train=(RetainExample(prompt="train", answer="a"),),
        retain_validation=(),
        retain_test=(),
        normal={"own": own} if own else {},
    )


def test_few_prompts_are_said_once_for_all_splits() -> None:
    def split(name: str, count: int) -> tuple[RetainExample, ...]:
        # Two answers to each prompt: prompts are counted.
        return tuple(RetainExample(prompt=f"{name} {n // 2}", answer=f"{n}") for n in range(2 * count))

    def data(unlearned: int) -> ForgetRetainData:
        harmful = tuple(ForgetExample(prompt=f"harm {n}", answer="x") for n in range(unlearned))
        return ForgetRetainData(
            forget_train=harmful, forget_test=(ForgetExample(prompt="z", answer="z"),),
            retain_train=split("train", 49), retain_validation=(), retain_test=split("test", 50),
        )  # fmt: skip

    (note,) = data(50).notes()
    assert note.startswith("few prompts: forget_test 1, retain_train 49; with fewer than about 50 in a split ")
    assert data(49).notes()[0].startswith("few prompts: forget_train 49, forget_test 1, retain_train 49; ")


@pytest.mark.parametrize(("prompt", "split"), [("BAD!", "forget_train"), ("train", "retain_train")])
def test_a_prompt_of_another_source_in_another_split_is_refused(prompt: str, split: str) -> None:
    with pytest.raises(DataError, match=f"splits {split} and normal:own share 1 prompts"):
        split_data(own=(RetainExample(prompt=prompt, answer="other"),))


def test_safe_answers_are_counted_and_leave_the_hash_as_it_was() -> None:
    plain = [ForgetExample(prompt="q", answer=answer) for answer in ("a", "b")]
    with_safe = [plain[0], dataclasses.replace(plain[1], safe_answer="no")]
    assert (count_safe_answers(plain), count_safe_answers(with_safe)) == (0, 1)
    assert count_safe_answers([RetainExample(prompt="q", answer="a")]) == 0
    assert content_hash(plain) == content_hash(with_safe)


def test_content_hash_sees_order_borders_and_lone_surrogates() -> None:
    def example(prompt: str, answer: str) -> ForgetExample:
        return ForgetExample(prompt=prompt, answer=answer)

    one, other = example("a", "b"), example("c", "d")
    hashes = {
        content_hash(examples)
        for examples in ([one, other], [other, one], [one], [example("ab", "")], [example("", "ab")])
    }
    assert len(hashes) == 5
    assert content_hash([one]) == content_hash([example("a", "b")])
    assert len(content_hash([example("\ud800", "b")])) == 64
