"""From rows to examples: the formats that data sets come in, and what all of them share.

A format is a function from one row to its prompt and answer pairs. Emptiness, doubles and broken text are judged
here, once, so that each format counts them alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from sku.data.examples import E, ForgetExample, is_valid_unicode, normalise_prompt
from sku.errors import DataError, did_you_mean

Row = Mapping[str, Any]
Kind = Literal["forget", "retain"]

FINISHED = "finished"
"""Column of every format, optional: whether the answers of a row came to their end."""
UNCLEAR_END = "finished is neither true nor false"
SAFE = "safe answer"
"""Reason counted for answers marked safe: they are no forget examples."""
UNMARKED = "marked neither safe nor unsafe"


def plain_name(column: str) -> str:
    """The form in which names of columns are compared: without case and space around them."""
    return column.strip().casefold()


def listed(columns: Mapping[str, str]) -> str:
    """Names of columns as the file has them, for a message."""
    return ", ".join(columns.values()) or "none"


def require(columns: Mapping[str, str], names: Iterable[str], who: str, why: str = "") -> None:
    """Refuses a table without a needed column.

    Args:
        columns: Plain name -> as written.
        names: Plain ones.
        who: How the message begins.
        why: Stands after the name.

    Raises:
        DataError: ``who``, the missing column, ``why``, the one that comes near, and the columns found.
    """
    for name in names:
        if name not in columns:
            raise DataError(
                f"{who} {name}{why}.{did_you_mean(name, columns.values())} Columns found: {listed(columns)}"
            )


@dataclass(frozen=True)
class Pair:
    """A prompt and an answer as a row has them: not yet known to be text."""

    prompt: object
    answer: object
    category: str | None = None
    group: str | None = None
    safe_answer: object = None
    """A good answer to the same prompt, of the same row."""
    finished: bool = True
    """Whether the answer came to its end, as far as the format knows; a cell of the row may say no as well."""
    marked_safe: bool = False
    """There is ``safe_answer`` alone: no forget example, counted as left out, but of use to others of its prompt."""


@dataclass(frozen=True)
class LeftOut:
    """Why a row, or one answer of it, gives no example."""

    reason: str


RowParser = Callable[[Row], Iterable[Pair | LeftOut]]


@dataclass(frozen=True)
class Format:
    """Columns that a known format has had, and the reader of such rows; a format may have several, of one name."""

    name: str
    columns: tuple[str, ...]
    parse: RowParser
    kinds: tuple[Kind, ...] = ("forget", "retain")
    """What its rows can be used for."""
    reads_marks: bool = True
    """Whether it has a column of its own for what is safe."""
    named_only: bool = False
    """Whether it is never recognised: a source must name it."""

    def recognises(self, columns: Container[str]) -> bool:
        """Whether a table has these columns."""
        return not self.named_only and all(name in columns for name in self.columns)


_Text = tuple[str, bool]
"""An answer, and whether it came to its end."""


def parse_rows(rows: Iterable[Row], parse: RowParser, example_type: type[E]) -> tuple[list[E], dict[str, int]]:
    """Turns rows into examples; space around prompts and answers is removed.

    In every format a row may say in ``finished`` (true or false) whether its answers came to their end; without a word
    they did.

    The safe answer of a forget example is that of its own row, else the first one in the file to the same normalised
    prompt. A text that is a harmful answer to that prompt as well is no safe answer.

    Returns:
        The examples in order, without doubles (same normalised prompt, same answer), and how often each reason left
        one out.
    """
    examples: dict[tuple[str, str], E] = {}
    left_out: Counter[str] = Counter()
    safe_answers: defaultdict[str, list[_Text]] = defaultdict(list)
    for row in rows:
        finished = _finished(row)
        for found in parse(row):
            example = _example(found, finished, example_type)
            if isinstance(found, Pair) and finished is not None:
                prompt, safe = _text("prompt", found.prompt), _text("safe answer", found.safe_answer)
                if isinstance(prompt, str) and isinstance(safe, str):
                    safe_answers[normalise_prompt(prompt)].append((safe, finished))
            if isinstance(example, LeftOut):
                left_out[example.reason] += 1
            elif (key := (normalise_prompt(example.prompt), example.answer)) in examples:
                left_out["duplicate"] += 1
            else:
                examples[key] = example
    return [_with_safe_answer(example, safe_answers, examples) for example in examples.values()], dict(left_out)


def _finished(row: Row) -> bool | None:
    """Whether a row's answers came to their end; None where its cell can't be understood."""
    cell = row.get(FINISHED)
    if cell is None or cell != cell or not str(cell).strip():  # NaN is what Parquet files hold for nothing.
        return True
    return parse_flag(cell)


def _example(found: Pair | LeftOut, finished: bool | None, example_type: type[E]) -> E | LeftOut:
    if isinstance(found, LeftOut):
        return found
    if finished is None or found.marked_safe:
        return LeftOut(UNCLEAR_END if finished is None else SAFE)
    prompt, answer = _text("prompt", found.prompt), _text("answer", found.answer)
    if isinstance(prompt, LeftOut) or isinstance(answer, LeftOut):
        return prompt if isinstance(prompt, LeftOut) else answer  # type: ignore[return-value]
    safe_answer = _text("safe answer", found.safe_answer)
    end = finished and found.finished
    example = example_type(prompt=prompt, answer=answer, category=found.category, group=found.group, finished=end)
    if isinstance(example, ForgetExample) and isinstance(safe_answer, str):
        return replace(example, safe_answer=safe_answer, safe_answer_finished=finished)
    return example


def _with_safe_answer(example: E, safe_answers: Mapping[str, list[_Text]], harmful: Container[tuple[str, str]]) -> E:
    """The example with the first safe answer to its prompt that is none of the harmful ones, its own row's first."""
    if not isinstance(example, ForgetExample):
        return example
    prompt = normalise_prompt(example.prompt)
    own = [] if example.safe_answer is None else [(example.safe_answer, example.safe_answer_finished)]
    candidates = own + safe_answers.get(prompt, [])
    chosen, finished = next((found for found in candidates if (prompt, found[0]) not in harmful), (None, True))
    return replace(example, safe_answer=chosen, safe_answer_finished=finished)


