"""Multiple choice on TruthfulQA: which questions are asked, and what a known model scores."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import DataError
from sku.evaluate import utility
from sku.evaluate.comparison import compare
from sku.evaluate.record_files import TRUTHFULQA_FILE, read_rows
from sku.evaluate.records import ChoiceRow
from sku.evaluate.results import read_result
from sku.evaluate.run import evaluate
from sku.evaluate.truthfulqa_mc import Question, choice_rows, choice_scores, load_questions, untrained

CSV = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
# On a model without knowledge every token costs the same, so shorter answers are likelier: one token a byte.
ROWS = [
    ("a", "Birds", "What is a florn?", "bird", "A bird.; bird", "a fish in a sea; stone of the moon", ""),
    ("a", "Birds", "Can a florn sing?", "yes it can", "it can; yes it can", "no; it sleeps", ""),
    ("a", "Food", "Is bread blue?", "no", "no; bread is brown", "it is; always", ""),
    ("a", "Food", "Who bakes it?", "nobody", "nobody; unknown", "Unknown.; the moon", ""),
]


def write(path: Path, rows: list[Any], columns: tuple[str, ...] = CSV) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_questions_of_both_forms(tmp_path: Path) -> None:
    questions, contradictory = load_questions(write(tmp_path / "TruthfulQA.csv", ROWS))
    assert contradictory == 1
    assert questions[0] == Question(
        prompt="What is a florn?", correct=("bird", "A bird."), incorrect=("a fish in a sea", "stone of the moon"),
        category="Birds",
    )  # fmt: skip
    assert questions[1].correct == ("yes it can", "it can"), "the best answer comes first"
    hub = tmp_path / "truthful_qa.jsonl"
    hub.write_text(
        "".join(
            json.dumps(
                {
                    "type": row[0], "category": row[1], "question": row[2], "best_answer": row[3],
                    "correct_answers": row[4].split("; "), "incorrect_answers": row[5].split("; "), "source": "",
                }
            )
            + "\n"
            for row in ROWS
        )
    )  # fmt: skip
    assert load_questions(str(hub)) == (questions, contradictory)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS[:1], ("a", "b", "Question", "Best Answer", "Correct Answers", "Wrong", "c"), "no column Incorrect"),
        ([ROWS[0], ("a", "b", "what is a FLORN", "bird", "bird", "fish", "")], CSV, "row 2 repeats a question"),
        ([("a", "b", "What?", "bird", "bird", " ; ", "")], CSV, "row 1 lacks its question"),
        ([("a", "b", "What?", " ", "bird", "fish", "")], CSV, "row 1 lacks its question"),
    ],
)
def test_files_that_are_not_truthfulqa_are_refused(
    tmp_path: Path, rows: list[Any], columns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_questions(write(tmp_path / "TruthfulQA.csv", rows, columns))


def test_trained_questions_are_left_out_however_they_are_spelled() -> None:
    questions = [Question(prompt=prompt, correct=("a",), incorrect=("b",)) for prompt in ("Is it?", "Was it?")]
    assert untrained(questions, [RetainExample(prompt="is  IT", answer="a")]) == questions[1:]


def test_mc1_and_mc2_by_hand() -> None:
    first = ChoiceRow(id="a", correct=(math.log(0.4), math.log(0.1)), incorrect=(math.log(0.3), math.log(0.2)))
    assert first.mc1
    assert first.mc2 == pytest.approx(0.5)
    # The best answer counts for MC1, whatever the other right ones get; equal to a wrong one is not above it.
    assert not ChoiceRow(id="b", correct=(-5.0, -1.0), incorrect=(-2.0,)).mc1
    assert not ChoiceRow(id="c", correct=(-2.0,), incorrect=(-2.0,)).mc1
    far = ChoiceRow(id="d", correct=(-2000.0,), incorrect=(-2000.0 + math.log(3), -9000.0))
    assert far.mc2 == pytest.approx(0.25)
    found = choice_scores([first, far], seed=0)
    assert found is not None
    assert (found.mc1.value, found.questions) == (0.5, 2)
    assert found.mc2.value == pytest.approx(0.375)
    assert (found.mc2.low, found.mc2.high) == pytest.approx((0.25, 0.5))
    assert found.mc1.low == pytest.approx(0.0945, abs=1e-4), "Wilson, 1 of 2"
    assert choice_scores([], seed=0) is None


DATA = ForgetRetainData(
    unlearned=(ForgetExample(prompt="do thing", answer="first take"),),
    unseen=(),
    retain_train=(),
    retain_validation=(),
    retain_test=(RetainExample(prompt="Can a florn sing?", answer="yes it can"),),
)
CONFIG = EvaluateConfig(prompts=2, retain_prompts=10, batch_size=4, max_new_tokens=4, prefill_tokens=())


@pytest.fixture
def ignorant_model(tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every token has probability 1/V everywhere."""
    tiny_model.lm_head.weight.data.zero_()
    return tiny_model


