"""Forget and retain data, read, checked and split by prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from sku.config import EMBEDDED, DataConfig, SourceConfig
from sku.data import embedded
from sku.data.examples import (
    ForgetExample,
    ForgetRetainData,
    Provenance,
    RetainExample,
    content_hash,
    count_safe_answers,
    normalise_prompt,
)
from sku.data.formats import HUB_LICENCES, choose_parser
from sku.data.rows import SAFE, UNMARKED, Kind, ParsedRows, parse_rows
from sku.data.splits import draw_prompts, draw_rows, split_by_group
from sku.data.tables import read_table
from sku.errors import DataError, RecipeError

E = TypeVar("E", ForgetExample, RetainExample)
ROW_SPLIT_SHARE = 0.7
"""Of all normal rows: what the public code trains on."""
BENIGN_VALIDATION_SHARE = 0.5
"""Of the benign prompts: strengths are chosen by these, and the others are reported."""


def load_forget_retain(
    forget: str | Path | SourceConfig = EMBEDDED,
    retain: str | Path | SourceConfig | None = None,
    *,
    benign: str | Path | SourceConfig | None = None,
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
        benign: Normal pairs of another source, only for a perplexity after unlearning; not with the embedded world.
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
        benign=None if benign is None else _source(benign),
        unseen_fraction=unseen_fraction,
        retain_validation_fraction=retain_validation_fraction,
        retain_test_fraction=retain_test_fraction,
    )
    return load_data(config, seed)


def load_data(
    config: DataConfig, seed: int, *, row_split: bool = False, forget_validation: float = 0.0
) -> ForgetRetainData:
    """Loads the data of a recipe.

    Args:
        config: The ``data`` part of the recipe.
        seed: Decides the splits and which prompts a ``limit`` keeps.
        row_split: ``compat.row_split``: ``retain_train`` is drawn from all normal rows, held-out ones included.
        forget_validation: Share of the harmful prompts outside ``unseen`` to hold out for choosing settings; the
            embedded world gives its own instead of a share. 0 for none: the other splits are then as they are without.

    Returns:
        The splits, and where each example came from.

    Raises:
        DataError: Data is missing, unreadable, empty, in an unclear format, or has a prompt in two sets.
        RecipeError: Only some of the sets are the embedded world, or its fixed split is given a share.
    """
    _check_worlds(config)
    benign: dict[str, tuple[RetainExample, ...]] = {"benign": (), "benign_validation": ()}
    benign_provenance: tuple[Provenance, ...] = ()
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
        if config.benign is not None:
            all_benign, provenance = _read(config.benign, "retain", RetainExample, "data.benign")
            _check_benign_overlap(all_benign, all_forget, all_retain, config.benign)
            kept, provenance = _limit(all_benign, provenance, config.benign.limit, seed)
            benign = split_by_group(
                kept,
                rest="benign",
                held_out={"benign_validation": BENIGN_VALIDATION_SHARE},
                seed=seed,
                what=f"the benign data {config.benign.path}",
            )
            benign_provenance = (provenance,)
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
    return ForgetRetainData(
        unlearned=unlearned,
        unseen=unseen,
        retain_train=draw_rows(retain, ROW_SPLIT_SHARE, seed) if row_split else retain_splits["train"],
        retain_validation=retain_splits["validation"],
        retain_test=retain_splits["test"],
        provenance=(forget_provenance, retain_provenance, *benign_provenance),
        benign=benign["benign"],
        benign_validation=benign["benign_validation"],
        forget_validation=validation,
        row_split=row_split,
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
    if config.benign is not None and EMBEDDED in (config.forget.path, config.benign.path):
        raise RecipeError(
            "data.benign does not go with the embedded world, whose model knows no other text and whose text no other "
            "model knows: leave it out"
        )


def _source(source: str | Path | SourceConfig) -> SourceConfig:
    return source if isinstance(source, SourceConfig) else SourceConfig(path=str(source))


def _read(
    source: SourceConfig, kind: Kind, example_type: type[E], key: str | None = None
) -> tuple[list[E], Provenance]:
    table = read_table(source)
    try:
        name, parser = choose_parser(table.columns, source, kind, key)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    parsed = parse_rows(table.rows, parser, example_type)
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


def _check_benign_overlap(
    benign: list[RetainExample], forget: list[ForgetExample], retain: list[RetainExample], source: SourceConfig
) -> None:
    used = {normalise_prompt(example.prompt) for example in forget}
    used |= {normalise_prompt(example.prompt) for example in retain}
    shared = used & {normalise_prompt(example.prompt) for example in benign}
    if shared:
        raise DataError(
            f"{len(shared)} prompts of the benign data {source.path} are in the forget or the retain data too: remove "
            "them from the benign data, which must be of another source and is never trained on"
        )


def _limit(examples: list[E], provenance: Provenance, limit: int | None, seed: int) -> tuple[list[E], Provenance]:
    kept = draw_prompts(examples, limit, seed)
    if len(kept) == len(examples):
        return kept, provenance
    left_out = {**provenance.rows_left_out, "over the limit": len(examples) - len(kept)}
    return kept, dataclasses.replace(
        provenance, sha256=content_hash(kept), rows_left_out=left_out, safe_answers=count_safe_answers(kept)
    )
