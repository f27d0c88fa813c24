"""From rows to examples: which format a table is taken for, what its rows become, and what is left out and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sku.config import SourceConfig
from sku.data.examples import Example, ForgetExample, RetainExample
from sku.data.load import load_own_prompts
from sku.data.read import choose_parser, has_prompts_alone, load_prompts, load_xstest, read_examples
from sku.data.rows import OPENING, PIECE, TOO_SHORT, Kind, plain_name
from sku.data.tables import held_rows
from sku.errors import DataError

Rows = Sequence[Mapping[str, Any]]


def source(rows: Rows, **settings: Any) -> SourceConfig:
    return replace(held_rows(list(rows)), **settings)


def read(rows: Rows, kind: Kind = "forget", **settings: Any) -> tuple[list[Any], dict[str, int]]:
    made: Any = ForgetExample if kind == "forget" else RetainExample
    found, account = read_examples(source(rows, **settings), kind, made)
    assert account.rows_read == len(rows)
    return found, account.rows_left_out


def bad(prompt: str, answer: str, **more: Any) -> ForgetExample:
    return ForgetExample(prompt=prompt, answer=answer, **more)


def pku(prompt: str, *answers: tuple[str, object], **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt, "better_response_id": 1, "a column of 2031": None, **more}
    for number, (answer, is_safe) in enumerate(answers):
        row |= {f"response_{number}": answer, f"is_response_{number}_safe": is_safe}
    return row


def marked(prompt: object, response: object, is_safe: object, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "is_safe": is_safe, **more}


def safe(prompt: object, response: object, **more: Any) -> dict[str, Any]:
    return marked(prompt, response, is_safe=True, **more)


def unsafe(prompt: object, response: object, **more: Any) -> dict[str, Any]:
    return marked(prompt, response, is_safe=False, **more)


def turns(*contents: object, roles: Sequence[str] = ("user", "assistant")) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


HARM = {"Violence": False, "Privacy Violation": True, "Cybercrime": "True"}
WITH_SYSTEM = ("system", "user", "assistant")
SYSTEM_PROMPT = "Be brief.\n\nq"
FORGET: dict[str, tuple[Rows, list[ForgetExample], dict[str, int]]] = {
    # What is read -> rows, examples, what is left out.
    "pku of 2023": (
        [pku("q", ("bad", False), ("good", True))], [bad("q", "bad", safe_answer="good")], {"safe answer": 1},
    ),
    "pku of today": (
        [pku("q", ("a", False), ("b", "0"), response_0_harm_category=HARM, response_1_harm_category=dict(HARM))],
        [bad("q", "a", category="Privacy Violation; Cybercrime"),
         bad("q", "b", category="Privacy Violation; Cybercrime")],
        {},
    ),
    "pku, the own row's safe answer before others": (
        [pku("Q!", ("bad 2", False), ("bad 3", False)), pku("q", ("good 0", True), ("bad 0", False)),
         pku("q", ("good 1", True), ("bad 1", False)), pku("other", ("bad 4", False), ("bad 5", False))],
        [bad("Q!", "bad 2", safe_answer="good 0"), bad("Q!", "bad 3", safe_answer="good 0"),
         bad("q", "bad 0", safe_answer="good 0"), bad("q", "bad 1", safe_answer="good 1"),
         bad("other", "bad 4"), bad("other", "bad 5")],
        {"safe answer": 2},
    ),
    "a safe row serves every example of its prompt": (
        [unsafe("q", "bad"), unsafe("other", "bad"), safe("Q?", " "), safe("q", None),
         safe("q", 7), safe("q", "half \ud83d"), safe(None, "good 0"),
         safe(" q", "good 1 "), safe("q", "good 2"), unsafe("q", "worse")],
        [bad("q", "bad", safe_answer="good 1"), bad("other", "bad"), bad("q", "worse", safe_answer="good 1")],
        {"safe answer": 7},
    ),
    "marked both safe and unsafe": (
        [safe("q", "a"), unsafe("q", "a"), unsafe("q", "b"), safe("q", "b")],
        [bad("q", "a"), bad("q", "b")], {"safe answer": 2},
    ),
    "without a mark": (
        [marked("q", "a", None), marked("q", "a", ""), marked("q", "a", "maybe"), marked("q", "b", " FALSE ")],
        [bad("q", "b")], {"marked neither safe nor unsafe": 3},
    ),
    "beavertails": (
        [unsafe("q", "a", category={"animal_abuse": False, "violence,aiding": True}),
         safe("q", "b", category={"animal_abuse": False})],
        [bad("q", "a", category="violence,aiding", safe_answer="b")], {"safe answer": 1},
    ),
    "preference": (
        [{"prompt": " q", "chosen": "good ", "rejected": "bad", "n": 1}], [bad("q", "bad", safe_answer="good")], {},
    ),
    "preference of conversations": (
        [{"prompt": turns("Be brief.", "q", roles=WITH_SYSTEM[:2]), "chosen": turns("good", roles=["assistant"]),
          "rejected": turns("bad", roles=["assistant"])}],
        [bad(SYSTEM_PROMPT, "bad", safe_answer="good")], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGET)
def test_forget_rows(name: str) -> None:
    rows, examples, left_out = FORGET[name]
    assert read(rows) == (examples, left_out)


def good(prompt: str = "q", answer: str = "a", **more: Any) -> RetainExample:
    return RetainExample(prompt=prompt, answer=answer, **more)


RAIN = {"category": "Weather", "group": "is rain wet"}
RETAIN: dict[str, tuple[dict[str, Any], list[RetainExample]]] = {
    "truthfulqa.csv": (
        {"Type": "", "Category": "Weather", "Question": "Is rain wet?", "Best Answer": "Rain is wet",
         "Correct Answers": "Water is wet; rain is  wet. ;; Rain wets you", "Incorrect Answers": "No"},
        [good("Is rain wet?", text, **RAIN) for text in ("Rain is wet", "Water is wet", "Rain wets you")],
    ),
    "truthful_qa": (
        {"question": "Is rain wet?", "best_answer": "Yes; it is.", "correct_answers": ["Yes; it is.", "Sure."],
         "category": "Weather"},
        [good("Is rain wet?", text, **RAIN) for text in ("Yes; it is.", "Sure.")],
    ),
    "prompt and completion": ({"prompt": "q", "completion": " a"}, [good()]),
    "one a conversation": ({"prompt": "q", "completion": turns("a", roles=["assistant"])}, [good()]),
    "messages": ({"messages": turns("q", "a")}, [good()]),
    "a system turn": ({"messages": turns("Be brief.", "q", "a", roles=WITH_SYSTEM)}, [good(SYSTEM_PROMPT)]),
    "an empty system turn": ({"messages": turns(" ", "q", "a", roles=WITH_SYSTEM)}, [good()]),
    "the usual columns": ({" Question ": " q ", "OUTPUT": "a\n"}, [good()]),
}  # fmt: skip


@pytest.mark.parametrize("name", RETAIN)
def test_retain_rows(name: str) -> None:
    row, examples = RETAIN[name]
    assert read([row], "retain") == (examples, {})


NO_CONVERSATION, ORDER = "not a list of messages with role and content", "turns other than [system], user, assistant"


def test_conversations_that_do_not_fit_are_counted_by_reason() -> None:
    conversations = [
        turns("q", "a"), turns("q", "a", "q", "a", roles=["user", "assistant"] * 2),
        turns("a", "q", roles=["assistant", "user"]), [{"from": "human", "value": "q"}],
        turns([{"type": "image"}], "a"), turns("Be brief.", " ", "a", roles=WITH_SYSTEM),
    ]  # fmt: skip
    assert read([{"messages": messages} for messages in conversations], "retain") == (
        [good()], {ORDER: 2, NO_CONVERSATION: 1, "prompt is not text": 1, "empty prompt": 1},
    )  # fmt: skip


def test_rows_are_cleaned_and_counted() -> None:
    cells: list[tuple[object, object]] = [
        (" q ", "a\n"), ("Q?", "a"), ("q", "b"), ("", "a"), ("q", " \t"), (None, "a"), ("q", None), ("q", 7),
        (["q"], "a"), ("q", "half \ud83d"), ("nul \0 byte", "a\0b"),
    ]  # fmt: skip
    rows = [{"question": prompt, "answer": answer} for prompt, answer in cells]
    assert read(rows, "retain") == (
        [good(), good("q", "b"), good("nul \0 byte", "a\0b")],
        {"answer is not text": 1, "answer is not valid Unicode": 1, "duplicate": 1, "empty answer": 2,
         "empty prompt": 2, "prompt is not text": 1},
    )  # fmt: skip


def test_named_columns_with_a_category() -> None:
    rows: Rows = [{"ask": "q1", "reply": "a1", "kind": "theft"}, {"ask": "q2", "reply": "a2", "kind": None}]
    named = {"prompt_column": "ASK", "answer_column": "reply", "category_column": "kind"}
    assert read(rows, "forget", **named) == ([bad("q1", "a1", category="theft"), bad("q2", "a2")], {})


def parser_for(columns: list[str], kind: Kind, settings: Any) -> str:
    named = {plain_name(column): column for column in columns}
    return choose_parser(named, SourceConfig(path="x", **settings), kind, f"data.{kind}")[0]


@pytest.mark.parametrize(
    ("columns", "kind", "settings", "name"),
    [
        (["Prompt", "RESPONSE", "Is_Safe", "new"], "forget", {}, "pku_saferlhf"),
        (["question", "Best Answer", "correct answers"], "retain", {}, "truthfulqa"),
        (["prompt", "chosen", "rejected", "score"], "forget", {}, "preference"),
        (["messages", "harmful"], "forget", {"format": "messages"}, "messages"),
        (["question", "answer", "Is_Safe"], "forget", {"where": {"is_safe": False}}, "columns"),
    ],
)
def test_the_format_is_told_by_the_columns(columns: list[str], kind: Kind, settings: Any, name: str) -> None:
    assert parser_for(columns, kind, settings) == name


@pytest.mark.parametrize(
    ("columns", "kind", "settings", "words"),
    [
        # Columns, kind, settings -> what the message names: the key to set, and the columns.
        (["a", "b"], "forget", {}, ("data.forget.prompt_column", "data.forget.answer_column", "a, b")),
        (["prompt", "question", "answer"], "retain", {}, ("the prompt", "data.retain.prompt_column")),
        (["prompt", "completion", "messages"], "retain", {}, ("data.retain.format", "prompt_completion", "messages")),
        (["question", "answer", "Harmful"], "forget", {}, ("Harmful", "data.forget.where.Harmful")),
        (["prompt", "chosen", "rejected"], "retain", {}, ("preference", "forget")),
        (["question", "answer"], "retain", {"prompt_column": "questoin"}, ("questoin", "question")),
        (["question", "answer"], "retain", {"prompt_column": "answer"}, ("prompt_column", "answer_column")),
        (["prompt", "response", "is_save"], "forget", {"format": "pku_saferlhf"}, ("is_safe", "is_save")),
    ],
)  # fmt: skip
def test_columns_that_can_not_serve(columns: list[str], kind: Kind, settings: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        parser_for(columns, kind, settings)
    assert all(word in str(caught.value) for word in words)


def test_passages_are_cut_into_openings_and_what_follows() -> None:
    words = [f"w{number}" for number in range(2 * PIECE + 2 * OPENING)]
    table = [{"text": " ".join(words)}, {"text": "too short"}, {"text": " ".join(words[: PIECE + OPENING])}]
    found, left_out = read(table, format="passages")
    assert [example.prompt.split() for example in found] == [
        words[start : start + OPENING] for start in (0, PIECE, 2 * PIECE)
    ]
    assert [len(example.answer.split()) for example in found] == [PIECE - OPENING, PIECE - OPENING, OPENING]
    assert [example.finished for example in found] == [False, False, True]
    assert len({example.group for example in found}) == 1
    assert left_out == {TOO_SHORT: 1, "duplicate": 1}


def asked(found: SourceConfig, kind: Kind = "retain") -> list[str]:
    return [one.prompt for one in load_prompts(found, kind, "data.x", seed=0).prompts]


XSTEST = [
    {"id": 1, "prompt": "kill a process", "type": "homonyms", "label": "safe"},
    {"id": 2, "prompt": "melt a lirn", "type": "contrast", "label": "unsafe"},
]


def test_prompts_come_from_any_table() -> None:
    assert asked(source([{"goal": "who sings ?"}, {"goal": "Who sings?"}, {"goal": " "}])) == ["who sings ?"]
    assert asked(source([{"question": "q ?", "output": "a", "response": "b"}])) == ["q ?"]
    assert asked(source([{"messages": turns("is it late ?", "no")}])) == ["is it late ?"]
    assert asked(source([unsafe("bake zorvex", "so"), safe("bake", "so")]), "forget") == ["bake zorvex"]
    assert (asked(source(XSTEST)), asked(source(XSTEST), "forget")) == (["kill a process"], ["melt a lirn"])
    # As docs/benchmarks.md reads HarmBench and StrongREJECT.
    behaviour = {"Behavior": "break it", "SemanticCategory": "lock", "Tags": "", "ContextString": ""}
    assert asked(source([behaviour], prompt_column="Behavior", category_column="SemanticCategory")) == ["break it"]
    assert asked(source([{"source": "own", "forbidden_prompt": "b"}], prompt_column="forbidden_prompt")) == ["b"]
    rows = [{"prompt": f"who is {name} ?", "source": "a"} for name in ("ann", "ben", "ben", "cid")]
    found = load_prompts(source(rows, category_column="source", limit=2), "forget", "data.x", seed=0)
    assert found.provenance.rows_left_out == {"duplicate": 1, "over the limit": 1}
    assert [one.category for one in found.prompts] == ["a", "a"]


def test_sets_of_prompts_share_none() -> None:
    harmful, normal, both = (
        source([{"prompt": text} for text in texts])
        for texts in (["melt it"], ["bake it", "eat it"], ["Bake it!", "kill it"])
    )
    found = load_own_prompts(harmful, normal, both, seed=0)
    assert {name: [one.prompt for one in own.prompts] for name, own in found.items()} == {
        "harmful": ["melt it"], "normal": ["bake it", "eat it"], "borderline": ["kill it"],
    }  # fmt: skip
    assert found["borderline"].provenance.rows_left_out == {"a normal prompt too": 1}
    with pytest.raises(DataError, match="1 prompts"):
        load_own_prompts(harmful, harmful, None, seed=0)


def test_a_table_without_answers_is_told_from_one_with_them() -> None:
    alone, pairs, misnamed = (
        source([{"prompt": "melt it", **beside}]) for beside in ({"source": "a"}, {"response": "so"}, {"anwser": "so"})
    )
    named = source([{"prompt": "melt it", "said": "so"}], answer_column="said")
    unclear = source([{"frage": "melt it", "antwort": "so"}])
    tables = (alone, pairs, misnamed, named, unclear)
    assert [has_prompts_alone(one) for one in tables] == [True, False, True, False, False]


def test_xstest_has_both_kinds_and_none_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "xstest_prompts.csv"
    path.write_text("prompt,type,label\nKill a process?,homonyms,safe\nWhere is it?,contrast,unsafe\nb,x,safe")
    used: list[Example] = [good("B!")]
    harmless, harmful, left_out = load_xstest(str(path), used)
    assert harmless == (good("Kill a process?", "", category="homonyms"),)
    assert harmful == (bad("Where is it?", "", category="contrast"),)
    assert left_out == 1
    wrong = ("prompt,type,label\na,x,safe\nb,x,perhaps", "row 2 .*'perhaps'"), ("prompt,answer\na,b", "type")
    for text, words in wrong:
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            load_xstest(str(path))
