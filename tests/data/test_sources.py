"""One row of every schema that a source has had; rows_read, examples and rows left out must add up."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from sku.config import SourceConfig
from sku.data.examples import ForgetExample, RetainExample
from sku.data.sources import read
from sku.data.sources.rows import (
    FORMATS,
    Cells,
    Columns,
    Format,
    Kind,
    ParsedRows,
    RowParser,
    category_text,
    parse_rows,
)
from sku.errors import DataError

Rows = Sequence[Mapping[str, Any]]


PKU, BEAVERTAILS, TRUTHFULQA, COMPLETION, MESSAGES, PREFERENCE = FORMATS[:6]


def forget(rows: Rows, parser: RowParser) -> ParsedRows[ForgetExample]:
    return parse_rows(rows, parser, ForgetExample)


def retain(rows: Rows, parser: RowParser) -> ParsedRows[RetainExample]:
    return parse_rows(rows, parser, RetainExample)


def parser_of(known: Format, rows: Rows) -> RowParser:
    """The reader of rows that are of a known format."""
    found = Columns(rows[0])
    assert known.recognises(found)
    parser = known.row_parser(found)
    return lambda row: parser(Cells(row, found))


def columns_parser(found: Iterable[str], source: SourceConfig, kind: Kind) -> RowParser:
    return read.columns_parser(Columns(found), source, kind, f"data.{kind}")


def pku(rows: Rows) -> ParsedRows[ForgetExample]:
    return forget(rows, parser_of(PKU, rows))


OLD_PKU = {
    "prompt": "q",
    "response_0": "bad",
    "response_1": "good",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 1,
    "safer_response_id": 1,
}
NEW_PKU = {
    **OLD_PKU,
    "prompt_source": "Alpaca",
    "response_0_source": "Alpaca-7B",
    "response_1_source": "Alpaca-7B",
    "response_0_harm_category": {"Violence": False, "Privacy Violation": True, "Cybercrime": True},
    "response_1_harm_category": {"Violence": False, "Privacy Violation": False, "Cybercrime": False},
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
    "response_0_sha256": "00",
    "response_1_sha256": "01",
    "a column of 2031": None,
}


def test_pku_old_columns() -> None:
    parsed = pku([OLD_PKU])
    assert parsed.examples == [ForgetExample(prompt="q", answer="bad", safe_answer="good")]
    assert (parsed.rows_read, parsed.left_out) == (1, {"safe answer": 1})


def test_pku_todays_columns_name_the_harm_of_each_answer() -> None:
    both_bad = {**NEW_PKU, "is_response_1_safe": False, "response_1_harm_category": {"Violence": True}}
    parsed = pku([both_bad])
    assert parsed.examples == [
        ForgetExample(prompt="q", answer="bad", category="Privacy Violation; Cybercrime"),
        ForgetExample(prompt="q", answer="good", category="Violence"),
    ]
    assert parsed.left_out == {}


@pytest.mark.parametrize(("false", "true"), [("False", "True"), ("false", "true"), ("0", "1"), (False, True), (0, 1)])
def test_pku_extract_reads_flags_as_text(false: object, true: object) -> None:
    """``bool("False")`` is true: read so, all of a CSV would be safe."""
    parsed = pku(
        [{"prompt": "q", "response": "a", "is_safe": false}, {"prompt": "q", "response": "b", "is_safe": true}]
    )
    assert parsed.examples == [ForgetExample(prompt="q", answer="a", safe_answer="b")]
    assert parsed.left_out == {"safe answer": 1}


@pytest.mark.parametrize("safe", [0, 1])
def test_pku_the_other_answer_of_the_row_is_the_safe_one_before_those_of_other_rows(safe: int) -> None:
    def row(prompt: str, good: str, bad: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            f"response_{safe}": good,
            f"response_{1 - safe}": bad,
            f"is_response_{safe}_safe": True,
            f"is_response_{1 - safe}_safe": False,
        }

    both_bad = {**row("Q!", "bad 2", "bad 3"), f"is_response_{safe}_safe": False}
    alone = {**row("other", "bad 4", "bad 5"), f"is_response_{safe}_safe": False}
    parsed = pku([both_bad, row("q", "good 0", "bad 0"), row("q", "good 1", "bad 1"), alone])
    assert {example.answer: example.safe_answer for example in parsed.examples} == {
        "bad 0": "good 0", "bad 1": "good 1", "bad 2": "good 0", "bad 3": "good 0", "bad 4": None, "bad 5": None,
    }  # fmt: skip
    assert parsed.left_out == {"safe answer": 2}


def test_pku_a_safe_row_serves_every_example_of_its_prompt_wherever_it_stands() -> None:
    def row(prompt: object, response: object, *, is_safe: bool) -> dict[str, Any]:
        return {"prompt": prompt, "response": response, "is_safe": is_safe}

    parsed = pku(
        [
            row("q", "bad", is_safe=False),
            row("other", "bad", is_safe=False),
            row("Q?", " ", is_safe=True),
            row("q", None, is_safe=True),
            row("q", 7, is_safe=True),
            row("q", "half \ud83d", is_safe=True),
            row(None, "good 0", is_safe=True),
            row(" q", "good 1 ", is_safe=True),
            row("q", "good 2", is_safe=True),
            row("q", "worse", is_safe=False),
        ]
    )
    assert parsed.examples == [
        ForgetExample(prompt="q", answer="bad", safe_answer="good 1"),
        ForgetExample(prompt="other", answer="bad"),
        ForgetExample(prompt="q", answer="worse", safe_answer="good 1"),
    ]
    assert parsed.left_out == {"safe answer": 7}
    assert parsed.rows_read == len(parsed.examples) + 7


def test_a_text_marked_both_safe_and_unsafe_is_no_safe_answer() -> None:
    rows = [("a", True), ("a", False), ("b", False), ("b", True)]
    marked = [{"prompt": "q", "response": text, "is_safe": flag} for text, flag in rows]
    assert [example.safe_answer for example in pku(marked).examples] == [None, None]
    parsed = pku([*marked, {"prompt": "q", "response": "c", "is_safe": True}])
    assert [example.safe_answer for example in parsed.examples] == ["c", "c"]


def test_pku_rows_without_a_mark_are_counted() -> None:
    rows = [{"prompt": "q", "response": "a", "is_safe": flag} for flag in (None, "", "maybe")]
    parsed = pku([*rows, {"prompt": "q", "response": "b", "is_safe": "False"}])
    assert len(parsed.examples) == 1
    assert parsed.left_out == {"marked neither safe nor unsafe": 3}


def test_pku_missing_column_is_named_with_the_near_one() -> None:
    found = [name for name in OLD_PKU if name != "is_response_1_safe"] + ["is_response_1_save"]
    assert not PKU.recognises(Columns(found))
    with pytest.raises(DataError, match=r"needs a column is_response_1_safe. Did you mean is_response_1_save.*prompt"):
        PKU.row_parser(Columns(found))


def test_beavertails_keeps_unsafe_rows_with_their_categories() -> None:
    harm = {"animal_abuse": False, "violence,aiding_and_abetting,incitement": True}
    rows = [
        {"prompt": "q", "response": "a", "category": harm, "is_safe": False},
        {"prompt": "q", "response": "b", "category": dict.fromkeys(harm, False), "is_safe": True},
    ]
    assert not PKU.recognises(Columns(rows[0]))
    parsed = forget(rows, parser_of(BEAVERTAILS, rows))
    assert parsed.examples == [
        ForgetExample(prompt="q", answer="a", category="violence,aiding_and_abetting,incitement", safe_answer="b")
    ]
    assert parsed.left_out == {"safe answer": 1}
    with pytest.raises(DataError, match="needs a column category"):
        BEAVERTAILS.row_parser(Columns(["prompt", "response", "is_safe"]))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ({"a": True, "b": False}, "a"),
        ("{'a': True, 'b': False}", "a"),
        ('{"a": true, "b": true}', "a; b"),
        ({"a": None}, None),
        (" theft ", "theft"),
        ("{broken", "{broken"),
        ("", None),
        (None, None),
        (3, None),
    ],
)
def test_category_text(cell: object, expected: str | None) -> None:
    assert category_text(cell) == expected


def test_truthfulqa_csv_gives_one_example_per_answer_best_first() -> None:
    row = {
        "Type": "Adversarial",
        "Category": "Weather",
        "Question": "Is rain wet?",
        "Best Answer": "Rain is wet",
        "Correct Answers": "Water is wet; rain is  wet. ;; Rain wets you",
        "Incorrect Answers": "No; Never",
        "Source": "",
    }
    parsed = retain([row], parser_of(TRUTHFULQA, [row]))
    assert [example.answer for example in parsed.examples] == ["Rain is wet", "Water is wet", "Rain wets you"]
    assert {example.group for example in parsed.examples} == {"is rain wet"}
    assert {example.category for example in parsed.examples} == {"Weather"}
    assert parsed.left_out == {}


def test_truthfulqa_hub_form() -> None:
    row = {
        "type": "Adversarial",
        "category": "Weather",
        "question": "Is rain wet?",
        "best_answer": "Yes; it is.",
        "correct_answers": ["Yes; it is.", "Sure."],
        "incorrect_answers": ["No."],
        "source": "",
    }
    parsed = retain([row], parser_of(TRUTHFULQA, [row]))
    assert [example.answer for example in parsed.examples] == ["Yes; it is.", "Sure."]


USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "completion": " a"}, "q"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "q"),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "Be brief.\n\nq"),
        ({"prompt": [USER], "completion": "a"}, "q"),
        ({"prompt": "q", "completion": [ASSISTANT]}, "q"),
        ({"messages": [USER, ASSISTANT]}, "q"),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "Be brief.\n\nq"),
        ({"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]}, "q"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}, "q"),
    ],
)
def test_trl_formats(row: dict[str, Any], prompt: str) -> None:
    assert trl_parsed([row]).examples == [RetainExample(prompt=prompt, answer="a")]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, ASSISTANT, USER, ASSISTANT], "more than one user turn"),
        ([USER], "turns other than [system], user, assistant"),
        ([ASSISTANT, USER], "turns other than [system], user, assistant"),
        ([USER, {"role": "tool", "content": "4"}, ASSISTANT], "turns other than [system], user, assistant"),
        ([], "not a list of messages with role and content"),
        (None, "not a list of messages with role and content"),
        (["q", "a"], "not a list of messages with role and content"),
        ([{"from": "human", "value": "q"}], "not a list of messages with role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT], "message that is not text alone"),
        ([USER, {"role": "assistant", "content": None}], "empty answer"),
        ([{"role": "user", "content": "  "}, ASSISTANT], "empty prompt"),
        ([SYSTEM, {"role": "user", "content": None}, ASSISTANT], "empty prompt"),
        ([SYSTEM, {"role": "user", "content": " "}, ASSISTANT], "empty prompt"),
    ],
)
def test_conversations_that_do_not_fit_are_counted_by_reason(messages: object, reason: str) -> None:
    parsed = trl_parsed([{"messages": messages}, {"messages": [USER, ASSISTANT]}])
    assert len(parsed.examples) == 1
    assert parsed.left_out == {reason: 1}


def trl_parsed(rows: Rows) -> ParsedRows[RetainExample]:
    return retain(rows, parser_of(MESSAGES if "messages" in rows[0] else COMPLETION, rows))


HARMFUL, SAFE = {"role": "assistant", "content": "bad"}, {"role": "assistant", "content": "good"}


def preferences(rows: Rows) -> ParsedRows[ForgetExample]:
    return forget(rows, parser_of(PREFERENCE, rows))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": " q", "chosen": "good ", "rejected": "bad"}, "q"),
        ({"prompt": [USER], "chosen": [SAFE], "rejected": [HARMFUL]}, "q"),
        ({"prompt": [SYSTEM, USER], "chosen": [SAFE], "rejected": [HARMFUL]}, "Be brief.\n\nq"),
        ({"prompt": "q", "chosen": [SAFE], "rejected": "bad", "score": 1}, "q"),
    ],
)
def test_the_rejected_answer_of_a_preference_is_forgotten_and_the_chosen_one_is_safe(
    row: dict[str, Any], prompt: str
) -> None:
    assert preferences([row]).examples == [ForgetExample(prompt=prompt, answer="bad", safe_answer="good")]


@pytest.mark.parametrize("chosen", [None, "", " \n", 7, [], [USER, SAFE], "bad", "half \ud83d"])
def test_a_preference_whose_chosen_answer_can_not_serve_has_none(chosen: object) -> None:
    parsed = preferences([{"prompt": "q", "chosen": chosen, "rejected": "bad"}])
    assert parsed.examples == [ForgetExample(prompt="q", answer="bad")]
    assert parsed.left_out == {}


def test_columns_with_a_category() -> None:
    source = SourceConfig(path="x", prompt_column="ask", answer_column="reply", category_column="kind")
    rows: list[dict[str, Any]] = [
        {"ask": "q1", "reply": "a1", "kind": "theft"}, {"ask": "q2", "reply": "a2", "kind": None},
    ]  # fmt: skip
    parsed = forget(rows, columns_parser(list(rows[0]), source, "forget"))
    assert [(example.prompt, example.category) for example in parsed.examples] == [("q1", "theft"), ("q2", None)]


def test_columns_named_wrongly_are_an_error_with_the_near_name() -> None:
    source = SourceConfig(path="x", prompt_column="questoin", answer_column="answer")
    with pytest.raises(DataError, match=r"needs a column questoin. Did you mean question\? Columns found: question"):
        columns_parser(["question", "answer"], source, "retain")


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        (["prompt", "question", "answer"], "prompt"),
        (["question", "answer", "output"], "answer"),
        (["instruction", "input", "output"], "prompt"),
        (["text"], "prompt"),
        (["question"], "answer"),
    ],
)
def test_columns_in_doubt_are_an_error(found: list[str], missing: str) -> None:
    assert not read.are_clear(Columns(found))
    with pytest.raises(
        DataError,
        match=f"which column holds the {missing}: set it, as --set data.retain.{missing}_column=NAME. Columns found: ",
    ):
        columns_parser(found, SourceConfig(path="x"), "retain")


def test_a_forget_set_with_an_unread_safety_mark_is_an_error() -> None:
    """Every safe answer would be unlearned too."""
    with pytest.raises(DataError, match="column is_safe seems to mark unsafe rows"):
        columns_parser(["question", "answer", "is_safe"], SourceConfig(path="x"), "forget")
    columns_parser(["question", "answer", "is_safe"], SourceConfig(path="x"), "retain")
    columns_parser(["question", "answer", "Is_Safe"], SourceConfig(path="x", where={"is_safe": False}), "forget")


def test_rows_are_cleaned_and_counted() -> None:
    rows: list[dict[str, Any]] = [
        {"question": " q ", "answer": "a\n"},
        {"question": "Q?", "answer": "a"},
        {"question": "q", "answer": "b"},
        {"question": "", "answer": "a"},
        {"question": "q", "answer": " \t"},
        {"question": None, "answer": "a"},
        {"question": "q", "answer": None},
        {"question": "q", "answer": 7},
        {"question": ["q"], "answer": "a"},
        {"question": "q", "answer": "half \ud83d"},
        {"question": "nul \0 byte", "answer": "a\0b"},
    ]
    parsed = retain(rows, columns_parser(["question", "answer"], SourceConfig(path="x"), "retain"))
    assert [(example.prompt, example.answer) for example in parsed.examples] == [
        ("q", "a"),
        ("q", "b"),
        ("nul \0 byte", "a\0b"),
    ]
    assert parsed.left_out == {
        "answer is not text": 1,
        "answer is not valid Unicode": 1,
        "duplicate": 1,
        "empty answer": 2,
        "empty prompt": 2,
        "prompt is not text": 1,
    }
    assert parsed.rows_read == len(parsed.examples) + sum(parsed.left_out.values())
