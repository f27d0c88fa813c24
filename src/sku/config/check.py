"""The check of plain data against dataclasses of settings: every key, every type."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sku.config.acquire import TRAINING_KEYS
from sku.config.compat import REFERENCE, CompatConfig
from sku.config.recipe import Recipe
from sku.errors import RecipeError, did_you_mean

_LARGEST = 2**1000
_WANTED = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
"""Types of values in the words of a recipe."""


def check_plain(content: Any, key: str, where: str) -> None:
    """Refuses what a manifest can't hold: YAML knows dates, sets and NaN, and JSON doesn't.

    Args:
        content: A recipe, or a part of one.
        key: The recipe's key that holds it, for messages; empty for the recipe itself.
        where: Name of the recipe, for messages.

    Raises:
        RecipeError: Some value is no text, finite number, yes or no, list, or keys and values; or text is no Unicode.
    """
    if isinstance(content, Mapping):
        for name, entry in content.items():
            if not isinstance(name, str):
                raise RecipeError(f"{key or 'the recipe'} has the key {name!r}, which is no text: quote it ({where})")
            check_plain(name, key or "the recipe", where)
            check_plain(entry, f"{key}.{name}" if key else name, where)
    elif isinstance(content, list | tuple):
        for place, entry in enumerate(content):
            check_plain(entry, f"{key}[{place}]", where)
    elif isinstance(content, str):
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise RecipeError(f"{key} is {content!r}, which is no Unicode text: rename it ({where})") from None
    elif isinstance(content, float):
        if not math.isfinite(content):
            raise RecipeError(f"{key} is {content}; it must be a finite number ({where})")
    elif content is not None and not isinstance(content, int):
        raise RecipeError(
            f"{key} is of type {type(content).__name__}; it must be text, a number, true or false, a list, or keys "
            f"and values: quote it if it is text ({where})"
        )


def build(target: Any, content: Any, key: str, where: str) -> Any:
    """Builds a frozen dataclass of settings, and those inside it, from plain data.

    Args:
        target: The dataclass.
        content: Keys and values.
        key: The recipe's key that holds them, for messages; empty for the recipe itself.
        where: Name of the recipe, for messages.

    Returns:
        An instance of ``target``.

    Raises:
        RecipeError: An unknown key (with a suggestion), a missing one, a wrong type, or a value out of range.
    """
    if not isinstance(content, Mapping):
        raise RecipeError(f"{key or 'the recipe'} must hold keys and values, not {content!r} ({where})")
    fields = {item.name: item for item in dataclasses.fields(target)}
    for name in content:
        if name not in fields:
            prefix = f"{key}." if key else ""
            raise RecipeError(f"{prefix}{name} is not a known key.{_meant(str(name), fields)} ({where})")
    hints = typing.get_type_hints(target)
    values: dict[str, Any] = {}
    for name, item in fields.items():
        path = f"{key}.{name}" if key else name
        if name in content:
            values[name] = _convert(hints[name], content[name], path, where)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{path} is missing ({where})")
    try:
        return target(**values)
    except RecipeError as error:
        raise RecipeError(f"{error} ({where})") from None


def _meant(name: str, fields: Mapping[str, Any]) -> str:
    """A suggestion: keys of that very name elsewhere in a recipe, else a near one beside it."""
    elsewhere = [key for key in _keys(Recipe) if key.rpartition(".")[2] == name]
    if not elsewhere:
        return did_you_mean(name, fields)
    return f" Did you mean {' or '.join(sorted(elsewhere, key=lambda key: (key.count('.'), key)))}?"


def _keys(target: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a dataclass of settings and of those inside it, with the usual ones of ``acquire.training``."""
    for name, hint in typing.get_type_hints(target).items():
        key = f"{prefix}{name}"
        yield key
        inner = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if inner and typing.get_origin(hint) is not Mapping:
            yield from _keys(inner[0], f"{key}.")
    if not prefix:
        yield from (f"acquire.training.{name}" for name in TRAINING_KEYS)


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Checks one value against its annotation; a wrong type names the key, the value and what was expected."""
    origin = typing.get_origin(hint)
    if hint is CompatConfig and isinstance(value, str):
        return _convert_compat(value, key, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key, where)
    if origin is Literal:
        return _convert_literal(typing.get_args(hint), value, key, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value, key, where)
    if origin is tuple:
        if isinstance(value, list | tuple):
            entry_type = typing.get_args(hint)[0]
            return tuple(_convert(entry_type, entry, f"{key}[{place}]", where) for place, entry in enumerate(value))
        raise RecipeError(f"{key} is {value!r}; it must be a list ({where})")
    if origin is not None and issubclass(origin, Mapping):
        if not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
            raise RecipeError(f"{key} is {value!r}; it must hold keys and values ({where})")
        entry_type = typing.get_args(hint)[1]
        if not dataclasses.is_dataclass(entry_type):
            return dict(value)
        return {name: build(entry_type, entry, f"{key}.{name}", where) for name, entry in value.items()}
    return _convert_scalar(hint, value, key, where)


def _convert_compat(value: str, key: str, where: str) -> CompatConfig:
    if value == REFERENCE:
        return CompatConfig.reference()
    raise RecipeError(
        f"{key} is {value!r}; it must be {REFERENCE}, or hold switches such as 'question_tokens: true'."
        f"{did_you_mean(value, [REFERENCE])} ({where})"
    )


def _convert_literal(options: tuple[Any, ...], value: Any, key: str, where: str) -> Any:
    if value in options:
        return value
    raise RecipeError(
        f"{key} is {value!r}; it must be one of {', '.join(map(str, options))}."
        f"{did_you_mean(str(value), map(str, options))} ({where})"
    )


def _convert_union(options: tuple[Any, ...], value: Any, key: str, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[RecipeError] = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, key, where)
            except RecipeError as error:
                errors.append(error)
    wanted = [_wanted(option) for option in options if option is not type(None)]
    if len(wanted) == 1:
        raise errors[0]
    raise RecipeError(f"{key} is {value!r}; it must be {' or '.join(wanted)} ({where})")


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list"
    return _WANTED.get(hint) or ", ".join(map(str, typing.get_args(hint)))


def _convert_scalar(hint: Any, value: Any, key: str, where: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 2e-4 as text: it wants 2.0e-4. People write 2e-4.
        with contextlib.suppress(ValueError):
            return float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        # A whole number may be larger than any float.
        return float(value) if abs(value) < _LARGEST else math.inf
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise RecipeError(f"{key} is {value!r}; it must be {_wanted(hint)} ({where})")
