"""Forget and retain data, read, checked and split by prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sku.config import EMBEDDED, DataConfig, SourceConfig
from sku.data import embedded
from sku.data.examples import (
    Example,
    ForgetExample,
    ForgetRetainData,
    Provenance,
    RetainExample,
    content_hash,
    count_safe_answers,
    has_answers,
    normalise_prompt,
)
from sku.data.formats import HUB_LICENCES, choose_parser
from sku.data.prompt_sets import lacks_answers, load_prompts
from sku.data.rows import SAFE, UNMARKED, Kind, ParsedRows, parse_rows
from sku.data.splits import draw_prompts, split_by_group
from sku.data.tables import Table, read_table
from sku.errors import DataError, RecipeError

E = TypeVar("E", ForgetExample, RetainExample)
NORMAL_VALIDATION_SHARE = 0.5
"""Of a normal set of another source that has answers: strengths are chosen by these, and the others are reported."""
IN_ANOTHER_SET = "a prompt of another set of the run"
"""Reason counted for prompts of other sources that are in the run's own data."""
Source = str | Path | SourceConfig


def load_forget_retain(
    forget: Source = EMBEDDED,
    retain: Source | None = None,
    *,
    normal: Mapping[str, Source] | None = None,
    harmful: Mapping[str, Source] | None = None,
    unseen_fraction: float = DataConfig.unseen_fraction,
    retain_validation_fraction: float = DataConfig.retain_validation_fraction,
    retain_test_fraction: float = DataConfig.retain_test_fraction,
    seed: int = 0,
) -> ForgetRetainData:
    """Loads what is to be forgotten and what is to be kept, split by prompt.

    Args:
        forget: File, folder or hub id of harmful pairs, a ``SourceConfig`` for more settings, or ``"embedded"`` for
            the invented world that ships with SKU.
        retain: The same for normal pairs. May be left out with the embedded world, which goes as a whole.
        normal: Name -> normal prompts of another source, with answers or without, for measuring alone; not with the
            embedded world.
        harmful: Name -> harmful prompts of another source, for measuring alone; not with the embedded world.
        unseen_fraction: Share of the harmful prompts held out. The embedded world has its own unseen hazards.
        retain_validation_fraction: Share of the normal prompts.
        retain_test_fraction: Share of the normal prompts.
        seed: Decides the splits and which prompts a ``limit`` keeps.

    Returns:
        The splits, and where each example came from.

    Raises:
        DataError: Data is missing, unreadable, empty, in an unclear format, or has a prompt in two sets.
        RecipeError: A share is out of range, or only some of the sets are the embedded world.

    Example:
        >>> load_forget_retain().counts()["unlearned"]
        260
    """
    if retain is None:
        if _source(forget).path != EMBEDDED:
            raise RecipeError("retain is missing: unlearning needs normal pairs that are to be kept")
        retain = EMBEDDED
    config = DataConfig(
        forget=_source(forget),
        retain=_source(retain),
        normal={name: _source(source) for name, source in (normal or {}).items()},
        harmful={name: _source(source) for name, source in (harmful or {}).items()},
        unseen_fraction=unseen_fraction,
        retain_validation_fraction=retain_validation_fraction,
        retain_test_fraction=retain_test_fraction,
    )
    return load_data(config, seed)


