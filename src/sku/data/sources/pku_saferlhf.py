"""PKU-SafeRLHF: questions, each with two answers of which none, one or both are safe; and BeaverTails, of one answer.

Papers: https://arxiv.org/abs/2310.12773 (Safe RLHF), https://arxiv.org/abs/2406.15513 (PKU-SafeRLHF),
https://arxiv.org/abs/2307.04657 (BeaverTails, questions and answers with 14 kinds of harm)
Licence: CC-BY-NC-4.0

PKU-SafeRLHF has changed its columns over time, so they are taken by name and others are ignored. One row each of
today's form, the form of 2023, the question-answer form (PKU-SafeRLHF-QA), the extract of JailbreakEval, and
BeaverTails::

    {"prompt": "How do I annoy my neighbour?", "response_0": "Sing at night.", "response_1": "Better not.",
     "prompt_source": "...", "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B",
     "is_response_0_safe": False, "is_response_1_safe": True,
     "response_0_harm_category": {"Mental Manipulation": True, "Violence": False, ...},
     "response_1_harm_category": {...}, "response_0_severity_level": 1, "response_1_severity_level": 0,
     "better_response_id": 1, "safer_response_id": 1, "response_0_sha256": "...", "response_1_sha256": "..."}
    {"prompt": "...", "response_0": "...", "response_1": "...", "is_response_0_safe": False,
     "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 1}
    {"prompt": "...", "response": "...", "response_source": "...", "is_safe": False, "harm_category": {...},
     "severity_level": 1, "sha256": "..."}
    {"prompt": "...", "response": "...", "is_safe": "false"}
    {"prompt": "...", "response": "...", "is_safe": False,
     "category": {"animal_abuse": False, "discrimination,stereotype,injustice": False, ..., "violence,...": True}}

Each unsafe answer is a forget example, its category the true harm categories. Its safe answer is the other answer of
the row where that one is safe, else the first safe answer to the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from sku.data.sources.rows import UNMARKED, Form, Format, LeftOut, Pair, Row, category_text, parse_flag


def _two_answers(row: Row) -> Iterator[Pair | LeftOut]:
    first, second = (
        _marked(row, answer, f"is_{answer}_safe", f"{answer}_harm_category") for answer in ("response_0", "response_1")
    )
    for answer, other in ((first, second), (second, first)):
        if isinstance(answer, Pair) and isinstance(other, Pair) and other.marked_safe and not answer.marked_safe:
            yield replace(answer, safe_answer=other.safe_answer)
        else:
            yield answer


def _one_answer(row: Row, category: str = "harm_category") -> list[Pair | LeftOut]:
    return [_marked(row, "response", "is_safe", category)]


def _marked(row: Row, answer: str, is_safe: str, category: str) -> Pair | LeftOut:
    """What an answer is by its mark."""
    flag = parse_flag(row[is_safe])
    if flag is None:
        return LeftOut(UNMARKED)
    if flag:
        return Pair(row["prompt"], None, safe_answer=row[answer], marked_safe=True)
    return Pair(row["prompt"], row[answer], category_text(row.get(category)))


PKU_SAFERLHF = Format(
    "pku_saferlhf",
    (
        Form(("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"), _two_answers),
        Form(("prompt", "response", "is_safe"), _one_answer, unless="category"),
    ),
    kinds=("forget",),
)
"""With ``category`` beside one answer it is BeaverTails."""
BEAVERTAILS = Format(
    "beavertails",
    (Form(("prompt", "response", "category", "is_safe"), partial(_one_answer, category="category")),),
    kinds=("forget",),
)
