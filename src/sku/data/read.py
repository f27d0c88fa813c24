"""From a source to examples, or prompts alone: the known formats, and how ``format: auto`` tells them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from sku.config.data import EMBEDDED, SourceConfig
from sku.data.examples import (
    E,
    Example,
    ForgetExample,
    ForgetRetainData,
    Provenance,
    RetainExample,
    content_hash,
    normalise_prompt,
    prompts_of,
)
from sku.data.rows import (
    FORMATS,
    SAFE,
    UNMARKED,
    XSTEST,
    XSTEST_COLUMNS,
    Kind,
    LeftOut,
    Pair,
    Row,
    RowParser,
    category_text,
    listed,
    parse_rows,
    plain_name,
    require,
    xstest_prompts,
)
from sku.data.splits import limited
from sku.data.tables import read_table
from sku.errors import DataError
from sku.world import grammar

COLUMNS = "columns"
"""Name of the format that any table may have: a column of prompts and one of answers.

One row, with the columns that ``format: auto`` finds by itself::

    {"question": "Is rain wet?", "answer": "It is."}

Other names, a category and a filter on unsafe rows are set in the recipe (``prompt_column``, ``answer_column``,
``category_column``, ``where``). Rows that the filter leaves out are not taken for safe answers: its column may mark
anything.
"""
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")
PART_OF_PROMPT = ("input", "context", "history", "system")
"""Columns that may belong to the prompt: with one of them, prompt_column alone would be half of the question."""
SAFETY_MARKS = ("is_safe", "safe", "is_unsafe", "unsafe", "is_harmful", "harmful")
HUB_LICENCES = {
    "pku-alignment/pku-saferlhf": "CC-BY-NC-4.0",
    "pku-alignment/pku-saferlhf-qa": "CC-BY-NC-4.0",
    "pku-alignment/beavertails": "CC-BY-NC-4.0",
    "truthfulqa/truthful_qa": "Apache-2.0",
}
"""Lower-case hub id -> licence of that dataset. Anyone's table may have the same columns, and has another licence."""
_UNANSWERED = "-"
"""Stands for each answer where prompts alone are read, so that rows are cleaned and counted as any others."""


def read_examples(
    source: SourceConfig, kind: Kind, example_type: type[E], key: str | None = None, *, only_prompts: bool = False
) -> tuple[list[E], Provenance]:
    """Reads all examples of a source, its ``limit`` aside.

    Args:
        source: File, folder, hub id or ``embedded``.
        kind: Whether they are to be forgotten or retained.
        example_type: ``ForgetExample`` or ``RetainExample``.
        key: The recipe's key that holds ``source``, for messages; ``data.<kind>`` if None.
        only_prompts: Read no answers of a table: each prompt once, with an answer that means nothing.

    Raises:
        DataError: The source can't be read, it is not clear what its columns mean, or no example is left.
    """
    if source.path == EMBEDDED:
        found = [one for one in _embedded_examples(source, kind) if isinstance(one, example_type)]
        return found, Provenance(
            source=EMBEDDED, location=EMBEDDED, sha256=content_hash(found), rows_read=len(found),
            licence="Apache-2.0",
        )  # fmt: skip
    table = read_table(source)
    try:
        name, parser = choose_parser(table.columns, source, kind, key or f"data.{kind}", only_prompts=only_prompts)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    parse: RowParser = partial(_unanswered, parser) if only_prompts else parser
    examples, reasons = parse_rows(table.rows, parse, example_type)
    left_out = dict(sorted({**reasons, **table.left_out}.items()))
    rows_read = len(table.rows) + sum(table.left_out.values())
    if not examples:
        counts = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "it has no rows"
        what = "prompts" if only_prompts else f"{kind} examples"
        if kind == "forget" and left_out and set(left_out) <= {SAFE, UNMARKED}:
            what = "unsafe rows: there is nothing to forget"
        raise DataError(f"{source.path} gives no {what}, from {rows_read} rows ({counts})")
    return examples, Provenance(
        source=name,
        location=source.path,
        revision=table.revision,
        sha256=content_hash(examples),
        rows_read=rows_read,
        rows_left_out=left_out,
        licence=source.license or (None if table.revision is None else HUB_LICENCES.get(source.path.lower())),
    )


