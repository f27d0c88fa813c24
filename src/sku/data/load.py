"""Forget and retain data, read, checked and split by prompt; and prompts alone, to which a model writes its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sku.config.data import EMBEDDED, FINAL, RETAIN_SHARES, DataConfig, SourceConfig
from sku.data.examples import (
    E,
    Example,
    ForgetExample,
    ForgetRetainData,
    Provenance,
    RetainExample,
    has_answers,
    limited,
    normalise_prompt,
    split_by_group,
)
from sku.data.near_copies import near_to
from sku.data.sources import embedded
from sku.data.sources.read import (
    PromptSet,
    asks_only,
    is_list_of_prompts,
    lacks_answers,
    load_prompts,
    prompt_set,
    read_examples,
)
from sku.data.sources.rows import Kind
from sku.data.sources.tables import held_rows
from sku.errors import DataError, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset

NORMAL_VALIDATION_SHARE = 0.5
"""Of a normal set of another source that has answers: strengths are chosen by these, and the others are reported."""
IN_ANOTHER_SET = "a prompt of another set of the run"
"""Reason counted for prompts of other sources that are in the run's own data."""
NEAR_COPY = "a near copy of a prompt that the run trains on"
PromptSource = Literal["harmful", "normal", "borderline"]
OwnPrompts: TypeAlias = dict[PromptSource, PromptSet]
"""All that a model is asked for data in its own words, in this order; no prompt is in two sets. ``borderline``, safe
prompts that look harmful, only where there are such."""
Source: TypeAlias = (
    "str | Path | SourceConfig | Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, str]]] | Dataset"
)
"""What examples may be given as: a path or hub id, one with settings, or rows in memory (``held_rows``)."""


