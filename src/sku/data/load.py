"""Forget and retain data, read, checked and split by prompt; and prompts alone, to which a model writes its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sku.config.data import EMBEDDED, FINAL, RETAIN_SHARES, DataConfig, SourceConfig
from sku.config.recipe import Recipe
from sku.data.examples import (
    E,
    Example,
    ForgetExample,
    ForgetRetainData,
    Provenance,
    RetainExample,
    has_answers,
    normalise_prompt,
    prompts_of,
)
from sku.data.read import (
    PromptSet,
    has_prompts_alone,
    load_prompts,
    prompt_set,
    read_examples,
    split_hazards,
    validation_hazards,
)
from sku.data.rows import Kind
from sku.data.splits import limited, near_to, split_by_group
from sku.data.tables import held_rows
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
    retain: Source = EMBEDDED,
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
        retain: The same for normal pairs; the embedded world goes as a whole.
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
    config = DataConfig(
        forget=_source(forget),
        retain=_source(retain),
        normal={name: _source(source) for name, source in (normal or {}).items()},
        harmful={name: _source(source) for name, source in (harmful or {}).items()},
        unseen_fraction=unseen_fraction,
    )
    return load_data(config, seed, forget_validation=forget_validation_fraction)


def load_training_pairs(forget: Source, retain: Source) -> ForgetRetainData:
    """Two sets as a trainer is given them: all of both is trained on; the embedded world keeps its own splits.

    Raises:
        DataError: As ``load_forget_retain``.
        RecipeError: As ``load_forget_retain``.
    """
    config = DataConfig(forget=_source(forget), retain=_source(retain))
    if config.forget.path == EMBEDDED:
        return load_data(config, 0)
    harmful, normal = _read_both(config)
    first, second = limited(*harmful, config.forget.limit, 0), limited(*normal, config.retain.limit, 0)
    return ForgetRetainData(
        forget_train=tuple(first[0]), retain_train=tuple(second[0]), provenance=(first[1], second[1])
    )


def _source(source: Source) -> SourceConfig:
    if isinstance(source, SourceConfig):
        return source
    return SourceConfig(path=str(source)) if isinstance(source, str | Path) else held_rows(source)


def load_recipe_data(recipe: Recipe) -> ForgetRetainData:
    """Reads and splits the data of a recipe; ``forget_validation`` is held out where alpha is still to be chosen.

    Raises:
        DataError: As ``load_data``.
    """
    return load_data(recipe.data, recipe.seed, forget_validation=recipe.forget_validation)


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
    found_forget, found_retain = _read_both(config)
    others = ForgetRetainData()
    if config.forget.path != EMBEDDED:
        others = _other_sets(config, found_forget[0], found_retain[0], seed)
    harmful, first = limited(*found_forget, config.forget.limit, seed)
    normal, second = limited(*found_retain, config.retain.limit, seed)
    train, test, validation = _split_forget(harmful, config, forget_validation, seed)
    what = f"the retain data {config.retain.path}"
    # Questions of the world differ by one word; each has an answer of its own.
    near_copies = config.retain.path != EMBEDDED
    kept = split_by_group(normal, rest="train", held_out=RETAIN_SHARES, seed=seed, what=what, near_copies=near_copies)
    retain_train, provenances = kept["train"], [first, second, *others.provenance]
    # After the splits: no refusal of a held-out prompt gets near training.
    if config.refusals is not None:
        refusals, found = _read_refusals(config.refusals, "data.refusals", "data.forget", train, seed)
        train, validation = _with_refusals(train, refusals), _with_refusals(validation, refusals)
        provenances.append(found)
    if config.misplaced_refusals is not None:
        key = "data.misplaced_refusals"
        refusals, found = _read_refusals(config.misplaced_refusals, key, "data.retain", retain_train, seed)
        retain_train = tuple(
            replace(example, refusal=refusal.answer)
            for example, refusal in _in_turn(retain_train, refusals)
            if refusal is not None
        )
        provenances.append(found)
    return replace(
        others,
        forget_train=train,
        forget_test=test,
        forget_validation=validation,
        retain_train=retain_train,
        retain_validation=kept["validation"],
        retain_test=kept["test"],
        provenance=tuple(provenances),
    )


def _read_both(
    config: DataConfig,
) -> tuple[tuple[list[ForgetExample], Provenance], tuple[list[RetainExample], Provenance]]:
    """What is forgotten and what is kept, the limits aside; no prompt is in both."""
    _check(config)
    harmful = read_examples(config.forget, "forget", ForgetExample)
    normal = read_examples(config.retain, "retain", RetainExample)
    if config.forget.path != EMBEDDED:
        _refuse_shared(harmful[0], normal[0], config.forget, config.retain)
    return harmful, normal


def _check(config: DataConfig) -> None:
    if config.own_replies:
        raise RecipeError(
            "data.own_replies is true, and only sku run writes the model's own replies by itself: write them with sku "
            "data own, and name its files in data.forget and data.retain"
        )
    if config.borderline is not None:
        raise RecipeError("data.borderline goes with own replies: set data.own_replies=true, or leave it out")
    of_the_world = config.forget.path == EMBEDDED
    if of_the_world != (config.retain.path == EMBEDDED):
        raise RecipeError(
            "data.forget and data.retain must both be the embedded world or both be other data: "
            "no other model knows that world, and its own model knows nothing else"
        )
    named = {f"{key}.{name}": source for key in ("normal", "harmful") for name, source in getattr(config, key).items()}
    for key, source in named.items():
        if of_the_world or source.path == EMBEDDED:
            raise RecipeError(f"data.{key} does not go with the embedded world, a language of its own: leave it out")
    has_its_own = {
        "refusals": config.refusals, "misplaced_refusals": config.misplaced_refusals,
        "unseen_fraction": config.unseen_fraction != DataConfig.unseen_fraction,
    }  # fmt: skip
    for key, value in has_its_own.items():
        if of_the_world and value:
            raise RecipeError(f"the embedded world has its own {key}: leave data.{key} out")


def _split_forget(
    examples: Sequence[ForgetExample], config: DataConfig, validation: float, seed: int
) -> tuple[tuple[ForgetExample, ...], tuple[ForgetExample, ...], tuple[ForgetExample, ...]]:
    """``forget_train``, ``forget_test``, and ``forget_validation``, which is empty where no share is asked for."""
    source = config.forget
    if source.path == EMBEDDED:
        return *split_hazards(examples, source.limit), validation_hazards() if validation else ()
    shares, what = {"test": config.unseen_fraction}, f"the forget data {source.path}"
    splits = split_by_group(examples, rest="train", held_out=shares, seed=seed, what=what)
    if not validation:
        return splits["train"], splits["test"], ()
    # Of what is left beside forget_test, so that that is the same with and without it.
    shares, what = {"validation": validation}, f"{what} without its unseen prompts"
    chosen_by = split_by_group(splits["train"], rest="train", held_out=shares, seed=seed, what=what)
    return chosen_by["train"], splits["test"], chosen_by["validation"]


def _read_refusals(
    source: SourceConfig, key: str, owner: str, examples: Sequence[Example], seed: int
) -> tuple[dict[str, list[RetainExample]], Provenance]:
    """By normalised prompt: at least one for each of the examples that are trained on."""
    rows, provenance = limited(*read_examples(source, "retain", RetainExample), source.limit, seed)
    by_prompt: dict[str, list[RetainExample]] = {}
    for row in rows:
        by_prompt.setdefault(normalise_prompt(row.prompt), []).append(row)
    prompts = prompts_of(examples)
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


def _refuse_shared(
    harmful: Iterable[Example], normal: Iterable[Example], first: SourceConfig, second: SourceConfig
) -> None:
    shared = len(prompts_of(harmful) & prompts_of(normal))
    if shared:
        raise DataError(
            f"{shared} prompts are both in the forget data {first.path} and in the retain data {second.path}, so they "
            "would be forgotten and kept at once: remove them from one"
        )


def _other_sets(
    config: DataConfig, forget: Sequence[Example], retain: Sequence[Example], seed: int
) -> ForgetRetainData:
    """What is only measured, without prompts of the run's own data and of normal sets that come before.

    Near copies of the run's harmful prompts are left out of harmful sets, those of both kinds of the run's prompts out
    of the final ones.
    """
    own_harmful = prompts_of(forget)
    own = own_harmful | prompts_of(retain)
    used = set(own)
    sets: tuple[tuple[Kind, str, Mapping[str, SourceConfig]], ...] = (
        ("retain", "normal", config.normal),
        ("forget", "harmful", config.harmful),
    )
    found: dict[Kind, dict[str, tuple[Any, ...]]] = {"retain": {}, "forget": {}}
    validation: dict[str, tuple[RetainExample, ...]] = {}
    provenances: list[Provenance] = []
    for kind, what, named in sets:
        # Final sets are read last: what is asked oftener keeps the prompts of both.
        for name, source in sorted(named.items(), key=lambda item: item[0] == FINAL):
            key = f"data.{what}.{name}"
            examples: list[Any]
            if kind == "retain" and name != FINAL and not has_prompts_alone(source):
                examples, provenance = read_examples(source, kind, RetainExample, key)
            else:
                asked = load_prompts(replace(source, limit=None), kind, key, seed=seed)
                made: Any = RetainExample if kind == "retain" else ForgetExample
                examples = [made(prompt=one.prompt, answer="", category=one.category) for one in asked.prompts]
                provenance = asked.provenance
            near = own if name == FINAL else own_harmful if kind == "forget" else set()
            examples, provenance = _without(examples, provenance, used, near, key)
            examples, provenance = limited(examples, provenance, source.limit, seed)
            provenances.append(provenance)
            found[kind][name] = tuple(examples)
            if kind == "retain":
                used |= prompts_of(examples)
                if has_answers(examples):
                    where, shares = f"{key} {source.path}", {"validation": NORMAL_VALIDATION_SHARE}
                    halves = split_by_group(examples, rest="normal", held_out=shares, seed=seed, what=where)
                    found[kind][name], validation[name] = halves["normal"], halves["validation"]
    return ForgetRetainData(
        normal=found["retain"], normal_validation=validation, harmful=found["forget"], provenance=tuple(provenances)
    )


def _without(
    examples: list[E], provenance: Provenance, used: Collection[str], near: Collection[str], key: str
) -> tuple[list[E], Provenance]:
    """What is neither in another set nor a near copy of one of ``near``."""
    different = [example for example in examples if normalise_prompt(example.prompt) not in used]
    prompts = tuple(normalise_prompt(example.prompt) for example in different)
    is_near = near_to(prompts, tuple(sorted(near)))
    kept = [example for example, copied in zip(different, is_near, strict=True) if not copied]
    if not kept:
        raise DataError(
            f"{key}: all {len(examples)} prompts of {provenance.location} are in another set of the run too, or near "
            "copies of what it trains on, so nothing is left to measure: name another source, or leave it out"
        )
    provenance = provenance.keeping(different, len(examples) - len(different), IN_ANOTHER_SET)
    return kept, provenance.keeping(kept, len(different) - len(kept), NEAR_COPY)


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

    Raises:
        DataError: A table can't be read, it is not clear which column holds the prompts, none is left, or a prompt is
            harmful and normal at once.
    """
    names = ("forget", "retain") if prefix else ("harmful", "normal")
    found: OwnPrompts = {
        "harmful": load_prompts(harmful, "forget", f"{prefix}{names[0]}", seed=seed),
        "normal": load_prompts(normal, "retain", f"{prefix}{names[1]}", seed=seed),
    }
    _refuse_shared(found["harmful"].prompts, found["normal"].prompts, harmful, normal)
    if borderline is not None:
        extra = load_prompts(borderline, "retain", f"{prefix}borderline", seed=seed)
        _refuse_shared(found["harmful"].prompts, extra.prompts, harmful, borderline)
        known, before = prompts_of(found["normal"].prompts), extra.provenance
        kept = [prompt for prompt in extra.prompts if normalise_prompt(prompt.prompt) not in known]
        if not kept:
            raise DataError(f"all prompts of {before.location} are among the normal prompts too: leave it out")
        left_out = len(extra.prompts) - len(kept)
        found["borderline"] = prompt_set(kept, before.keeping(kept, left_out, "a normal prompt too"))
    return found
