"""Which format a table is taken for."""

import pytest

from sku.config import SourceConfig
from sku.data.sources import read
from sku.data.sources.rows import Cells, Columns, Kind, Pair, RowParser
from sku.errors import DataError

AUTO = SourceConfig(path="x")


def choose_parser(found: list[str], source: SourceConfig, kind: Kind, key: str | None = None) -> tuple[str, RowParser]:
    columns = Columns(found)
    name, parser = read.choose_parser(columns, source, kind, key or f"data.{kind}")
    return name, lambda row: parser(Cells(row, columns))


def detect_format(found: list[str], source: SourceConfig, kind: Kind) -> str:
    return read.detect_format(Columns(found), source, kind, f"data.{kind}")


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (["prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "new"], "pku_saferlhf"),
        (["prompt", "response", "is_safe"], "pku_saferlhf"),
        (["prompt", "response", "is_safe", "harm_category"], "pku_saferlhf"),
        (["prompt", "response", "category", "is_safe"], "beavertails"),
        (["Type", "Question", "Best Answer", "Correct Answers"], "truthfulqa"),
        (["question", "best_answer", "correct_answers"], "truthfulqa"),
        (["prompt", "completion"], "prompt_completion"),
        (["messages", "id"], "messages"),
        (["question", "answer", "id"], "columns"),
        (["instruction", "output"], "columns"),
    ],
)
def test_auto_recognises(found: list[str], name: str) -> None:
    assert detect_format(found, AUTO, "retain") == name


@pytest.mark.parametrize(
    ("row", "source", "kind", "name", "pair"),
    [
        ({"Prompt": "p", "RESPONSE": "r", "Is_Safe": "false"}, AUTO, "forget", "pku_saferlhf", ("p", "r")),
        ({" Question ": "q", "Answer": "a"}, AUTO, "retain", "columns", ("q", "a")),
        ({"question": "q", "Best Answer": "b", "correct answers": "b"}, AUTO, "retain", "truthfulqa", ("q", "b")),
        ({"Prompt": "p", "Completion": "c"}, AUTO, "retain", "prompt_completion", ("p", "c")),
        (
            {"Frage": "f", "Antwort": "a"}, SourceConfig(path="x", prompt_column="frage", answer_column="ANTWORT"),
            "retain", "columns", ("f", "a"),
        ),
        # Where two columns differ in case alone, each is its own.
        (
            {"Answer": "no", "q": "q", "answer": "yes"},
            SourceConfig(path="x", prompt_column="Q", answer_column="answer"), "retain", "columns", ("q", "yes"),
        ),
    ],
)  # fmt: skip
def test_columns_are_compared_without_case(
    row: dict[str, str], source: SourceConfig, kind: Kind, name: str, pair: tuple[str, str]
) -> None:
    found, parser = choose_parser(list(row), source, kind)
    (first,) = parser(row)
    assert isinstance(first, Pair)
    assert (found, (first.prompt, first.answer)) == (name, pair)


def test_unknown_columns_name_the_options_with_those_of_the_file() -> None:
    with pytest.raises(DataError) as caught:
        choose_parser(["Frage", "die Antwort"], AUTO, "forget")
    assert (
        "--set data.forget.prompt_column=Frage --set 'data.forget.answer_column=die Antwort'. Columns found: Frage, "
        "die Antwort"
    ) in str(caught.value)
    with pytest.raises(DataError, match=r"--set data\.normal\.own\.prompt_column=Frage"):
        choose_parser(["Frage", "Antwort"], AUTO, "retain", "data.normal.own")
    with pytest.raises(DataError, match=r"--set data\.forget\.where\.Harmful="):
        choose_parser(["question", "answer", "Harmful"], SourceConfig(path="x", format="columns"), "forget")


def test_auto_refuses_what_fits_twice_or_never() -> None:
    with pytest.raises(
        DataError,
        match=r"fit formats prompt_completion and messages: set one, .*=prompt_completion\. Columns found: prompt",
    ):
        detect_format(["prompt", "completion", "messages"], AUTO, "retain")
    with pytest.raises(DataError, match=r"no known format fits the forget data.*Columns found: a, b"):
        detect_format(["a", "b"], AUTO, "forget")
    with pytest.raises(DataError, match="Columns found: none"):
        detect_format([], AUTO, "forget")


def test_a_preference_is_recognised_and_is_forget_data_only() -> None:
    found = ["prompt", "chosen", "rejected", "score"]
    assert choose_parser(found, AUTO, "forget")[0] == "preference"
    with pytest.raises(DataError, match="format preference gives forget examples only; for retain data use format co"):
        choose_parser(found, AUTO, "retain")
    source = SourceConfig(path="x", prompt_column="prompt", answer_column="chosen")
    assert choose_parser(found, source, "retain")[0] == "columns"


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (["prompt", "completion", "is_safe"], "prompt_completion"),
        (["messages", "harmful"], "messages"),
        (["prompt", "chosen", "rejected", "unsafe"], "preference"),
    ],
)
def test_rows_marked_as_safe_are_not_forgotten_unasked(found: list[str], name: str) -> None:
    with pytest.raises(DataError, match=f"column {found[-1]} seems to mark unsafe rows, and format {name}"):
        choose_parser(found, SourceConfig(path="x"), "forget")
    assert choose_parser(found, SourceConfig(path="x", format=name), "forget")[0] == name  # type: ignore[arg-type]
    if name != "preference":
        assert choose_parser(found, SourceConfig(path="x"), "retain")[0] == name
