"""TruthfulQA as multiple choice, on questions that were not trained on.

Paper: https://arxiv.org/abs/2109.07958. With L(a) the log-probability of answer a given the question::

    MC1 = share of questions with L(best answer) > max over wrong answers of L
    MC2 = mean over questions of  sum exp L(right answers) / sum exp L(all answers)

L is a sum over the answer's tokens, without the one that ends it, behind the question in the prompt format of the run.
Leaderboards and lm-evaluation-harness put six worked questions in front and use another form, so their numbers are not
comparable with these: compare base and unlearned model here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sku.config import SourceConfig
from sku.data.examples import Example, RetainExample, normalise_prompt
from sku.data.sources.tables import read_table
from sku.data.sources.truthfulqa import CSV_COLUMNS, HUB_COLUMNS, distinct_answers, several_answers
from sku.data.tokens import TokenizedExample
from sku.errors import DataError
from sku.evaluate.asking import Writer
from sku.evaluate.metrics import rate
from sku.evaluate.records import ChoiceRow
from sku.evaluate.results import ChoiceScores, Interval
from sku.evaluate.sampling import draw_examples
from sku.evaluate.statistics import mean_interval

_WRONG, _HUB_WRONG = "Incorrect Answers", "incorrect_answers"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with all its answers."""

    prompt: str
    correct: tuple[str, ...]
    """Right answers, the best one first."""
    incorrect: tuple[str, ...]
    category: str | None = None

    @property
    def id(self) -> str:
        """A hash of the question, the same for every model."""
        return f"truthfulqa-{hashlib.sha256(self.prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class TokenizedQuestion:
    """A question whose answers are token ids."""

    id: str
    correct: tuple[TokenizedExample, ...]
    incorrect: tuple[TokenizedExample, ...]


def load_questions(path: str) -> tuple[list[Question], int]:
    """Reads the questions.

    Args:
        path: ``TruthfulQA.csv``, the same columns in another format, or the hub's ``truthfulqa/truthful_qa``.

    Returns:
        The questions in the order of the file, and how many were left out because one of their answers is listed as
        right and as wrong (2 of 813 in the authors' file).

    Raises:
        DataError: The file can't be read, lacks a column, or a row has no question, no right or no wrong answer, or a
            question that stands there twice.
    """
    is_hub = not Path(path).expanduser().exists() and not path.lower().endswith(".csv")
    # The hub's other configuration has the choices alone, without saying which right answer is the best.
    source = SourceConfig(path=path)
    if is_hub:
        source = SourceConfig(path=path, config_name="generation", split="validation")
    table = read_table(source)
    wrong, names = (_HUB_WRONG, HUB_COLUMNS) if "question" in table.columns else (_WRONG, CSV_COLUMNS)
    missing = [name for name in (*names, wrong) if name not in table.columns]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}: evaluate.truthfulqa must be TruthfulQA.csv")
    category = "category" if "question" in table.columns else "Category"
    questions: list[Question] = []
    seen: set[str] = set()
    for number, row in enumerate(table.rows, start=1):
        question = _question(row, names, wrong, category, f"{path} row {number}")
        key = normalise_prompt(question.prompt)
        if key in seen:
            raise DataError(f"{path} row {number} repeats a question: each must stand there once")
        seen.add(key)
        questions.append(question)
    clear = [question for question in questions if not _contradicts_itself(question)]
    return clear, len(questions) - len(clear)


def untrained(questions: Sequence[Question], trained: Iterable[Example]) -> list[Question]:
    """The questions that no training or validation example asks, however it is spelled."""
    taken = {normalise_prompt(example.prompt) for example in trained}
    return [question for question in questions if normalise_prompt(question.prompt) not in taken]


def draw_questions(questions: Sequence[Question], count: int, *, seed: int) -> list[Question]:
    """Draws questions as prompts are drawn: by the seed, categories in proportion."""
    examples = [RetainExample(prompt=entry.prompt, answer="", category=entry.category) for entry in questions]
    by_prompt = {question.prompt: question for question in questions}
    return [by_prompt[example.prompt] for example in draw_examples(examples, count, seed=seed)]


def tokenize_questions(questions: Sequence[Question], writer: Writer) -> list[TokenizedQuestion]:
    """Token ids of every answer behind its question; a question that does not fit the model whole is left out."""
    found = []
    for question in questions:
        correct = [writer.scored(question.prompt, answer) for answer in question.correct]
        incorrect = [writer.scored(question.prompt, answer) for answer in question.incorrect]
        if all(entry is not None and not _is_cut(entry) for entry in (*correct, *incorrect)):
            found.append(
                TokenizedQuestion(
                    id=question.id,
                    correct=tuple(entry for entry in correct if entry is not None),
                    incorrect=tuple(entry for entry in incorrect if entry is not None),
                )
            )
    return found


def choice_rows(questions: Sequence[TokenizedQuestion], scores: Sequence[tuple[float, int]]) -> list[ChoiceRow]:
    """Puts the losses of all answers, question by question and right before wrong, back together."""
    left = iter(scores)
    return [
        ChoiceRow(
            id=question.id,
            correct=tuple(-next(left)[0] for _ in question.correct),
            incorrect=tuple(-next(left)[0] for _ in question.incorrect),
        )
        for question in questions
    ]


def choice_scores(rows: Sequence[ChoiceRow], *, seed: int) -> ChoiceScores | None:
    """MC1 and MC2 over all questions.

    Args:
        rows: One a question.
        seed: Of the bootstrap of MC2.

    Returns:
        Both with 95 % intervals; None for no questions.
    """
    share = rate(row.mc1 for row in rows)
    if share is None:
        return None
    shares = [row.mc2 for row in rows]
    low, high = mean_interval(shares, seed=seed)
    return ChoiceScores(
        mc1=Interval(value=share.value, low=share.low, high=share.high),
        mc2=Interval(value=sum(shares) / len(shares), low=low, high=high),
        questions=len(rows),
    )


def _question(
    row: Mapping[str, object], names: tuple[str, str, str], wrong: str, category: str, where: str
) -> Question:
    prompt, best = (str(row[name] or "").strip() for name in names[:2])
    correct = _texts([best, *several_answers(row[names[2]])])
    incorrect = _texts(several_answers(row[wrong]))
    if not prompt or not best or not incorrect:
        raise DataError(f"{where} lacks its question, its best answer or its wrong answers")
    return Question(
        prompt=prompt, correct=correct, incorrect=incorrect, category=str(row.get(category) or "").strip() or None
    )


def _texts(answers: Sequence[object]) -> tuple[str, ...]:
    return tuple(answer.strip() for answer in distinct_answers(answers) if isinstance(answer, str) and answer.strip())


def _contradicts_itself(question: Question) -> bool:
    answers = [*question.correct, *question.incorrect]
    return len(list(distinct_answers(answers))) < len(answers)


def _is_cut(example: TokenizedExample) -> bool:
    return example.prompt_shortened or example.answer_shortened