def load_data(config: DataConfig, seed: int, *, forget_validation: float = 0.0) -> ForgetRetainData:
    """Loads the data of a recipe.

    Args:
        config: The ``data`` part of the recipe.
        seed: Decides the splits and which prompts a ``limit`` keeps.
        forget_validation: Share of the harmful prompts outside ``unseen`` to hold out for choosing settings; the
            embedded world gives its own instead of a share. 0 for none: the other splits are then as they are without.

    Returns:
        The splits, and where each example came from.

    Raises:
        DataError: Data is missing, unreadable, empty, in an unclear format, or has a prompt in two sets.
        RecipeError: Only some of the sets are the embedded world, its fixed split is given a share, or the data are
            own replies, which are not written yet.
    """
    if config.own_replies:
        raise RecipeError(
            "data.own_replies is true, and only sku run writes the model's own replies by itself: write them with sku "
            "data own, and name its files in data.forget and data.retain"
        )
    _check_worlds(config)
    others = _OtherSets()
    validation: tuple[ForgetExample, ...] = ()
    if config.forget.path == EMBEDDED:
        if config.unseen_fraction != DataConfig.unseen_fraction:
            raise RecipeError("the embedded world has its own unseen hazards: leave data.unseen_fraction out")
        unlearned, unseen, forget_provenance = embedded.load_forget(config.forget, seed)
        retain, retain_provenance = embedded.load_retain(config.retain, seed)
        validation = embedded.validation_examples() if forget_validation else ()
    else:
        all_forget, forget_provenance = _read(config.forget, "forget", ForgetExample)
        all_retain, retain_provenance = _read(config.retain, "retain", RetainExample)
        _check_overlap(all_forget, all_retain, config)
        others = _other_sets(config, (*all_forget, *all_retain), seed)
        forget, forget_provenance = _limit(all_forget, forget_provenance, config.forget.limit, seed)
        retain, retain_provenance = _limit(all_retain, retain_provenance, config.retain.limit, seed)
        unlearned, unseen = _split_forget(forget, config.forget, config.unseen_fraction, seed)
        if forget_validation:
            # Of what is left beside unseen, so that unseen is the same with and without it.
            parts = split_by_group(
                list(unlearned),
                rest="unlearned",
                held_out={"forget_validation": forget_validation},
                seed=seed,
                what=f"the forget data {config.forget.path} without its unseen prompts",
            )
            unlearned, validation = parts["unlearned"], parts["forget_validation"]
    retain_splits = _split_retain(
        retain, config.retain, config.retain_validation_fraction, config.retain_test_fraction, seed
    )
    retain_train = retain_splits["train"]
    refusal_provenance: list[Provenance] = []
    # After the splits: no refusal of a held-out prompt gets near training.
    if config.refusals is not None:
        refusals, provenance = _read_refusals(config.refusals, seed)
        _check_each_has_one(unlearned, refusals, "data.refusals", config.refusals)
        # Those of validation prompts, where there are any, are for operators that are fitted to them.
        unlearned, validation = _with_refusals(unlearned, refusals), _with_refusals(validation, refusals)
        refusal_provenance.append(provenance)
    if config.misplaced_refusals is not None:
        refusals, provenance = _read_refusals(config.misplaced_refusals, seed)
        _check_each_has_one(retain_train, refusals, "data.misplaced_refusals", config.misplaced_refusals)
        retain_train = tuple(
            dataclasses.replace(example, refusal=refusal.answer)
            for example, refusal in _in_turn(retain_train, refusals)
            if refusal is not None
        )
        refusal_provenance.append(provenance)
    return ForgetRetainData(
        unlearned=unlearned,
        unseen=unseen,
        retain_train=retain_train,
        retain_validation=retain_splits["validation"],
        retain_test=retain_splits["test"],
        provenance=(forget_provenance, retain_provenance, *others.provenance, *refusal_provenance),
        normal=others.normal,
        normal_validation=others.normal_validation,
        harmful=others.harmful,
        forget_validation=validation,
    )


def load_parts(
    forget: SourceConfig | None = None,
    retain: SourceConfig | None = None,
    *,
    seed: int = 0,
    forget_validation: float = 0.0,
) -> ForgetRetainData:
    """What a run with the default shares reads of one set, or of both: for work beside a run.

    Args:
        forget: Harmful pairs; ``unlearned`` and ``unseen`` stay empty if None.
        retain: Normal pairs; the ``retain`` splits stay empty if None.
        seed: As in ``load_data``: with equal sources and seeds the splits are those of the run.
        forget_validation: As in ``load_data``; only where both sets are given.

    Returns:
        The splits, and where each example came from.

    Raises:
        DataError: As ``load_data``.
        RecipeError: Only one of two sets is the embedded world.
    """
    if forget is not None and retain is not None:
        return load_data(DataConfig(forget=forget, retain=retain), seed, forget_validation=forget_validation)
    unlearned: tuple[ForgetExample, ...] = ()
    unseen: tuple[ForgetExample, ...] = ()
    splits: dict[str, tuple[RetainExample, ...]] = {"train": (), "validation": (), "test": ()}
    provenance: tuple[Provenance, ...] = ()
    if forget is not None and forget.path == EMBEDDED:
        unlearned, unseen, found = embedded.load_forget(forget, seed)
        provenance = (found,)
    elif forget is not None:
        harmful, found = _limit(*_read(forget, "forget", ForgetExample), forget.limit, seed)
        unlearned, unseen = _split_forget(harmful, forget, DataConfig.unseen_fraction, seed)
        provenance = (found,)
    if retain is not None:
        if retain.path == EMBEDDED:
            normal, found = embedded.load_retain(retain, seed)
        else:
            normal, found = _limit(*_read(retain, "retain", RetainExample), retain.limit, seed)
        splits = _split_retain(
            normal, retain, DataConfig.retain_validation_fraction, DataConfig.retain_test_fraction, seed
        )
        provenance = (found,)
    return ForgetRetainData(
        unlearned=unlearned,
        unseen=unseen,
        retain_train=splits["train"],
        retain_validation=splits["validation"],
        retain_test=splits["test"],
        provenance=provenance,
    )