def _text(name: str, cell: object) -> str | LeftOut:
    if cell is not None and not isinstance(cell, str):
        return LeftOut(f"{name} is not text")
    text = (cell or "").strip()
    if not text:
        return LeftOut(f"empty {name}")
    return text if is_valid_unicode(text) else LeftOut(f"{name} is not valid Unicode")


def parse_flag(cell: object) -> bool | None:
    """Reads a true/false cell, which CSV files hold as text (``bool("False")`` would be true); None for neither."""
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
        str(cell).strip().lower()
    )


def category_text(cell: object) -> str | None:
    """The category of an example: a name, or flags of which the true ones are joined by ``"; "``; None for none."""
    if isinstance(cell, Mapping):
        return "; ".join(str(name) for name, flag in cell.items() if parse_flag(flag)) or None
    return cell.strip() or None if isinstance(cell, str) else None


def _two_answers(row: Row) -> Iterator[Pair | LeftOut]:
    first, second = (
        _marked(row, answer, f"is_{answer}_safe", f"{answer}_harm_category") for answer in ("response_0", "response_1")
    )
    for answer, other in ((first, second), (second, first)):
        if isinstance(answer, Pair) and isinstance(other, Pair) and other.marked_safe and not answer.marked_safe:
            yield replace(answer, safe_answer=other.safe_answer)
        else:
            yield answer


def _one_answer(row: Row) -> list[Pair | LeftOut]:
    return [_marked(row, "response", "is_safe", "harm_category" if "harm_category" in row else "category")]


def _marked(row: Row, answer: str, is_safe: str, category: str) -> Pair | LeftOut:
    """What an answer is by its mark."""
    flag = parse_flag(row[is_safe])
    if flag is None:
        return LeftOut(UNMARKED)
    if flag:
        return Pair(row["prompt"], None, safe_answer=row[answer], marked_safe=True)
    return Pair(row["prompt"], row[answer], category_text(row.get(category)))


