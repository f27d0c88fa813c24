"""TruthfulQA: questions that people often answer wrongly, each with several right answers.

Paper: https://arxiv.org/abs/2109.07958
Licence: Apache-2.0

One row of the authors' ``TruthfulQA.csv``, and one of the hub's ``truthful_qa`` (configuration ``generation``)::

    {"Type": "Adversarial", "Category": "Weather", "Question": "Is rain wet?", "Best Answer": "Rain is wet",
     "Correct Answers": "Rain is wet; Water is wet", "Incorrect Answers": "Rain is dry", "Source": "..."}
    {"type": "Adversarial", "category": "Weather", "question": "Is rain wet?", "best_answer": "Rain is wet.",
     "correct_answers": ["Rain is wet.", "Water is wet."], "incorrect_answers": ["Rain is dry."], "source": "..."}

Each right answer is a retain example of its own, the best one first; an answer that differs only in case, spacing or
its full stop is the same one. All answers of a question are one group: split by row, a question would be trained
and tested on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sku.data.examples import normalise_prompt
from sku.data.sources.rows import Form, Format, LeftOut, Pair, Row, category_text

CSV_COLUMNS = ("Question", "Best Answer", "Correct Answers")
HUB_COLUMNS = ("question", "best_answer", "correct_answers")


def _parse(columns: tuple[str, str, str], row: Row) -> Iterator[Pair | LeftOut]:
    question, best, correct = (row[name] for name in columns)
    group = normalise_prompt(question) if isinstance(question, str) else None
    others = correct.split(";") if isinstance(correct, str) else correct
    distinct: dict[object, object] = {}
    for answer in (best, *(others if isinstance(others, list | tuple) else ())):
        key = " ".join(answer.split()).rstrip(".").casefold() if isinstance(answer, str) else answer
        if key not in (None, ""):
            distinct.setdefault(key, answer)
    if not distinct:
        yield LeftOut("empty answer")
    for answer in distinct.values():
        yield Pair(question, answer, category_text(row.get("category")), group)


FORMAT = Format(
    "truthfulqa",
    tuple(Form(columns, partial(_parse, columns)) for columns in (CSV_COLUMNS, HUB_COLUMNS)),
    kinds=("retain",),
)