def load_forget_retain(
    forget: Source = EMBEDDED,
    retain: Source | None = None,
    *,
    normal: Mapping[str, Source] | None = None,
    harmful: Mapping[str, Source] | None = None,
    unseen_fraction: float = DataConfig.unseen_fraction,
    forget_validation_fraction: float = 0.0,
    seed: int = 0,
) -> ForgetRetainData:
    """Loads what is to be forgotten and what is to be kept, split by prompt.

    Args:
        forget: File, folder or hub id of harmful pairs, a ``SourceConfig`` for more settings, ``"embedded"`` for the
            invented world that ships with SKU, or rows in memory: a ``datasets.Dataset``, a list of dicts, or a list
            of conversations, each a list of messages.
        retain: The same for normal pairs. May be left out with the embedded world, which goes as a whole.
        normal: Name -> normal prompts of another source, with answers or without, for measuring alone; not with the
            embedded world.
        harmful: Name -> harmful prompts of another source, for measuring alone; not with the embedded world.
        unseen_fraction: Share of the harmful prompts held out. The embedded world has its own unseen hazards.
        forget_validation_fraction: Share of the other harmful prompts to hold out for ``choose_alpha``; 0 for none.
            The embedded world gives its own instead of a share.
        seed: Decides the splits and which prompts a ``limit`` keeps.

    Returns:
        The splits, and where each example came from.

    Raises:
        DataError: Data is missing, unreadable, empty, in an unclear format, or has a prompt in two sets.
        RecipeError: A share is out of range, or only some of the sets are the embedded world.

    Example:
        >>> load_forget_retain().counts()["forget_train"]
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
    )
    return load_data(config, seed, forget_validation=forget_validation_fraction)


def load_data(config: DataConfig, seed: int, *, forget_validation: float = 0.0) -> ForgetRetainData:
    """Loads the data of a recipe.

    Args:
        config: The ``data`` part of the recipe.
        seed: Decides the splits and which prompts a ``limit`` keeps.
        forget_validation: Share of the harmful prompts outside ``forget_test`` to hold out for choosing settings; the
            embedded world gives its own instead of a share. 0 for none: the other splits are then as they are without.

    Returns:
        The splits, and where each example came from.

    Raises:
        DataError: Data is missing, unreadable, empty, in an unclear format, or has a prompt in two sets.
        RecipeError: Only some of the sets are the embedded world, its fixed split is given a share, or the data are
            own replies, which are not written yet.
    """
    _check(config)
    found_forget = read_examples(config.forget, "forget", ForgetExample)
    found_retain = read_examples(config.retain, "retain", RetainExample)
    others = ForgetRetainData()
    if config.forget.path != EMBEDDED:
        _check_overlap(found_forget[0], found_retain[0], config)
        others = _other_sets(config, found_forget[0], found_retain[0], seed)
    forget = _split_forget(*found_forget, config.forget, config.unseen_fraction, forget_validation, seed)
    retain = _split_retain(*found_retain, config.retain, seed)
    unlearned, validation, retain_train = forget.forget_train, forget.forget_validation, retain.retain_train
    provenance = [*forget.provenance, *retain.provenance, *others.provenance]
    # After the splits: no refusal of a held-out prompt gets near training.
    if config.refusals is not None:
        refusals, found = _read_refusals(config.refusals, "data.refusals", "data.forget", unlearned, seed)
        unlearned, validation = _with_refusals(unlearned, refusals), _with_refusals(validation, refusals)
        provenance.append(found)
    if config.misplaced_refusals is not None:
        key = "data.misplaced_refusals"
        refusals, found = _read_refusals(config.misplaced_refusals, key, "data.retain", retain_train, seed)
        retain_train = tuple(
            replace(example, refusal=refusal.answer)
            for example, refusal in _in_turn(retain_train, refusals)
            if refusal is not None
        )
        provenance.append(found)
    return replace(
        others,
        forget_train=unlearned,
        forget_test=forget.forget_test,
        forget_validation=validation,
        retain_train=retain_train,
        retain_validation=retain.retain_validation,
        retain_test=retain.retain_test,
        provenance=tuple(provenance),
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
        forget: Harmful pairs; ``forget_train`` and ``forget_test`` stay empty if None.
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
    if forget is not None:
        found = read_examples(forget, "forget", ForgetExample)
        return _split_forget(*found, forget, DataConfig.unseen_fraction, 0.0, seed)
    if retain is not None:
        return _split_retain(*read_examples(retain, "retain", RetainExample), retain, seed)
    return ForgetRetainData()


def _split_forget(
    found: list[ForgetExample],
    provenance: Provenance,
    source: SourceConfig,
    unseen: float,
    validation: float,
    seed: int,
) -> ForgetRetainData:
    """The splits of harmful examples up to the limit; ``forget_validation`` is empty where no share is asked for."""
    examples, provenance = limited(found, provenance, source.limit, seed)
    chosen_by: tuple[ForgetExample, ...] = ()
    if source.path == EMBEDDED:
        unlearned, held_out = embedded.split_forget(examples, source.limit)
        chosen_by = embedded.validation_examples() if validation else ()
    else:
        what = f"the forget data {source.path}"
        splits = split_by_group(examples, rest="forget_train", held_out={"forget_test": unseen}, seed=seed, what=what)
        unlearned, held_out = splits["forget_train"], splits["forget_test"]
        if validation:
            # Of what is left beside forget_test, so that that is the same with and without it.
            shares, what = {"forget_validation": validation}, f"{what} without its unseen prompts"
            splits = split_by_group(unlearned, rest="forget_train", held_out=shares, seed=seed, what=what)
            unlearned, chosen_by = splits["forget_train"], splits["forget_validation"]
    return ForgetRetainData(
        forget_train=unlearned, forget_test=held_out, forget_validation=chosen_by, provenance=(provenance,)
    )


def _split_retain(
    found: list[RetainExample], provenance: Provenance, source: SourceConfig, seed: int
) -> ForgetRetainData:
    """The splits of normal examples up to the limit."""
    examples, provenance = limited(found, provenance, source.limit, seed)
    what = f"the retain data {source.path}"
    near_copies = source.path != EMBEDDED  # Questions of the world differ by one word; each has an answer of its own.
    splits = split_by_group(
        examples, rest="train", held_out=RETAIN_SHARES, seed=seed, what=what, near_copies=near_copies
    )
    return ForgetRetainData(
        retain_train=splits["train"],
        retain_validation=splits["validation"],
        retain_test=splits["test"],
        provenance=(provenance,),
    )


def _check(config: DataConfig) -> None:
    if config.own_replies:
        raise RecipeError(
            "data.own_replies is true, and only sku run writes the model's own replies by itself: write them with sku "
            "data own, and name its files in data.forget and data.retain"
        )
    of_the_world = config.forget.path == EMBEDDED
    if of_the_world != (config.retain.path == EMBEDDED):
        raise RecipeError(
            "data.forget and data.retain must both be the embedded world or both be other data: "
            "no other model knows that world, and its own model knows nothing else"
        )
    named = {f"{key}.{name}": source for key in ("normal", "harmful") for name, source in getattr(config, key).items()}
    for key, source in named.items():
        if of_the_world or source.path == EMBEDDED:
            raise RecipeError(
                f"data.{key} does not go with the embedded world, whose model knows no other text and "
                "whose text no other model knows: leave it out"
            )
    if of_the_world and (config.refusals or config.misplaced_refusals):
        raise RecipeError(
            "the embedded world has its own refusals: leave data.refusals and data.misplaced_refusals out"
        )
    if of_the_world and config.unseen_fraction != DataConfig.unseen_fraction:
        raise RecipeError("the embedded world has its own unseen hazards: leave data.unseen_fraction out")


def load_training_pairs(forget: Source, retain: Source) -> ForgetRetainData:
    """Two sets as a trainer is given them: all of both is trained on; the embedded world keeps its own splits.

    Args:
        forget: As in ``load_forget_retain``.
        retain: As in ``load_forget_retain``.

    Returns:
        The splits ``forget_train`` and ``retain_train``, and where each example came from.

    Raises:
        DataError: As ``load_forget_retain``.
        RecipeError: As ``load_forget_retain``.
    """
    config = DataConfig(forget=_source(forget), retain=_source(retain))
    if config.forget.path == EMBEDDED:
        return load_data(config, 0)
    _check(config)
    harmful, first = limited(*read_examples(config.forget, "forget", ForgetExample), config.forget.limit, 0)
    normal, second = limited(*read_examples(config.retain, "retain", RetainExample), config.retain.limit, 0)
    _check_overlap(harmful, normal, config)
    return ForgetRetainData(forget_train=tuple(harmful), retain_train=tuple(normal), provenance=(first, second))


def _source(source: Source) -> SourceConfig:
    if isinstance(source, SourceConfig):
        return source
    return SourceConfig(path=str(source)) if isinstance(source, str | Path) else held_rows(source)


def _read_refusals(
    source: SourceConfig, key: str, owner: str, examples: Sequence[Example], seed: int
) -> tuple[dict[str, list[RetainExample]], Provenance]:
    """By normalised prompt: at least one for each of the examples that are trained on."""
    rows, provenance = limited(*read_examples(source, "retain", RetainExample), source.limit, seed)
    by_prompt: dict[str, list[RetainExample]] = {}
    for row in rows:
        by_prompt.setdefault(normalise_prompt(row.prompt), []).append(row)
    prompts = {normalise_prompt(example.prompt) for example in examples}
    missing = prompts - by_prompt.keys()
    if missing:
        raise DataError(
            f"{key}: {len(missing)} of {len(prompts)} prompts that are trained on have no refusal in {source.path}: "
            f"make them with sku data own, or take these prompts out of {owner}"
        )
    return by_prompt, provenance


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
        else replace(example, safe_answer=refusal.answer, safe_answer_finished=refusal.finished)
        for example, refusal in _in_turn(examples, refusals)
    )


def _check_overlap(forget: list[ForgetExample], retain: list[RetainExample], config: DataConfig) -> None:
    shared = {normalise_prompt(example.prompt) for example in forget}
    shared &= {normalise_prompt(example.prompt) for example in retain}
    if shared:
        raise DataError(
            f"{len(shared)} prompts are both in the forget data {config.forget.path} and in the retain data "
            f"{config.retain.path}, so they would be forgotten and kept at once: remove them from one"
        )


def _other_sets(
    config: DataConfig, forget: Sequence[Example], retain: Sequence[Example], seed: int
) -> ForgetRetainData:
    """What is only measured, without prompts of the run's own data and of normal sets that come before.

    Near copies of the run's harmful prompts are left out of harmful sets, those of both kinds of the run's prompts out
    of the final ones.
    """
    normal: dict[str, tuple[RetainExample, ...]] = {}
    normal_validation: dict[str, tuple[RetainExample, ...]] = {}
    harmful: dict[str, tuple[ForgetExample, ...]] = {}
    provenances: list[Provenance] = []
    own_harmful = {normalise_prompt(example.prompt) for example in forget}
    own = own_harmful | {normalise_prompt(example.prompt) for example in retain}
    used = set(own)
    for name, source in sorted(config.normal.items(), key=_is_final):
        key, is_final = f"data.normal.{name}", name == FINAL
        if is_final or lacks_answers(source):
            found = _read_prompts(source, "retain", RetainExample, key, seed)
        else:
            found = read_examples(source, "retain", RetainExample, key)
        examples, provenance = _without(*found, used, own if is_final else (), key, source.limit, seed)
        provenances.append(provenance)
        normal[name] = tuple(examples)
        if has_answers(examples) and not is_final:
            shares = {"validation": NORMAL_VALIDATION_SHARE}
            halves = split_by_group(examples, rest="normal", held_out=shares, seed=seed, what=f"{key} {source.path}")
            normal[name], normal_validation[name] = halves["normal"], halves["validation"]
        used |= {normalise_prompt(example.prompt) for example in examples}
    for name, source in sorted(config.harmful.items(), key=_is_final):
        key = f"data.harmful.{name}"
        found_prompts = _read_prompts(source, "forget", ForgetExample, key, seed)
        near = own if name == FINAL else own_harmful
        prompts, provenance = _without(*found_prompts, used, near, key, source.limit, seed)
        provenances.append(provenance)
        harmful[name] = tuple(prompts)
    return ForgetRetainData(
        normal=normal, normal_validation=normal_validation, harmful=harmful, provenance=tuple(provenances)
    )


def _is_final(named: tuple[str, SourceConfig]) -> bool:
    """Final sets are read last: what is asked oftener keeps the prompts of both."""
    return named[0] == FINAL


def _read_prompts(
    source: SourceConfig, kind: Kind, example_type: type[E], key: str, seed: int
) -> tuple[list[E], Provenance]:
    """Prompts alone; a table with answers gives each prompt once."""
    found = load_prompts(replace(source, limit=None), kind, key, seed=seed)
    examples = [example_type(prompt=one.prompt, answer="", category=one.category) for one in found.prompts]
    return examples, found.provenance


def _without(
    examples: list[E],
    provenance: Provenance,
    used: Collection[str],
    near: Collection[str],
    key: str,
    limit: int | None,
    seed: int,
) -> tuple[list[E], Provenance]:
    """What is neither in another set nor a near copy of one of ``near``, up to the limit."""
    different = [example for example in examples if normalise_prompt(example.prompt) not in used]
    is_near = near_to([normalise_prompt(example.prompt) for example in different], sorted(near))
    kept = [example for example, copied in zip(different, is_near, strict=True) if not copied]
    if not kept:
        raise DataError(
            f"{key}: all {len(examples)} prompts of {provenance.location} are in another set of the run too, or near "
            "copies of what it trains on, so nothing is left to measure: name another source, or leave it out"
        )
    provenance = provenance.keeping(different, len(examples) - len(different), IN_ANOTHER_SET)
    provenance = provenance.keeping(kept, len(different) - len(kept), NEAR_COPY)
    return limited(kept, provenance, limit, seed)


def wants_own_replies(config: DataConfig) -> bool:
    """Whether a run trains on own replies: it is told to, or a set has prompts without answers.

    Raises:
        DataError: A table can't be read.
        RecipeError: What goes with own replies alone is set without them.
    """
    wanted = config.own_replies or any(
        asks_only(source, is_list_of_prompts) for source in (config.forget, config.retain)
    )
    if not wanted and config.borderline is not None:
        raise RecipeError("data.borderline goes with own replies: set data.own_replies=true, or leave it out")
    return wanted


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
        found["borderline"] = prompt_set(kept, before.keeping(kept, left_out, "a normal prompt too"))
    return found


def _refuse_shared(harmful: Collection[str], normal: PromptSet, first: SourceConfig, second: SourceConfig) -> None:
    shared = sum(normalise_prompt(prompt.prompt) in harmful for prompt in normal.prompts)
    if shared:
        raise DataError(
            f"{shared} prompts are both among the harmful ones of {first.path} and in {second.path}: remove them from "
            "one"
        )
