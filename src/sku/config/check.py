"""Settings as dataclasses that pydantic checks: every key, type and range, from a recipe and in Python alike."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic.dataclasses
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sku.errors import RecipeError, SkuError, did_you_mean, one_line

STRICT = ConfigDict(extra="forbid", strict=True)
"""No key that isn't known, and no value of another type than is asked for."""
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""NumPy takes no larger one."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
"""A share that leaves something on both of its sides."""
Share = Annotated[float, Field(gt=0, le=1)]
Limit = Annotated[float, Field(ge=0, lt=1)]

_MOST_VALUES, _DEEPEST = 20_000, 50
"""Of one text, each YAML alias counted as what it stands for; the longest recipe of the package has under 200."""
_WORDS = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "finite_number": "a finite number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:.12g}",
}
"""Type of pydantic's error -> what a value must be, in the words of a recipe."""

T = TypeVar("T")
_ANY: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def validated(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass of settings that refuses what its annotations don't allow with a ``RecipeError``."""
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    init = made.__init__

    @functools.wraps(init)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            init(self, **values)
        except ValidationError as error:
            raise RecipeError(explain(error, made, values)) from None

    made.__init__ = __init__
    return cast("type[T]", made)


def check_alpha(alpha: float, name: str = "alpha") -> None:
    """Refuses a strength that would add what stage 1 learned: at -1 a plain run's result is the bad model itself.

    Asked where a user gives an alpha; the arithmetic behind it takes any sign.

    Args:
        alpha: How much of a task vector is subtracted.
        name: Of the setting, for the message.

    Raises:
        RecipeError: It is below 0 or not finite.
    """
    if not math.isfinite(alpha):
        raise RecipeError(f"{name} is {alpha}; it must be a finite number")
    if alpha < 0:
        raise RecipeError(
            f"{name} is {alpha:g}: below 0 what stage 1 learned is added, and -1 gives the bad model itself; it must "
            "be 0 or more"
        )


def content_sha256(content: Any) -> str:
    """Hash of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def plain_data(value: Any) -> Any:
    """Settings as JSON holds them: dataclasses and mappings as dicts, tuples as lists."""
    return _ANY.dump_python(value, mode="json")


def check_plain(content: Any, key: str = "", depth: int = 0) -> int:
    """Refuses what JSON can't hold: YAML knows dates, sets and NaN, and aliases that stand for billions of values.

    Args:
        content: A recipe, or a part of one.
        key: The recipe's key that holds it, for messages; empty for the recipe itself.
        depth: How deep it lies.

    Returns:
        How many values it holds.

    Raises:
        RecipeError: Some value is no text, finite number, yes or no, list, or keys and values; text is no Unicode; or
            there is more than can be walked through and printed.
    """
    if depth > _DEEPEST:
        raise RecipeError(f"{key[:100]} ... is nested more than {_DEEPEST} deep, or holds itself")
    inside: list[tuple[str, Any]] = []
    if isinstance(content, Mapping):
        for name, entry in content.items():
            if not isinstance(name, str):
                raise RecipeError(f"{key or 'the recipe'} has the key {name!r}, which is no text: quote it")
            _check_one(name, key or "the recipe")
            inside.append((f"{key}.{name}" if key else name, entry))
    elif isinstance(content, list | tuple):
        inside = [(f"{key}[{place}]", entry) for place, entry in enumerate(content)]
    else:
        _check_one(content, key)
    count = 1
    for place, entry in inside:
        count += check_plain(entry, place, depth + 1)
        if count > _MOST_VALUES:
            raise RecipeError(f"it stands for more than {_MOST_VALUES} values")
    return count


def _check_one(content: Any, key: str) -> None:
    """Refuses a value that is neither text, number, yes or no, nor empty."""
    if isinstance(content, str):
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise RecipeError(f"{key} is {content!r}, which is no Unicode text: rename it") from None
    elif isinstance(content, float) and not math.isfinite(content):
        raise RecipeError(f"{key} is {content}; it must be a finite number")
    elif content is not None and not isinstance(content, int | float):
        raise RecipeError(
            f"{key} is of type {type(content).__name__}; it must be text, a number, true or false, a list, or keys "
            "and values: quote it if it is text"
        )


def explain(error: ValidationError, target: type, content: Any, key: str = "", known: Iterable[str] = ()) -> str:
    """What is wrong with settings, in one line: the key, its value, and what to do.

    Args:
        error: Of pydantic.
        target: The dataclass.
        content: What was checked against it.
        key: The recipe's key that holds the content; empty for the recipe itself.
        known: Keys that may be meant where one isn't known, dotted.
    """
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "unexpected_keyword_argument"), errors[0])
    path, value = _place(first["loc"], content, key)
    if "error" in first.get("ctx", {}):  # Of a dataclass's own check.
        cause = first["ctx"]["error"]
        return str(cause) if isinstance(cause, SkuError) else f"{path or 'the recipe'}: {one_line(cause)}"
    if first["type"] == "missing":
        return f"{path}.{first['loc'][-1]} is missing".removeprefix(".")
    if first["type"] == "unexpected_keyword_argument":
        return f"{path} is not a known key.{_meant(str(first['loc'][-1]), _fields_at(target, first['loc']), known)}"
    # All members of a union say what they want; the one that got further is told of.
    places = [_place(one["loc"], content, key)[0] for one in errors]
    inner = next((number for number, place in enumerate(places) if place.startswith(f"{path}[")), None)
    if inner is not None:
        path, value = _place(errors[inner]["loc"], content, key)
    wanted = [one for one, place in zip(errors, places, strict=True) if place == path]
    if wanted[0]["type"] in ("dict_type", "mapping_type", "dataclass_type", "dataclass_exact_type"):
        return f"{path or 'the recipe'} must hold keys and values, not {value!r}"
    options = [option for one in wanted for option in re.findall(r"'([^']*)'", one.get("ctx", {}).get("expected", ""))]
    words = [_WORDS[one["type"]].format(**one.get("ctx", {})) for one in wanted if one["type"] in _WORDS]
    words += [f"one of {', '.join(options)}" if len(options) > 1 else option for option in options[:1]]
    hint = did_you_mean(str(value), options)
    return f"{path} is {value!r}; it must be {' or '.join(words) or wanted[0]['msg']}{'.' if hint else ''}{hint}"


def _place(loc: tuple[int | str, ...], content: Any, key: str) -> tuple[str, Any]:
    """Key and value that an error is about, without the names of a union's members that pydantic puts between."""
    for part in loc:
        if isinstance(content, Mapping) and part in content:
            key, content = (f"{key}.{part}" if key else str(part)), content[part]
        elif isinstance(content, list | tuple) and isinstance(part, int):
            key, content = f"{key}[{part}]", content[part]
    return key, content


def _fields_at(target: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Known keys beside the one at a place."""
    for part in loc[:-1]:
        hint = typing.get_type_hints(target).get(str(part), target)
        # Of a union, a list or a mapping what it holds.
        target = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), target)
    return [item.name for item in dataclasses.fields(target)]


def _meant(name: str, beside: list[str], known: Iterable[str]) -> str:
    """A suggestion: keys of that very name elsewhere in a recipe, else a near one beside it."""
    elsewhere = sorted((key for key in known if key.rpartition(".")[2] == name), key=lambda key: (key.count("."), key))
    return f" Did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, beside)
