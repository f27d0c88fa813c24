"""PKU-SafeRLHF: questions, each with two answers of which none, one or both are safe.

Paper: https://arxiv.org/abs/2310.12773 (Safe RLHF), https://arxiv.org/abs/2406.15513 (PKU-SafeRLHF)
Licence: CC-BY-NC-4.0

The dataset has changed its columns over time, so they are taken by name and others are ignored. One row each of
today's form, the form of 2023, the question-answer form (PKU-SafeRLHF-QA), and the extract of JailbreakEval::

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

Each unsafe answer is a forget example, its category the true harm categories. Its safe answer is the other answer of
the row where that one is safe, else the first safe answer to the same prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from sku.data.rows import LeftOut, Pair, Row, RowParser, SafeAnswer, marked_answer, require_columns

NAME = "pku_saferlhf"
LICENCE = "CC-BY-NC-4.0"
TWO_ANSWERS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
ONE_ANSWER = ("prompt", "response", "is_safe")


def recognises(columns: Collection[str]) -> bool:
    """Whether a table with these columns is one of the forms above. A ``category`` column makes it BeaverTails."""
    if all(name in columns for name in TWO_ANSWERS):
        return True
    return all(name in columns for name in ONE_ANSWER) and "category" not in columns


def row_parser(columns: Collection[str]) -> RowParser:
    """Picks the form by its columns.

    Raises:
        DataError: A needed column is missing.
    """
    if "response" in columns and "response_0" not in columns:
        require_columns(ONE_ANSWER, columns, NAME)
        return _parse_one_answer
    require_columns(TWO_ANSWERS, columns, NAME)
    return _parse_two_answers


def _parse_two_answers(row: Row) -> Iterator[Pair | SafeAnswer | LeftOut]:
    first, second = (
        marked_answer(row["prompt"], row[answer], row[f"is_{answer}_safe"], row.get(f"{answer}_harm_category"))
        for answer in ("response_0", "response_1")
    )
    for answer, other in ((first, second), (second, first)):
        if isinstance(answer, Pair) and isinstance(other, SafeAnswer):
            yield dataclasses.replace(answer, safe_answer=other.answer)
        else:
            yield answer


def _parse_one_answer(row: Row) -> Iterator[Pair | SafeAnswer | LeftOut]:
    yield marked_answer(row["prompt"], row["response"], row["is_safe"], row.get("harm_category"))