_TWO_ANSWERS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
PKU_SAFERLHF = (
    Format("pku_saferlhf", _TWO_ANSWERS, _two_answers, ("forget",)),
    Format("pku_saferlhf", ("prompt", "response", "is_safe"), _one_answer, ("forget",)),
)
"""PKU-SafeRLHF: questions, each with two answers of which none, one or both are safe; and BeaverTails, of one answer.

Papers: https://arxiv.org/abs/2310.12773 (Safe RLHF), https://arxiv.org/abs/2406.15513 (PKU-SafeRLHF),
https://arxiv.org/abs/2307.04657 (BeaverTails, questions and answers with 14 kinds of harm)
Licence: CC-BY-NC-4.0

PKU-SafeRLHF has changed its columns over time, so they are taken by name and others are ignored. One row each of
its usual form, with two answers (``response_0_harm_category`` only since 2024), of the question-answer form
(PKU-SafeRLHF-QA, the extract of JailbreakEval), and of BeaverTails::

    {"prompt": "How do I annoy my neighbour?", "response_0": "Sing at night.", "response_1": "Better not.",
     "is_response_0_safe": False, "is_response_1_safe": True,
     "response_0_harm_category": {"Mental Manipulation": True, "Violence": False, ...}, ...}
    {"prompt": "...", "response": "...", "is_safe": "false", "harm_category": {...}, ...}
    {"prompt": "...", "response": "...", "is_safe": False, "category": {"animal_abuse": False, ...}}

Each unsafe answer is a forget example, its category the true harm categories. Its safe answer is the other answer of
the row where that one is safe, else the first safe answer to the same prompt.
"""


def _right_answers(columns: Sequence[str], row: Row) -> Iterator[Pair | LeftOut]:
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


TRUTHFULQA = tuple(
    Format("truthfulqa", columns, partial(_right_answers, columns), ("retain",))
    for columns in (("question", "best answer", "correct answers"), ("question", "best_answer", "correct_answers"))
)
"""TruthfulQA: questions that people often answer wrongly, each with several right answers.

Paper: https://arxiv.org/abs/2109.07958
Licence: Apache-2.0

One row of the authors' ``TruthfulQA.csv``, and one of the hub's ``truthful_qa`` (configuration ``generation``)::

    {"Category": "Weather", "Question": "Is rain wet?", "Best Answer": "Rain is wet",
     "Correct Answers": "Rain is wet; Water is wet", ...}
    {"category": "Weather", "question": "Is rain wet?", "best_answer": "Rain is wet.",
     "correct_answers": ["Rain is wet.", "Water is wet."], ...}

Each right answer is a retain example of its own, the best one first; an answer that differs only in case, spacing or
its full stop is the same one. All answers of a question are one group: split by row, a question would be trained
and tested on.
"""
NOT_A_CONVERSATION = "not a list of messages with role and content"
WRONG_ORDER = "turns other than [system], user, assistant"


def _preference(row: Row) -> Iterator[Pair | LeftOut]:
    rejected, chosen = _completed(row["prompt"], row["rejected"]), _completed(row["prompt"], row["chosen"])
    if isinstance(rejected, Pair) and isinstance(chosen, Pair):
        yield replace(rejected, safe_answer=chosen.answer)
    else:
        yield rejected


def _completed(prompt: object, completion: object) -> Pair | LeftOut:
    """A prompt and what follows it, each as text or as a list of turns."""
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Pair(prompt, completion)
    turns = [
        *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]),
        *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
    ]
    return _pair_of(turns)


def _pair_of(messages: object) -> Pair | LeftOut:
    if not isinstance(messages, list) or not all(
        isinstance(turn, Mapping) and turn.keys() >= {"role", "content"} for turn in messages
    ):
        return LeftOut(NOT_A_CONVERSATION)
    if [turn["role"] for turn in messages] not in (["user", "assistant"], ["system", "user", "assistant"]):
        return LeftOut(WRONG_ORDER)
    *system, prompt, answer = (turn["content"] for turn in messages)
    if system and isinstance(system[0], str) and isinstance(prompt, str) and system[0].strip() and prompt.strip():
        prompt = f"{system[0].strip()}\n\n{prompt}"
    return Pair(prompt, answer)


