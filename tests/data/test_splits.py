"""Splits by prompt: disjoint, complete, and the same everywhere."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku.data.examples import (
    ForgetExample,
    RetainExample,
    check_disjoint,
    draw_prompts,
    normalise_prompt,
    split_by_group,
)
from sku.errors import DataError

SHARES = {"validation": 0.1, "test": 0.2}


def example(number: int, group: str | None = None, category: str | None = None, answer: str = "a") -> RetainExample:
    return RetainExample(prompt=f"question {number}", answer=answer, category=category, group=group)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 30),
            st.one_of(st.none(), st.integers(0, 8)),
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
    rows: list[tuple[int, int | None, str | None, str]], seed: int, validation: float, test: float
) -> None:
    examples = [
        RetainExample(
            prompt=form.format(number),
            answer=str(index),
            group=None if group is None else f"g{group}",
            category=category,
        )
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


@given(st.permutations(range(30)), st.integers(0, 3))
def test_a_split_does_not_depend_on_the_order_of_rows(order: list[int], seed: int) -> None:
    plain = split_by_group([example(number) for number in range(30)], rest="train", held_out=SHARES, seed=seed)
    mixed = split_by_group([example(number) for number in order], rest="train", held_out=SHARES, seed=seed)
    assert {name: set(part) for name, part in plain.items()} == {name: set(part) for name, part in mixed.items()}


def test_shares_are_of_groups_and_exact() -> None:
    examples = [example(number, answer=str(copy)) for number in range(50) for copy in range(1 + number % 3)]
    splits = split_by_group(examples, rest="train", held_out=SHARES, seed=0)
    groups = {name: len({normalise_prompt(row.prompt) for row in part}) for name, part in splits.items()}
    assert groups == {"train": 35, "validation": 5, "test": 10}


def test_groups_are_joined_over_shared_prompts() -> None:
    """a-b share a group, b-c a prompt: all three must stay together."""
    chain = [
        RetainExample(prompt="p1", answer="a", group="g1"),
        RetainExample(prompt="p2", answer="b", group="g1"),
        RetainExample(prompt="P2!", answer="c", group="g2"),
        RetainExample(prompt="p3", answer="d", group="g2"),
    ]
    others = [example(number) for number in range(6)]
    for seed in range(20):
        splits = split_by_group([*chain, *others], rest="train", held_out={"test": 0.3}, seed=seed)
        assert len({name for name, part in splits.items() for row in part if row in chain}) == 1


def test_each_category_gives_its_share() -> None:
    examples = [example(number, category="large" if number < 80 else "small") for number in range(100)]
    for seed in range(10):
        splits = split_by_group(examples, rest="train", held_out=SHARES, seed=seed)
        counts = {name: Counter(row.category for row in part) for name, part in splits.items()}
        assert counts["test"] == {"large": 16, "small": 4}
        assert abs(counts["validation"]["small"] - 2) <= 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_groups_are_an_error_that_says_what_to_do(count: int) -> None:
    examples = [example(number, answer=str(copy)) for number in range(count) for copy in range(9)]
    with pytest.raises(
        DataError, match=f"the data x has {count} different prompts or groups, too few .*add data or lower"
    ):
        split_by_group(examples, rest="train", held_out=SHARES, seed=0, what="the data x")
    assert all(split_by_group([example(n) for n in range(3)], rest="train", held_out=SHARES, seed=0).values())


def test_limit_keeps_whole_prompts_and_grows_by_adding() -> None:
    examples = [ForgetExample(prompt=f"q{number % 10}", answer=str(number)) for number in range(30)]
    few, more = draw_prompts(examples, 3, seed=1), draw_prompts(examples, 6, seed=1)
    assert len(few) == 9
    assert len({row.prompt for row in few}) == 3
    assert set(few) < set(more)
    assert few == [row for row in examples if row in few]
    assert draw_prompts(examples, 99, seed=1) == draw_prompts(examples, None, seed=1) == examples
    assert draw_prompts(examples, 3, seed=2) != few


PROGRAM = """
from sku.data.examples import RetainExample
from sku.data.examples import draw_prompts, split_by_group
examples = [RetainExample(prompt=f"q {n}", answer="a", group=f"g {n // 2}", category=str(n % 3)) for n in range(60)]
splits = split_by_group(draw_prompts(examples, 50, 4), rest="train", held_out={"a": 0.2, "b": 0.2}, seed=4)
print({name: [row.prompt for row in part] for name, part in splits.items()})
"""


def test_the_same_split_whatever_pythons_hash_seed() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert "q 1" in outputs.pop()
