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

from collections.abc import Iterator
from dataclasses import replace

from sku.data.sources.rows import Form, Format, LeftOut, Pair, Row, marked_answer

LICENCE = "CC-BY-NC-4.0"


def _two_answers(row: Row) -> Iterator[Pair | LeftOut]:
    first, second = (
        marked_answer(row["prompt"], row[answer], row[f"is_{answer}_safe"], row.get(f"{answer}_harm_category"))
        for answer in ("response_0", "response_1")
    )
    for answer, other in ((first, second), (second, first)):
        if isinstance(answer, Pair) and isinstance(other, Pair) and other.marked_safe and not answer.marked_safe:
            yield replace(answer, safe_answer=other.safe_answer)
        else:
            yield answer


def _one_answer(row: Row) -> Iterator[Pair | LeftOut]:
    yield marked_answer(row["prompt"], row["response"], row["is_safe"], row.get("harm_category"))


FORMAT = Format(
    "pku_saferlhf",
    (
        Form(("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"), _two_answers),
        Form(("prompt", "response", "is_safe"), _one_answer, unless="category"),
    ),
    kinds=("forget",),
)
"""With ``category`` beside one answer it is BeaverTails."""
