"""The development data, where it is there: counts and hashes only, as its text is harmful."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from sku.config import SourceConfig
from sku.data.examples import Example, ForgetExample, RetainExample, check_disjoint, normalise_prompt
from sku.data.load import load_forget_retain
from sku.data.sources.read import read_examples
from sku.data.sources.tables import read_table

pytestmark = pytest.mark.shared


def test_pku_extract(shared_data: Path) -> None:
    source = SourceConfig(path=str(shared_data / "pku_saferlhf_mini.csv"))
    examples, account = read_examples(source, "forget", ForgetExample)
    assert account.source == "pku_saferlhf"
    assert account.rows_read == 2476
    assert set(account.rows_left_out) == {"safe answer", "duplicate"}
    assert account.rows_left_out["safe answer"] == 1074
    assert len(examples) + account.rows_left_out["duplicate"] == 1402, "unsafe rows"


def test_safe_answers_of_the_pku_extract(shared_data: Path) -> None:
    path = str(shared_data / "pku_saferlhf_mini.csv")
    data = load_forget_retain(path, shared_data / "TruthfulQA.csv")
    examples = (*data.forget_train, *data.forget_test)
    with_safe = [example for example in examples if example.safe_answer is not None]
    assert (len(with_safe), len(examples)) == (263, 1357)
    assert data.provenance[0].safe_answers == 263
    assert len({normalise_prompt(example.prompt) for example in with_safe}) == 228, "of 736 prompts"
    harmful = {(normalise_prompt(example.prompt), example.answer) for example in examples}
    assert not any((normalise_prompt(example.prompt), example.safe_answer) in harmful for example in with_safe)


def test_truthfulqa(shared_data: Path) -> None:
    source = SourceConfig(path=str(shared_data / "TruthfulQA.csv"))
    assert read_table(source).columns[0] == "Type", "the byte order mark is no part of the first name"
    examples, account = read_examples(source, "retain", RetainExample)
    assert (account.source, account.rows_read, account.rows_left_out) == ("truthfulqa", 813, {})
    assert len({example.group for example in examples}) == 813
    assert len(examples) > 2 * 813
    assert len({(example.group, example.answer) for example in examples}) == len(examples)


def test_both_together(shared_data: Path) -> None:
    data = load_forget_retain(shared_data / "pku_saferlhf_mini.csv", shared_data / "TruthfulQA.csv", seed=1)
    splits: dict[str, Sequence[Example]] = {
        "unlearned": data.forget_train,
        "forget_test": data.forget_test,
        "train": data.retain_train,
        "validation": data.retain_validation,
        "test": data.retain_test,
    }
    check_disjoint(splits)
    questions = {name: len({normalise_prompt(row.prompt) for row in split}) for name, split in splits.items()}
    assert (questions["train"], questions["validation"], questions["test"]) == (578, 79, 156)
    harmful = questions["unlearned"] + questions["forget_test"]
    assert questions["forget_test"] / harmful == pytest.approx(0.3, abs=0.02), "whole families are held out"
    assert len(Counter(row.category for row in data.retain_test)) >= 30, "of 38 categories"