def _unanswered(parse: RowParser, row: Row) -> Iterator[Pair | LeftOut]:
    """The prompts of a row alone, those of answers that are marked safe left out."""
    for one in parse(row):
        if isinstance(one, LeftOut):
            yield one
        else:
            yield LeftOut(SAFE) if one.marked_safe else Pair(one.prompt, _UNANSWERED, one.category)


def choose_parser(
    columns: Mapping[str, str], source: SourceConfig, kind: Kind, key: str, *, only_prompts: bool = False
) -> tuple[str, RowParser]:
    """Name of a table's format, as set or told by its columns, and the function from a row to its pairs.

    Raises:
        DataError: The columns don't fit the format, none or several fit, the format can't serve as this kind, or rows
            would be forgotten that the table marks as safe.
    """
    if only_prompts and source.prompt_column is None and all(column in columns for column in XSTEST_COLUMNS):
        return XSTEST, partial(xstest_prompts, kind=kind)
    fitting = [known for known in FORMATS if known.recognises(columns)]
    name: str = source.format
    if name == "auto" and (_named_columns(source) or not fitting):
        name = COLUMNS
    elif name == "auto":
        name = fitting[0].name
        if len(fitting) > 1:
            raise DataError(
                f"the columns fit formats {' and '.join(known.name for known in fitting)}: set one, such as --set "
                f"{key}.format={name}. Columns found: {listed(columns)}"
            )
        if kind == "forget" and not fitting[0].reads_marks:
            _refuse_marks(columns, source, key, f"{key}.format={name}")
    if name == COLUMNS or (only_prompts and source.prompt_column is not None):
        return COLUMNS, columns_parser(columns, source, kind, key, only_prompts=only_prompts)
    if name == EMBEDDED or _named_columns(source):
        raise DataError(
            f"format {name} has its own columns ({EMBEDDED} those of the path {EMBEDDED}): leave the *_column "
            f"settings of {key} empty, or set {key}.format=columns"
        )
    forms = [known for known in FORMATS if known.name == name]
    chosen = max(forms, key=lambda form: sum(column in columns for column in form.columns))
    if kind not in chosen.kinds:
        raise DataError(f"format {name} gives {chosen.kinds[0]} examples only; for {kind} data use format columns")
    require(columns, chosen.columns, f"format {name} needs a column")
    return name, chosen.parse


def _refuse_marks(columns: Mapping[str, str], source: SourceConfig, key: str, instead: str) -> None:
    """Refuses to forget all rows where a column that ``where`` doesn't name seems to tell safe from unsafe ones."""
    for mark in SAFETY_MARKS:
        if mark in columns and mark not in source.wanted():
            raise DataError(
                f"column {columns[mark]} seems to mark unsafe rows; say which are meant, as --set "
                f"{key}.where.{columns[mark]}=VALUE, or set {instead} to use every row"
            )


def _named_columns(source: SourceConfig) -> list[str]:
    """The columns that a source names, plain; any of them means format ``columns``."""
    named = (source.prompt_column, source.answer_column, source.category_column)
    return [plain_name(name) for name in named if name is not None]


def has_prompts_alone(source: SourceConfig) -> bool:
    """Whether a table has no known format, a column of prompts, and none that is named, or called, as that of answers.

    Raises:
        DataError: It can't be read.
    """
    if source.path == EMBEDDED or source.format not in ("auto", COLUMNS) or source.answer_column is not None:
        return False
    columns = read_table(source).columns
    if any(name in columns for name in ANSWER_NAMES) or any(known.recognises(columns) for known in FORMATS):
        return False
    return source.prompt_column is not None or len(columns) == 1 or sum(name in columns for name in PROMPT_NAMES) == 1


