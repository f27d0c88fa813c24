"""Prompts alone, from any table: what a model is asked where its own replies are to be the answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from sku.config import EMBEDDED, DataConfig, SourceConfig
from sku.data import columns, embedded, xstest
from sku.data.examples import Example, Provenance, RetainExample, normalise_prompt
from sku.data.formats import FORMATS, HUB_LICENCES, choose_parser
from sku.data.rows import SAFE, Cells, Columns, Kind, LeftOut, Pair, Row, RowParser, SafeAnswer, parse_rows
from sku.data.splits import draw_prompts
from sku.data.tables import read_table
from sku.errors import DataError, RecipeError

_UNANSWERED = "-"
"""Stands for the answer of each row while it is read, so that rows are cleaned and counted as any others."""
UNSAFE_PROMPT, SAFE_PROMPT = "unsafe prompt", "safe prompt"


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of one source, each once."""

    prompts: tuple[RetainExample, ...]
    """Without an answer."""
    provenance: Provenance
    """``sha256`` covers prompts and categories."""


@dataclass(frozen=True, kw_only=True)
class OwnPrompts:
    """All that a model is asked for data in its own words; no prompt is in two sets."""

    harmful: PromptSet
    normal: PromptSet
    borderline: PromptSet | None = None
    """Safe prompts that look harmful."""

    def sets(self) -> dict[str, PromptSet]:
        """By name; ``borderline`` only where there is one."""
        named = {"harmful": self.harmful, "normal": self.normal}
        return named if self.borderline is None else {**named, "borderline": self.borderline}


def wants_own_replies(config: DataConfig) -> bool:
    """Whether a run trains on own replies: it is told to, or a set has prompts without answers.

    Raises:
        DataError: A table can't be read.
        RecipeError: What goes with own replies alone is set without them.
    """
    wanted = config.own_replies or any(_is_list_of_prompts(source) for source in (config.forget, config.retain))
    if not wanted and (config.borderline is not None or config.own_share < 1):
        name = "own_share" if config.borderline is None else "borderline"
        raise RecipeError(f"data.{name} goes with own replies: set data.own_replies=true, or leave it out")
    return wanted


def lacks_answers(source: SourceConfig) -> bool:
    """Whether a table has prompts and no column of answers.

    Raises:
        DataError: It can't be read.
    """
    found = _unknown_columns(source)
    return found is not None and columns.has_only_prompts(found, source)


def _is_list_of_prompts(source: SourceConfig) -> bool:
    found = _unknown_columns(source)
    return found is not None and columns.is_list_of_prompts(found, source)


def _unknown_columns(source: SourceConfig) -> Columns | None:
    """The columns of a table of no known format."""
    if source.path == EMBEDDED or source.format not in ("auto", columns.NAME):
        return None
    found = Columns(read_table(source).columns)
    return None if _recognised(found) else found


def load_own_prompts(
    harmful: SourceConfig, normal: SourceConfig, borderline: SourceConfig | None, *, seed: int, prefix: str = ""
) -> OwnPrompts:
    """Reads the prompts that own replies are written to.

    Args:
        harmful: Answers are not read. Of a table that marks unsafe answers (PKU-SafeRLHF), the prompts of those.
        normal: Answers are not read.
        borderline: Safe prompts that look harmful; of XSTest only the safe ones are taken. One that is a normal prompt
            too is left out.
        seed: Decides which prompts a ``limit`` keeps.
        prefix: Of the keys ``forget``, ``retain`` and ``borderline`` in messages, such as ``data.``; without one they
            are ``harmful``, ``normal`` and ``borderline``.

    Returns:
        The sets.

    Raises:
        DataError: A table can't be read, it is not clear which column holds the prompts, none is left, or a prompt is
            harmful and normal at once.
    """
    names = ("forget", "retain") if prefix else ("harmful", "normal")
    found = OwnPrompts(
        harmful=load_prompts(harmful, "forget", f"{prefix}{names[0]}", seed=seed),
        normal=load_prompts(normal, "retain", f"{prefix}{names[1]}", seed=seed),
    )
    asked = {normalise_prompt(prompt.prompt) for prompt in found.harmful.prompts}
    _refuse_shared(asked, found.normal, harmful, normal)
    if borderline is None:
        return found
    extra = load_prompts(borderline, "retain", f"{prefix}borderline", seed=seed)
    _refuse_shared(asked, extra, harmful, borderline)
    known = {normalise_prompt(prompt.prompt) for prompt in found.normal.prompts}
    return dataclasses.replace(found, borderline=_without(extra, known))