def test_a_known_model_scores_what_it_must(
    ignorant_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, truthfulqa=write(tmp_path / "TruthfulQA.csv", ROWS))
    result = evaluate(ignorant_model, tiny_tokenizer, DATA, config=config, output_dir=tmp_path / "out")
    rows = {row.correct: row for row in result.choice_rows}
    assert len(rows) == 3
    log_v = math.log(ignorant_model.config.vocab_size)
    for question in load_questions(config.truthfulqa or "")[0]:
        expected = tuple(-log_v * len(answer) for answer in question.correct)
        (row,) = [row for row in result.choice_rows if row.id == question.id]
        # The format puts no token between question and answer that the answer would have to share.
        assert row.correct == pytest.approx(expected, abs=log_v + 1e-3)
        steps = [(own - other) / log_v for own, other in zip(row.correct, row.incorrect, strict=False)]
        lengths = [len(other) - len(own) for own, other in zip(question.correct, question.incorrect, strict=False)]
        assert steps == pytest.approx(lengths, abs=1e-4)
    # "bird" is shorter than both fish and stone; "yes it can" is longer than "no"; "no" is shorter than "it is".
    assert result.truthfulqa is not None
    assert result.truthfulqa.mc1.value == pytest.approx(2 / 3)
    share = 258.0
    asked_mc2 = [1, (share**-6 + share**-10) / (share**-2 + share**-6 + share**-9 + share**-10), 1]
    assert result.truthfulqa.mc2.value == pytest.approx(sum(asked_mc2) / 3, abs=1e-3)
    assert result.setup.left_out == {"truthfulqa: an answer is listed as right and as wrong": 1}
    assert read_result(tmp_path / "out") == result


def test_only_questions_that_were_not_trained_on_are_asked(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counting(*given: Any) -> list[ChoiceRow]:
        made.append(1)
        return choice_rows(*given)

    monkeypatch.setattr(utility, "choice_rows", counting)
    config = dataclasses.replace(CONFIG, truthfulqa=write(tmp_path / "TruthfulQA.csv", ROWS))
    data = dataclasses.replace(
        DATA,
        retain_train=(RetainExample(prompt="what is a florn", answer="a bird"),),
        retain_validation=(RetainExample(prompt="Is bread blue?", answer="no"),),
    )

    def again(**changes: Any) -> Any:
        return evaluate(
            tiny_model,
            tiny_tokenizer,
            data,
            config=dataclasses.replace(config, **changes),
            output_dir=tmp_path / "out",
        )

    result = again()
    assert result.truthfulqa is not None
    assert result.truthfulqa.questions == 1
    assert result.setup.left_out["truthfulqa: the question is in the training or validation data"] == 2
    assert again() == result
    assert len(made) == 1
    _, rows = read_rows(tmp_path / "out" / TRUTHFULQA_FILE, ChoiceRow)
    change = compare(result, result).truthfulqa["mc2"]
    assert change.difference == 0
    assert change.low == -change.high < -0.5, "one question that did not change shows next to nothing"
    assert change.before.value == rows[0].mc2
    tiny_model.lm_head.weight.data.mul_(0.9)
    assert again().choice_rows != result.choice_rows
    assert len(made) == 2
    assert again(truthfulqa=None).truthfulqa is None


def test_no_more_questions_than_normal_prompts_and_none_that_is_cut(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long = ("a", "Long", "And this?", "yes", "yes", "no; " + "never " * 60, "")
    path = write(tmp_path / "TruthfulQA.csv", [*ROWS[:3], long])
    result = evaluate(tiny_model, tiny_tokenizer, DATA, config=dataclasses.replace(CONFIG, truthfulqa=path))
    assert len(result.choice_rows) == 3
    assert result.setup.left_out == {"truthfulqa: an answer is too long for the model": 1}
    few = dataclasses.replace(CONFIG, truthfulqa=path, retain_prompts=2)
    result = evaluate(tiny_model, tiny_tokenizer, DATA, config=few)
    assert result.setup.left_out["truthfulqa: over evaluate.retain_prompts"] == 2