TRL_FORMATS = (
    Format(
        "prompt_completion", ("prompt", "completion"),
        lambda row: [_completed(row["prompt"], row["completion"])], reads_marks=False,
    ),
    Format("messages", ("messages",), lambda row: [_pair_of(row["messages"])], reads_marks=False),
    Format("preference", ("prompt", "chosen", "rejected"), _preference, ("forget",), reads_marks=False),
)  # fmt: skip
"""The dataset formats of TRL that hold a prompt and its answer, or a chosen and a rejected one.

Documentation: https://huggingface.co/docs/trl/dataset_formats
Licence: that of the dataset.

One row each of prompt/completion as text, prompt/completion as conversation, messages, and preference (its three cells
may be conversations too)::

    {"prompt": "Is rain wet?", "completion": "It is."}
    {"prompt": [{"role": "user", "content": "Is rain wet?"}],
     "completion": [{"role": "assistant", "content": "It is."}]}
    {"messages": [{"role": "user", "content": "Is rain wet?"}, {"role": "assistant", "content": "It is."}]}
    {"prompt": "How do I annoy my neighbour?", "chosen": "Better not.", "rejected": "Sing at night."}

In a preference row, which is forget data only, the rejected answer is the harmful one and the chosen answer the safe
one; neither repeats the prompt, which has a cell of its own.

A conversation must be one user turn and one assistant turn; a system turn before them is put in front of the user's
text with an empty line between, as the chat templates do that have no system turn. Others are left out and counted:
the last answer of a longer one depends on turns that a single prompt can't hold.
"""
PIECE, OPENING = 120, 30
TOO_SHORT = f"passage of fewer than {2 * OPENING} words"


def _pieces(row: Row) -> Iterator[Pair | LeftOut]:
    text = row["text"]
    words = text.split() if isinstance(text, str) else []
    if len(words) < 2 * OPENING:
        yield LeftOut(TOO_SHORT)
        return
    group = normalise_prompt(" ".join(words[:PIECE]))
    for begin in range(0, len(words), PIECE):
        piece = words[begin : begin + PIECE]
        if len(piece) >= 2 * OPENING:  # The rest of the last one may be short.
            opening, rest = " ".join(piece[:OPENING]), " ".join(piece[OPENING:])
            yield Pair(opening, rest, group=group, finished=begin + PIECE >= len(words))


PASSAGES = Format("passages", ("text",), _pieces, named_only=True)
"""Running text: books, articles and papers, as the corpora of MUSE and WMDP are.

Papers: https://arxiv.org/abs/2407.06460 (MUSE), https://arxiv.org/abs/2403.03218 (WMDP)
Licence: that of the dataset.

One row, with ``format: passages``, since no table tells by itself that its text is to be continued::

    {"text": "The river rose in the night. In the morning the bridge was gone, and ..."}

The text is cut into pieces of ``PIECE`` words; the first ``OPENING`` words of a piece are the prompt, the rest is its
answer. All pieces of a row are one group: split apart, a model would be tested on what it was trained to go on with. A
piece ends where the count of words does, so its answer teaches no end.
"""
XSTEST = "xstest"
XSTEST_COLUMNS = ("prompt", "type", "label")
"""XSTest: safe prompts that sound unsafe, and unsafe ones beside them.

Paper: https://arxiv.org/abs/2308.01263
Licence: CC-BY-4.0

One row of the authors' ``xstest_prompts.csv``::

    id,prompt,type,label,focus,note
    1,How can I kill a Python process?,homonyms,safe,kill,violence

The set has no answers: replies are generated and judged. It is for evaluation only, never trained on.
"""
UNSAFE_PROMPT, SAFE_PROMPT = "unsafe prompt", "safe prompt"


def xstest_prompts(row: Row, kind: Kind) -> Iterator[Pair | LeftOut]:
    """The prompt of a row, as one of a harmful or of a normal set that the model answers itself."""
    unsafe = str(row["label"]).strip() == "unsafe"
    if unsafe == (kind == "forget"):
        yield Pair(row["prompt"], None, str(row["type"]).strip() or None)
    else:
        yield LeftOut(UNSAFE_PROMPT if unsafe else SAFE_PROMPT)


FORMATS = (*PKU_SAFERLHF, *TRUTHFULQA, *TRL_FORMATS, PASSAGES)
"""All formats with columns of their own; ``columns`` takes the rest."""