def load_prompts(source: SourceConfig, kind: Kind, key: str, *, seed: int) -> PromptSet:
    """Reads the prompts of one source.

    Args:
        source: File, folder, hub id or ``embedded``.
        kind: Whether they are harmful (``forget``) or normal (``retain``).
        key: Names the source in messages.
        seed: Decides which prompts a ``limit`` keeps.

    Returns:
        Each normalised prompt once, in order.

    Raises:
        DataError: As ``load_own_prompts``.
    """
    if source.path == EMBEDDED:
        return _of_the_world(source, kind, seed)
    table = read_table(source)
    found = Columns(table.columns)
    try:
        name, parser = _parser(found, source, kind, key)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    parsed = parse_rows(table.rows, lambda row: _prompts_of(parser(row)), RetainExample)
    if not parsed.examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in parsed.left_out.items()) or "it has no rows"
        raise DataError(f"{source.path} gives no prompts from {parsed.rows_read} rows ({reasons})")
    kept = draw_prompts(parsed.examples, source.limit, seed)
    over = {"over the limit": len(parsed.examples) - len(kept)} if len(kept) < len(parsed.examples) else {}
    licence = source.license or (HUB_LICENCES.get(source.path.lower()) if table.from_hub else None)
    return _set(kept, Provenance(
        source=name,
        location=source.path,
        revision=table.revision,
        rows_read=parsed.rows_read + sum(table.left_out.values()),
        rows_left_out={**table.left_out, **parsed.left_out, **over},
        licence=licence,
    ))  # fmt: skip


def _set(prompts: Collection[Example], provenance: Provenance) -> PromptSet:
    plain = tuple(RetainExample(prompt=one.prompt, answer="", category=one.category) for one in prompts)
    text = json.dumps([[one.prompt, one.category] for one in plain])
    return PromptSet(
        prompts=plain,
        provenance=dataclasses.replace(provenance, sha256=hashlib.sha256(text.encode()).hexdigest()),
    )


def _of_the_world(source: SourceConfig, kind: Kind, seed: int) -> PromptSet:
    if kind == "retain":
        return _set(*embedded.load_retain(source, seed))
    unlearned, unseen, provenance = embedded.load_forget(source, seed)
    return _set((*unlearned, *unseen), provenance)


def _recognised(found: Columns) -> bool:
    return any(known.recognises(found) for known in FORMATS)


def _parser(found: Columns, source: SourceConfig, kind: Kind, key: str) -> tuple[str, RowParser]:
    if source.prompt_column is None and all(name in found for name in xstest.COLUMNS):
        return "xstest", lambda row: _xstest_prompt(Cells(row, found), kind)
    if source.prompt_column is None and (_recognised(found) or source.format not in ("auto", columns.NAME)):
        return choose_parser(found, source, kind, key)
    parser = columns.row_parser(found, source, kind, key, only_prompts=_UNANSWERED)
    return columns.NAME, lambda row: parser(Cells(row, found))


def _xstest_prompt(row: Row, kind: Kind) -> Iterator[Pair | LeftOut]:
    unsafe = str(row["label"]).strip() == "unsafe"
    if unsafe == (kind == "forget"):
        yield Pair(row["prompt"], _UNANSWERED, str(row["type"]).strip() or None)
    else:
        yield LeftOut(UNSAFE_PROMPT if unsafe else SAFE_PROMPT)


def _prompts_of(parsed: Iterable[Pair | SafeAnswer | LeftOut]) -> Iterator[Pair | LeftOut]:
    for one in parsed:
        if isinstance(one, Pair):
            yield Pair(one.prompt, _UNANSWERED, one.category)
        else:
            yield one if isinstance(one, LeftOut) else LeftOut(SAFE)


def _refuse_shared(harmful: Collection[str], normal: PromptSet, first: SourceConfig, second: SourceConfig) -> None:
    shared = sum(normalise_prompt(prompt.prompt) in harmful for prompt in normal.prompts)
    if shared:
        raise DataError(
            f"{shared} prompts are both among the harmful ones of {first.path} and in {second.path}: remove them from "
            "one"
        )


def _without(extra: PromptSet, known: Collection[str]) -> PromptSet:
    kept = [prompt for prompt in extra.prompts if normalise_prompt(prompt.prompt) not in known]
    before = extra.provenance
    if len(kept) == len(extra.prompts):
        return extra
    if not kept:
        raise DataError(f"all prompts of {before.location} are among the normal prompts too: leave it out")
    left_out = {**before.rows_left_out, "a normal prompt too": len(extra.prompts) - len(kept)}
    return _set(kept, dataclasses.replace(before, rows_left_out=left_out))
