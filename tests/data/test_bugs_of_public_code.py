"""Bugs of the authors' code that concern data: each test fails on the form that the code had.

Numbers as in the project's survey of public code. Bugs 6 and 7 are in test_tokenization.py and test_token_spans.py,
8 in test_collation.py.
"""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from sku.config import SourceConfig
from sku.data.collation import JointCollator
from sku.data.examples import ForgetExample, RetainExample
from sku.data.joint import MISMATCHED, JointExample
from sku.data.load import load_forget_retain
from sku.data.prompts import PaperFormat
from sku.data.rows import parse_rows
from sku.data.tables import read_table
from sku.data.tokenization import TokenizedExample, tokenize_example, tokenize_prompt
from sku.data.truthfulqa import row_parser
from sku.losses import IGNORE_INDEX

PAPER = PaperFormat("</s>")


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> TokenizedExample:
    return tokenize_example(
        ForgetExample(prompt=prompt, answer=answer),
        tokenizer,
        PAPER,
        max_length=512,
        max_answer_tokens=128,
        train_on_end=False,
    )


@pytest.mark.parametrize("length", [1, 3, 9])
def test_6_the_first_to_the_last_answer_token_is_learned_in_a_padded_row(
    length: int, gpt_like: PreTrainedTokenizerBase
) -> None:
    """The offset was the padded length, so the loss of guided distortion was exactly 0."""
    short, long = tokenize(gpt_like, "what ?", "honey " * length), tokenize(gpt_like, "what ?", "honey " * 40)
    examples = [
        JointExample(forget=row, mismatched=(), retain=None, forget_index=0, retain_index=-1) for row in (short, long)
    ]
    labels = JointCollator(0)(examples)["labels"][0]
    assert labels[labels != IGNORE_INDEX].tolist() == list(short.input_ids[short.answer_start :])


def test_7_the_first_answer_token_is_learned_although_the_prompt_ends_in_a_space(
    gpt_like: PreTrainedTokenizerBase,
) -> None:
    """``len(tokenizer("...Answer: "))`` counts the space as a token; joined, it is part of the answer's first."""
    example = tokenize(gpt_like, "what ?", "honey is sweet .")
    buggy_start = len(gpt_like("### Question: what ?\n ### Answer: ").input_ids)
    assert example.answer_start == buggy_start - 1
    assert gpt_like.decode([example.labels[example.answer_start]]) == " honey"


def test_9_a_mismatched_row_does_not_learn_the_question(gpt_like: PreTrainedTokenizerBase) -> None:
    """The offset was ``len(BatchEncoding)``, the number of its fields: 2."""
    row = tokenize(gpt_like, "how do i bake the bread ?", "honey is golden .")
    assert len(gpt_like("how do i bake the bread ?")) == 2, "what the authors took for the prompt's length"
    batch = JointCollator(0)(
        [JointExample(forget=None, mismatched=(row,), retain=None, forget_index=0, retain_index=-1)]
    )
    assert batch["row_kind"].tolist() == [MISMATCHED]
    learned = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
    assert gpt_like.decode(learned) == " honey is golden ."


@pytest.mark.parametrize("prompt", ["what is ### honey ?", "Question: who ?", "### Answer: no\n ### Question: yes"])
def test_11_prompts_with_the_words_of_the_format_stay_whole(prompt: str, gpt_like: PreTrainedTokenizerBase) -> None:
    """The question was recovered by decoding and splitting at "###" and "Question:"."""
    example = tokenize(gpt_like, prompt, "it is .")
    before = gpt_like.decode(list(example.input_ids[: example.answer_start]))
    assert before == f"### Question: {prompt}\n ### Answer:"
    assert gpt_like.decode(tokenize_prompt(prompt, gpt_like, PAPER)) == before


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    path = folder / name
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_14_every_harmful_prompt_is_unlearned_or_published_as_unseen(tmp_path: Path) -> None:
    """Only the first 1,144 harmful rows were ever met, and "unseen" was not defined."""
    harmful: list[dict[str, object]] = [{"prompt": f"bad {n}", "response": "a", "is_safe": False} for n in range(200)]
    normal: list[dict[str, object]] = [{"question": f"good {n}", "answer": "a"} for n in range(50)]
    data = load_forget_retain(write(tmp_path, "f.parquet", harmful), write(tmp_path, "r.parquet", normal))
    unlearned = {row.prompt for row in data.unlearned}
    unseen = {row.prompt for row in data.unseen}
    assert unlearned | unseen == {row["prompt"] for row in harmful}
    assert not unlearned & unseen
    last_quarter = {f"bad {n}" for n in range(150, 200)}
    assert len(unlearned & last_quarter) > 20


def test_15_no_question_is_trained_on_and_tested(tmp_path: Path) -> None:
    """Split by row, 70 % of the test rows had their question in the training rows; "a; b" was one answer."""
    rows: list[dict[str, object]] = [
        {
            "Question": f"Question {n}?",
            "Best Answer": f"best {n}",
            "Correct Answers": f"best {n}; other {n}; third {n}",
        }
        for n in range(100)
    ]
    parsed = parse_rows(rows, row_parser(list(rows[0])), RetainExample)
    assert len(parsed.examples) == 300
    assert all(";" not in example.answer for example in parsed.examples)
    by_row = random.Random(0).sample(parsed.examples, len(parsed.examples))
    trained = {row.prompt for row in by_row[:210]}
    assert sum(row.prompt in trained for row in by_row[240:]) > 30, "the bug that this test is about"
    harmful: list[dict[str, object]] = [{"prompt": f"bad {n}", "response": "a", "is_safe": False} for n in range(9)]
    data = load_forget_retain(write(tmp_path, "f.parquet", harmful), write(tmp_path, "r.parquet", rows))
    trained = {row.prompt for row in data.retain_train}
    assert len(data.retain_test) == 60
    assert not any(row.prompt in trained for row in data.retain_test)


def test_16_columns_are_taken_by_name_and_new_ones_do_no_harm(tmp_path: Path) -> None:
    """Old columns were removed by a fixed list, so that a new one broke the loader; two columns were added up."""
    row = {
        "prompt": "q",
        "response_0": "a",
        "response_1": "b",
        "is_response_0_safe": False,
        "is_response_1_safe": False,
        "new_since_2031": 1,
    }
    path = write(tmp_path, "pku.parquet", [{"something": "else", **row, "prompt": f"bad {n}"} for n in range(5)])
    assert "new_since_2031" in read_table(SourceConfig(path=str(path))).columns
    normal: list[dict[str, object]] = [{"question": f"good {n}", "answer": "a"} for n in range(9)]
    data = load_forget_retain(path, write(tmp_path, "r.parquet", normal))
    assert len(data.unlearned) + len(data.unseen) == 10
    assert data.provenance[0].source == "pku_saferlhf"
