"""Settings as dataclasses that pydantic checks: every key, type and range, from a recipe and in Python alike."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
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
            raise RecipeError(explain(error, values, "", keys_of(made))) from None

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


def explain(error: ValidationError, content: Any, key: str, known: Iterable[str]) -> str:
    """What is wrong with settings, in one line: the key, its value, and what to do.

    Args:
        error: Of pydantic.
        content: What was checked.
        key: The recipe's key that holds the content; empty for the recipe itself.
        known: Keys that may be meant where one isn't known, dotted.
    """
    errors = error.errors(include_url=False)
    places = [_place(one["loc"], content, key) for one in errors]
    unknown = [number for number, one in enumerate(errors) if one["type"] == "unexpected_keyword_argument"]
    # All members of a union say what they want; the one that got furthest is told of.
    number = unknown[0] if unknown else max(range(len(errors)), key=lambda each: len(errors[each]["loc"]))
    first, (path, value) = errors[number], places[number]
    if "error" in first.get("ctx", {}):  # Of a dataclass's own check.
        cause = first["ctx"]["error"]
        return str(cause) if isinstance(cause, SkuError) else f"{path or 'the recipe'}: {one_line(cause)}"
    if first["type"] == "missing":
        return f"{path}.{first['loc'][-1]} is missing".removeprefix(".")
    if unknown:
        known = sorted(known, key=lambda one: (one.count("."), one))
        same = [one for one in known if one.rpartition(".")[2] == first["loc"][-1]]
        hint = f" Did you mean {' or '.join(same)}?" if same else did_you_mean(path, known)
        return f"{path} is not a known key.{hint}"
    wanted = " or ".join(one["msg"] for one, place in zip(errors, places, strict=True) if place[0] == path)
    wanted = wanted.replace("Input should be ", "")
    hint = did_you_mean(str(value), re.findall(r"'([^']*)'", wanted))
    return f"{path or 'the recipe'} is {value!r}; it must be {wanted}{'.' if hint else ''}{hint}"


def _place(loc: tuple[int | str, ...], content: Any, key: str) -> tuple[str, Any]:
    """Key and value that an error is about, without the names of a union's members that pydantic puts between."""
    for part in loc:
        if isinstance(content, Mapping) and part in content:
            key, content = (f"{key}.{part}" if key else str(part)), content[part]
        elif isinstance(content, list | tuple) and isinstance(part, int):
            key, content = f"{key}[{part}]", content[part]
    return key, content


def keys_of(target: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a dataclass of settings and of those inside it, dotted."""
    for name, hint in typing.get_type_hints(target).items():
        key = f"{prefix}{name}"
        yield key
        inner = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if inner and typing.get_origin(hint) is not Mapping:
            yield from keys_of(inner[0], f"{key}.")