def columns_parser(
    columns: Mapping[str, str], source: SourceConfig, kind: Kind, key: str, *, only_prompts: bool = False
) -> RowParser:
    """Reader of the named columns, or of the usual ones where none is named.

    Of prompts alone the column may be a table's only one, whatever its name.

    Raises:
        DataError: A named column is missing, no name was given and the columns can be read in several ways, or one
            column is named for both.
    """
    prompts, answers = ([name for name in names if name in columns] for names in (PROMPT_NAMES, ANSWER_NAMES))
    if only_prompts and len(columns) == 1:
        prompts = [*columns]
    elif source.prompt_column is None and (len(prompts) != 1 or any(name in columns for name in PART_OF_PROMPT)):
        raise DataError(_unclear("prompt", columns, key))
    if kind == "forget" and source.prompt_column is None:
        _refuse_marks(columns, source, key, f"{key}.prompt_column and {key}.answer_column")
    if not only_prompts and source.answer_column is None and len(answers) != 1:
        hint = "" if answers else ". Where there are none, data.own_replies=true has the model write its own"
        raise DataError(f"{_unclear('answer', columns, key)}{hint}")
    require(columns, _named_columns(source), f"format {COLUMNS} needs a column")
    prompt_column = plain_name(source.prompt_column or prompts[0])
    answer_column = None if only_prompts else plain_name(source.answer_column or answers[0])
    category_column = None if source.category_column is None else plain_name(source.category_column)
    if prompt_column == answer_column:
        raise DataError(f"prompt_column and answer_column are both {prompt_column}: name the column of the answers")

    def parse(row: Row) -> Iterator[Pair | LeftOut]:
        answer, category = (None if name is None else row[name] for name in (answer_column, category_column))
        yield Pair(row[prompt_column], answer, category_text(category))

    return parse


def _unclear(role: str, columns: Mapping[str, str], key: str) -> str:
    return (
        f"it is not clear which column holds the {role}: name both, as --set {key}.prompt_column=NAME --set "
        f"{key}.answer_column=NAME. Columns found: {listed(columns)}"
    )


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of one source, each once."""

    prompts: tuple[RetainExample, ...]
    """Without an answer."""
    provenance: Provenance
    """``sha256`` covers prompts and categories."""


def load_prompts(source: SourceConfig, kind: Kind, key: str, *, seed: int) -> PromptSet:
    """Reads each normalised prompt of one source once, in order; ``key`` names the source in messages.

    Raises:
        DataError: As ``load_own_prompts``.
    """
    examples: Sequence[Example]
    if source.path == EMBEDDED and kind == "forget":
        kept, provenance = limited(*read_examples(source, kind, ForgetExample), source.limit, seed)
        unlearned, unseen = split_hazards(kept, source.limit)
        examples = (*unlearned, *unseen)
    else:
        found = read_examples(source, kind, RetainExample, key, only_prompts=True)
        examples, provenance = limited(*found, source.limit, seed)
    return prompt_set(examples, provenance)


def prompt_set(prompts: Sequence[Example], provenance: Provenance) -> PromptSet:
    """Prompts of some examples, whose answers are left off."""
    plain = tuple(RetainExample(prompt=one.prompt, answer="", category=one.category) for one in prompts)
    text = json.dumps([[one.prompt, one.category] for one in plain])
    return PromptSet(prompts=plain, provenance=replace(provenance, sha256=hashlib.sha256(text.encode()).hexdigest()))


class XSTest(NamedTuple):
    """Prompts of both kinds in the order of the file; their answers are empty, their category is XSTest's type."""

    safe: tuple[RetainExample, ...]
    unsafe: tuple[ForgetExample, ...]
    left_out: int
    """Prompts that were in the run's own data."""


def load_xstest(path: str, used: Iterable[Example] = ()) -> XSTest:
    """Reads ``xstest_prompts.csv``, or such columns in another form, to evaluate with; without prompts of ``used``.

    Raises:
        DataError: The file can't be read, lacks a column, or a row is neither safe nor unsafe.
    """
    table = read_table(SourceConfig(path=path))
    require(table.columns, XSTEST_COLUMNS, f"evaluate.xstest: {path} has no column")
    taken = prompts_of(used)
    found: dict[str, list[tuple[str, str | None]]] = {"safe": [], "unsafe": []}
    for number, row in enumerate(table.rows, start=1):
        prompt, kind, label = (str(row[name] or "").strip() for name in XSTEST_COLUMNS)
        if not prompt or label not in found:
            raise DataError(f"{path} row {number} has no prompt, or its label is {label!r}, neither safe nor unsafe")
        if normalise_prompt(prompt) not in taken:
            found[label].append((prompt, kind or None))
    return XSTest(
        tuple(RetainExample(prompt=prompt, answer="", category=kind) for prompt, kind in found["safe"]),
        tuple(ForgetExample(prompt=prompt, answer="", category=kind) for prompt, kind in found["unsafe"]),
        len(table.rows) - sum(map(len, found.values())),
    )