def _split_forget(
    examples: list[ForgetExample], source: SourceConfig, unseen: float, seed: int
) -> tuple[tuple[ForgetExample, ...], tuple[ForgetExample, ...]]:
    what = f"the forget data {source.path}"
    splits = split_by_group(examples, rest="unlearned", held_out={"unseen": unseen}, seed=seed, what=what)
    return splits["unlearned"], splits["unseen"]


def _split_retain(
    examples: list[RetainExample], source: SourceConfig, validation: float, test: float, seed: int
) -> dict[str, tuple[RetainExample, ...]]:
    return split_by_group(
        examples,
        rest="train",
        held_out={"validation": validation, "test": test},
        seed=seed,
        what=f"the retain data {source.path}",
    )


def _check_worlds(config: DataConfig) -> None:
    if (config.forget.path == EMBEDDED) != (config.retain.path == EMBEDDED):
        raise RecipeError(
            "data.forget and data.retain must both be the embedded world or both be other data: "
            "no other model knows that world, and its own model knows nothing else"
        )
    for key, sets in (("normal", config.normal), ("harmful", config.harmful)):
        for name, source in sets.items():
            if EMBEDDED in (config.forget.path, source.path):
                raise RecipeError(
                    f"data.{key}.{name} does not go with the embedded world, whose model knows no other text and "
                    "whose text no other model knows: leave it out"
                )
    if config.forget.path == EMBEDDED and (config.refusals or config.misplaced_refusals):
        raise RecipeError(
            "the embedded world has its own refusals: leave data.refusals and data.misplaced_refusals out"
        )


def _source(source: Source) -> SourceConfig:
    return source if isinstance(source, SourceConfig) else SourceConfig(path=str(source))


def _read(
    source: SourceConfig, kind: Kind, example_type: type[E], key: str | None = None
) -> tuple[list[E], Provenance]:
    table = read_table(source)
    try:
        name, parser = choose_parser(table.columns, source, kind, key)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    return _read_account(source, kind, name, table, parse_rows(table.rows, parser, example_type))


def _read_account(
    source: SourceConfig, kind: Kind, name: str, table: Table, parsed: ParsedRows[E]
) -> tuple[list[E], Provenance]:
    """Examples with the account of what was left out; some must be left."""
    left_out = dict(sorted({**parsed.left_out, **table.left_out}.items()))
    parsed = dataclasses.replace(parsed, rows_read=parsed.rows_read + sum(table.left_out.values()), left_out=left_out)
    if not parsed.examples:
        raise DataError(_nothing_left(source, kind, parsed))
    return parsed.examples, Provenance(
        source=name,
        location=source.path,
        revision=table.revision,
        sha256=content_hash(parsed.examples),
        rows_read=parsed.rows_read,
        rows_left_out=parsed.left_out,
        safe_answers=count_safe_answers(parsed.examples),
        licence=source.license or (HUB_LICENCES.get(source.path.lower()) if table.from_hub else None),
    )


def _read_refusals(source: SourceConfig, seed: int) -> tuple[dict[str, list[RetainExample]], Provenance]:
    """By normalised prompt."""
    rows, provenance = _limit(*_read(source, "retain", RetainExample), source.limit, seed)
    by_prompt: dict[str, list[RetainExample]] = {}
    for row in rows:
        by_prompt.setdefault(normalise_prompt(row.prompt), []).append(row)
    return by_prompt, provenance


def _check_each_has_one(
    examples: Sequence[Example], refusals: Mapping[str, object], key: str, source: SourceConfig
) -> None:
    prompts = {normalise_prompt(example.prompt) for example in examples}
    missing = prompts - refusals.keys()
    if missing:
        owner = "data.forget" if key == "data.refusals" else "data.retain"
        raise DataError(
            f"{key}: {len(missing)} of {len(prompts)} prompts that are trained on have no refusal in {source.path}: "
            f"make them with sku data own, or take these prompts out of {owner}"
        )


def _in_turn(
    examples: Sequence[E], refusals: Mapping[str, Sequence[RetainExample]]
) -> Iterator[tuple[E, RetainExample | None]]:
    """Each example with the refusal of its prompt, None for none; of several, the examples of a prompt take turns."""
    met: Counter[str] = Counter()
    for example in examples:
        prompt = normalise_prompt(example.prompt)
        known = refusals.get(prompt)
        yield example, known[met[prompt] % len(known)] if known else None
        met[prompt] += 1


def _with_refusals(
    examples: Sequence[ForgetExample], refusals: Mapping[str, Sequence[RetainExample]]
) -> tuple[ForgetExample, ...]:
    return tuple(
        example
        if refusal is None
        else dataclasses.replace(example, safe_answer=refusal.answer, safe_answer_finished=refusal.finished)
        for example, refusal in _in_turn(examples, refusals)
    )


