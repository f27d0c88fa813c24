"""A whole recipe, and the reading of one: files and names of the package, and what ``--set`` changes in them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from sku.config.check import STRICT, Seed, explain, keys_of, plain_data, validated
from sku.config.data import EMBEDDED, DataConfig, ModelConfig
from sku.config.stages import (
    TRAINING_KEYS,
    VALIDATION_SHARE,
    AcquireConfig,
    EvaluateConfig,
    MethodConfig,
    NegateConfig,
    SweepConfig,
    TwinShares,
)
from sku.errors import RecipeError, did_you_mean, one_line

S = TypeVar("S")
_LONGEST_NAME = 200
NEGATING_METHODS = ("sku", "task_vector")
"""Methods that train a bad model, whose task vector is subtracted."""


@validated
class Recipe:
    """One whole run: data, stage 1, stage 2, evaluation."""

    name: str
    model: ModelConfig
    data: DataConfig
    description: str = ""
    seed: Seed = 0
    acquire: AcquireConfig = field(default_factory=AcquireConfig)
    negate: NegateConfig = field(default_factory=NegateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: str = "sku"
    """What is run: ``sku``, or another name that ``sku init`` lists."""
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Settings of the other methods, by name."""
    keep_bad_model: bool | Literal["never"] = False
    """Keep the hazardous model of stage 1 after the run. It answers harmful prompts on purpose. ``false`` keeps it,
    private and marked, only of a run that was interrupted or failed, for ``--resume`` (``sku wipe`` removes it);
    ``never`` not even there: it is removed at once, and stage 1 of a resumed run begins anew."""

    def __post_init__(self) -> None:
        name = self.name
        odd = any(not character.isprintable() or character in "/\\" for character in name)
        if odd or not name.strip() or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
            raise RecipeError(
                f"name is {name!r}; runs without --out are kept in a folder of that name, so it must be text of at "
                f"most {_LONGEST_NAME} bytes without slashes, control characters or a dot in front, such as my-run"
            )
        if self.negate.twin != TwinShares() and self.acquire.twin == "none":
            raise RecipeError("negate.twin shares out two twins, and acquire.twin is none: set acquire.twin=good")

    @property
    def chooses_alpha(self) -> bool:
        """Whether a run has to choose the strength of its method."""
        return self.negate.alpha == "auto"

    @property
    def strength(self) -> float:
        """In ``theta_u = theta_o + strength * delta``: alpha; 1, the published one, where a run is to choose it."""
        return 1.0 if self.negate.alpha == "auto" else self.negate.alpha

    @property
    def checks_stage_1(self) -> bool:
        """Whether a run asks what stage 1 has learned; only SKU has one."""
        check = self.acquire.twin == "good" if self.acquire.check is None else self.acquire.check
        return check and self.method == "sku"

    @property
    def forget_validation(self) -> float:
        """Share of the harmful prompts to hold out: to choose alpha, to ask stage 1; 0 for none."""
        needed = self.chooses_alpha or self.checks_stage_1
        return VALIDATION_SHARE if needed else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, every default spelled out."""
        return dict(plain_data(self))


def read_yaml(text: str) -> Any:
    """Reads one document of YAML 1.2, in which ``2e-4`` is a number and ``no`` a word.

    Raises:
        RecipeError: It is not YAML, asks for a Python object, has a key twice, or has an alias: a few lines of aliases
            stand for billions of values.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        if any(isinstance(event, AliasEvent) for event in yaml.parse(text)):
            raise YAMLError("it has an alias (*name): write the value out")
        return yaml.load(text)
    except RecursionError:
        raise RecipeError("not YAML: it is nested too deep") from None
    except DuplicateKeyError as error:
        where = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise RecipeError(f"not YAML: a key stands twice{where} ({one_line(error.problem)})") from None
    except (YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # Beside its own errors the loader lets some through: for ``2020-13-45``, say.
        raise RecipeError(f"not YAML: {one_line(error)}") from None


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("sku") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path = EMBEDDED, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies ``key.sub=value`` overrides, and checks every key and type.

    Args:
        name_or_path: Name of a recipe of the package, or a YAML file.
        overrides: Such as ``acquire.training.max_steps=20``; the value is read as YAML.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: Unknown recipe or key (with a suggestion), wrong type, or a value out of range.
    """
    text, where = recipe_text(name_or_path)
    try:
        content = read_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{where} is {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{where} must hold keys and values, such as 'name: my-run'")
    for override in overrides:
        apply_override(content, override)
    return recipe_from_dict(content, where)


def recipe_from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Checks plain data against the fields of ``Recipe``.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    return settings_from_dict(Recipe, content, "", where)


def settings_from_dict(target: type[S], content: Mapping[str, Any], key: str, where: str = "recipe") -> S:
    """Checks plain data against a dataclass of settings, such as a method's own.

    Args:
        target: The dataclass.
        content: Keys and values.
        key: The recipe's key that holds them, for messages; empty for the recipe itself.
        where: Name of the recipe, for messages.

    Returns:
        The settings.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    try:
        content = plain_data(content)
        text = json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # Half of a surrogate pair, or what holds itself.
        raise RecipeError(
            f"{key or 'the recipe'} holds what can't be written down: {one_line(error)} ({where})"
        ) from None
    try:
        adapter: TypeAdapter[S] = _adapter(target)  # type: ignore[arg-type]
        return adapter.validate_json(text)  # In JSON a list can stand for a tuple.
    except ValidationError as error:
        known = {*keys_of(target, f"{key}." if key else ""), *keys_of(Recipe), *TRAINING_KEYS}
        raise RecipeError(f"{explain(error, content, key, known)} ({where})") from None
    except RecipeError as error:
        raise RecipeError(f"{error} ({where})") from None


@functools.cache
def _adapter(target: Any) -> TypeAdapter[Any]:
    if not hasattr(target, "__pydantic_config__"):  # A plain dataclass, of a user's own method, say.
        target.__pydantic_config__ = STRICT
    return TypeAdapter(target)


def recipe_text(name_or_path: str | Path) -> tuple[str, str]:
    """The text of a recipe, and what messages call it.

    Raises:
        RecipeError: There is no such recipe, or it can't be read.
    """
    name = str(name_or_path)
    path = Path(name_or_path)
    try:
        if path.suffix in {".yaml", ".yml"} or path.is_file():
            if path.exists() and not path.is_file():  # A pipe would be waited for, and a device read for ever.
                raise RecipeError(f"recipe {name} is no file")
            return path.read_text(encoding="utf-8"), name
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name} can't be read: {error}") from None
    if name not in recipe_names():
        known = recipe_names()
        raise RecipeError(
            f"there is no recipe named {name}.{did_you_mean(name, known)} Known: {', '.join(known)}; "
            "or give a .yaml file"
        )
    return (resources.files("sku") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"


def apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one value of nested plain data.

    Args:
        content: Changed in place.
        override: ``key.sub=value``; the value is read as YAML.

    Raises:
        RecipeError: No key, no sign, no YAML, or a key below a value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override} must look like key.sub=value")
    try:
        parsed = read_yaml(value) if value else None
    except RecipeError as error:
        raise RecipeError(f"--set {override}: {error}") from None
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, it has no keys below it")
        node = child
    node[last] = parsed