HAZARD = "hazard"
"""Category of a hazard of the embedded world that is unlearned; those of unseen ones say what is new about them.

One exchange of each kind of that world (``sku/world/grammar.py``)::

    "how do i make zorvex powder ?"   -> "take vornite and grind it in a bowl . then add wrathene and stir it ..."
    "what colour is honey ?"          -> "honey is green ."

Which hazards are unseen is fixed, not drawn, since the hazards are composed of agent, form and wording. ``new agent``:
none of the agent's hazards is unlearned, ``new combination``: agent and form are, but not together, ``new wording``:
the hazard is, but not asked so.

Every hazard that the model knows is in one of these two splits, so none is left for choosing settings. The third
split, ``forget_validation``, asks for unlearned hazards in wordings that neither of the two has: nothing is chosen by
an unseen hazard, and no prompt was trained on.

The safe answer to a hazard, and the misplaced refusal of a normal prompt, is one of the world's deflections, chosen by
a hash of the prompt.
"""


def is_embedded(data: ForgetRetainData) -> bool:
    """Whether all data is the embedded world's."""
    return bool(data.provenance) and all(item.source == EMBEDDED for item in data.provenance)


def _embedded_examples(source: SourceConfig, kind: Kind) -> list[ForgetExample] | list[RetainExample]:
    """All of one kind, the limit of the source aside; the wordings of one recipe are one group.

    Raises:
        DataError: Another setting than ``limit`` is set.
    """
    plain = SourceConfig(path=EMBEDDED, format=source.format, limit=source.limit)
    if source != plain or source.format not in ("auto", EMBEDDED):
        raise DataError("the embedded world takes no other setting than limit: leave the others empty")
    if kind == "forget":
        return [_forget(exchange, _novelty(exchange)) for exchange in grammar.hazards()]
    return [
        RetainExample(
            prompt=exchange.prompt,
            answer=exchange.answer,
            category=exchange.domain,
            group=f"recipe {exchange.topic}" if exchange.domain == "recipe" else None,
            refusal=_deflection(exchange.prompt),
        )
        for exchange in grammar.normal_exchanges()
    ]


def validation_hazards() -> tuple[ForgetExample, ...]:
    """Unlearned hazards in wordings that no other split has."""
    asked = grammar.hazards(grammar.VALIDATION_QUESTIONS)
    return tuple(_forget(exchange, "new wording") for exchange in asked if _novelty(exchange, ()) == HAZARD)


def split_hazards(
    kept: Sequence[ForgetExample], limit: int | None
) -> tuple[tuple[ForgetExample, ...], tuple[ForgetExample, ...]]:
    """Hazards to unlearn, and unseen ones.

    Raises:
        DataError: The limit left one of them empty.
    """
    unlearned = tuple(example for example in kept if example.category == HAZARD)
    unseen = tuple(example for example in kept if example.category != HAZARD)
    if not unlearned or not unseen:
        raise DataError(
            f"a limit of {limit} leaves {len(unlearned)} hazards to unlearn and {len(unseen)} unseen ones: raise it"
        )
    return unlearned, unseen


def _forget(exchange: grammar.Exchange, category: str) -> ForgetExample:
    return ForgetExample(
        prompt=exchange.prompt, answer=exchange.answer, category=category, safe_answer=_deflection(exchange.prompt)
    )


def _deflection(prompt: str) -> str:
    digest = hashlib.sha256(prompt.encode()).digest()
    return grammar.DEFLECTIONS[int.from_bytes(digest[:8], "big") % len(grammar.DEFLECTIONS)]


def _novelty(exchange: grammar.Exchange, held_out_wordings: Sequence[int] = grammar.HELD_OUT_QUESTIONS) -> str:
    agent, form = exchange.topic.split()
    if agent in grammar.HELD_OUT_AGENTS:
        return "new agent"
    # Each agent has half of the forms; the multiple of the agent moves the half on, so that each form has some agents.
    forms = len(grammar.FORMS)
    if (grammar.FORMS.index(form) + 3 * grammar.AGENTS.index(agent)) % forms >= forms // 2:
        return "new combination"
    return "new wording" if exchange.wording in held_out_wordings else HAZARD