def _nothing_left(source: SourceConfig, kind: Kind, parsed: ParsedRows[E]) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in parsed.left_out.items()) or "it has no rows"
    if source.unsafe_column is not None:
        reasons += f"; column {source.unsafe_column} is compared with {source.unsafe_value!r}"
    if kind == "forget" and parsed.left_out and set(parsed.left_out) <= {SAFE, UNMARKED}:
        return f"{source.path} has no unsafe rows among {parsed.rows_read}, so there is nothing to forget ({reasons})"
    return f"{source.path} gives no {kind} examples from {parsed.rows_read} rows ({reasons})"


def _check_overlap(forget: list[ForgetExample], retain: list[RetainExample], config: DataConfig) -> None:
    shared = {normalise_prompt(example.prompt) for example in forget}
    shared &= {normalise_prompt(example.prompt) for example in retain}
    if shared:
        raise DataError(
            f"{len(shared)} prompts are both in the forget data {config.forget.path} and in the retain data "
            f"{config.retain.path}, so they would be forgotten and kept at once: remove them from one"
        )


@dataclasses.dataclass(kw_only=True)
class _OtherSets:
    """Sets of other sources, by name."""

    normal: dict[str, tuple[RetainExample, ...]] = dataclasses.field(default_factory=dict)
    normal_validation: dict[str, tuple[RetainExample, ...]] = dataclasses.field(default_factory=dict)
    harmful: dict[str, tuple[ForgetExample, ...]] = dataclasses.field(default_factory=dict)
    provenance: list[Provenance] = dataclasses.field(default_factory=list)
    """Normal sets first, then harmful ones."""


def _other_sets(config: DataConfig, own: Collection[Example], seed: int) -> _OtherSets:
    """What is only measured, without prompts of the run's own data and of normal sets that come before."""
    found = _OtherSets()
    used = {normalise_prompt(example.prompt) for example in own}
    for name, source in config.normal.items():
        key = f"data.normal.{name}"
        examples, provenance = _without(*_read_normal(source, key, seed), used, key)
        examples, provenance = _limit(examples, provenance, source.limit, seed)
        found.provenance.append(provenance)
        if has_answers(examples):
            halves = split_by_group(
                examples,
                rest="normal",
                held_out={"validation": NORMAL_VALIDATION_SHARE},
                seed=seed,
                what=f"{key} {source.path}",
            )
            found.normal[name], found.normal_validation[name] = halves["normal"], halves["validation"]
        else:
            found.normal[name] = tuple(examples)
        used |= {normalise_prompt(example.prompt) for example in examples}
    for name, source in config.harmful.items():
        key = f"data.harmful.{name}"
        prompts, provenance = _without(*_read_prompts(source, "forget", ForgetExample, key, seed), used, key)
        prompts, provenance = _limit(prompts, provenance, source.limit, seed)
        found.provenance.append(provenance)
        found.harmful[name] = tuple(prompts)
    return found


def _read_normal(source: SourceConfig, key: str, seed: int) -> tuple[list[RetainExample], Provenance]:
    """Prompts with answers, or, of a table without a column of answers, prompts alone."""
    if lacks_answers(source):
        return _read_prompts(source, "retain", RetainExample, key, seed)
    return _read(source, "retain", RetainExample, key)


def _read_prompts(
    source: SourceConfig, kind: Kind, example_type: type[E], key: str, seed: int
) -> tuple[list[E], Provenance]:
    """Prompts alone; a table with answers gives each prompt once."""
    found = load_prompts(dataclasses.replace(source, limit=None), kind, key, seed=seed)
    examples = [example_type(prompt=one.prompt, answer="", category=one.category) for one in found.prompts]
    return examples, found.provenance


def _without(examples: list[E], provenance: Provenance, used: Collection[str], key: str) -> tuple[list[E], Provenance]:
    kept = [example for example in examples if normalise_prompt(example.prompt) not in used]
    if len(kept) == len(examples):
        return examples, provenance
    if not kept:
        raise DataError(
            f"{key}: all {len(examples)} prompts of {provenance.location} are in another set of the run too, so "
            "nothing is left to measure: name another source, or leave it out"
        )
    left_out = {**provenance.rows_left_out, IN_ANOTHER_SET: len(examples) - len(kept)}
    return kept, dataclasses.replace(provenance, sha256=content_hash(kept), rows_left_out=left_out)


def _limit(examples: list[E], provenance: Provenance, limit: int | None, seed: int) -> tuple[list[E], Provenance]:
    kept = draw_prompts(examples, limit, seed)
    if len(kept) == len(examples):
        return kept, provenance
    left_out = {**provenance.rows_left_out, "over the limit": len(examples) - len(kept)}
    return kept, dataclasses.replace(
        provenance, sha256=content_hash(kept), rows_left_out=left_out, safe_answers=count_safe_answers(kept)
    )
