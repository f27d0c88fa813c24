"""Prompts alone, from any table: what a model is asked where its own replies are to be the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sku.config import EMBEDDED, DataConfig, SourceConfig
from sku.data.examples import Example, ForgetExample, Provenance, RetainExample, limited, normalise_prompt
from sku.data.sources import embedded
from sku.data.sources.read import COLUMNS, has_only_prompts, is_known, is_list_of_prompts, read_examples
from sku.data.sources.rows import Columns, Kind
from sku.data.sources.tables import read_table
from sku.errors import DataError, RecipeError


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of one source, each once."""

    prompts: tuple[RetainExample, ...]
    """Without an answer."""
    provenance: Provenance
    """``sha256`` covers prompts and categories."""


PromptSource = Literal["harmful", "normal", "borderline"]
OwnPrompts: TypeAlias = dict[PromptSource, PromptSet]
"""All that a model is asked for data in its own words, in this order; no prompt is in two sets. ``borderline``, safe
prompts that look harmful, only where there are such."""


def wants_own_replies(config: DataConfig) -> bool:
    """Whether a run trains on own replies: it is told to, or a set has prompts without answers.

    Raises:
        DataError: A table can't be read.
        RecipeError: What goes with own replies alone is set without them.
    """
    wanted = config.own_replies or any(
        _asks_only(source, is_list_of_prompts) for source in (config.forget, config.retain)
    )
    if not wanted and (config.borderline is not None or config.own_share < 1):
        name = "own_share" if config.borderline is None else "borderline"
        raise RecipeError(f"data.{name} goes with own replies: set data.own_replies=true, or leave it out")
    return wanted


def lacks_answers(source: SourceConfig) -> bool:
    """Whether a table has prompts and no column of answers.

    Raises:
        DataError: It can't be read.
    """
    return _asks_only(source, has_only_prompts)


def _asks_only(source: SourceConfig, looks_so: Callable[[Columns, SourceConfig], bool]) -> bool:
    """Whether the columns of a table of no known format look as if it had prompts alone."""
    if source.path == EMBEDDED or source.format not in ("auto", COLUMNS):
        return False
    found = Columns(read_table(source).columns)
    return not is_known(found) and looks_so(found, source)


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
    found: OwnPrompts = {
        "harmful": load_prompts(harmful, "forget", f"{prefix}{names[0]}", seed=seed),
        "normal": load_prompts(normal, "retain", f"{prefix}{names[1]}", seed=seed),
    }
    asked, known = ({normalise_prompt(prompt.prompt) for prompt in one.prompts} for one in found.values())
    _refuse_shared(asked, found["normal"], harmful, normal)
    if borderline is not None:
        extra = load_prompts(borderline, "retain", f"{prefix}borderline", seed=seed)
        _refuse_shared(asked, extra, harmful, borderline)
        kept = [prompt for prompt in extra.prompts if normalise_prompt(prompt.prompt) not in known]
        before, left_out = extra.provenance, len(extra.prompts) - len(kept)
        if not kept:
            raise DataError(f"all prompts of {before.location} are among the normal prompts too: leave it out")
        found["borderline"] = _set(kept, before.keeping(kept, left_out, "a normal prompt too"))
    return found


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
    examples: Sequence[Example]
    if source.path == EMBEDDED and kind == "forget":
        kept, provenance = limited(*read_examples(source, kind, ForgetExample), source.limit, seed)
        unlearned, unseen = embedded.split_forget(kept, source.limit)
        examples = (*unlearned, *unseen)
    else:
        found = read_examples(source, kind, RetainExample, key, only_prompts=True)
        examples, provenance = limited(*found, source.limit, seed)
    return _set(examples, provenance)


def _set(prompts: Sequence[Example], provenance: Provenance) -> PromptSet:
    plain = tuple(RetainExample(prompt=one.prompt, answer="", category=one.category) for one in prompts)
    text = json.dumps([[one.prompt, one.category] for one in plain])
    return PromptSet(
        prompts=plain,
        provenance=replace(provenance, sha256=hashlib.sha256(text.encode()).hexdigest()),
    )


def _refuse_shared(harmful: Collection[str], normal: PromptSet, first: SourceConfig, second: SourceConfig) -> None:
    shared = sum(normalise_prompt(prompt.prompt) in harmful for prompt in normal.prompts)
    if shared:
        raise DataError(
            f"{shared} prompts are both among the harmful ones of {first.path} and in {second.path}: remove them from "
            "one"
        )
