"""Operators on a saved bad vector, to be combined in a recipe's ``negate.operators``.

Importing this package imports torch; a recipe is checked without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sku.config.recipe import settings_from_dict
from sku.errors import RecipeError, TaskVectorError, did_you_mean
from sku.from_file import SUFFIX, defined_in_file
from sku.negate.operators.base import AnyOperator, Need, Operator, OperatorContext, RowMap, map_rows
from sku.negate.operators.base import PreparedOperator as PreparedOperator
from sku.negate.operators.by_inputs import CONTRAST, NULL_SPACE
from sku.negate.operators.by_weights import LAYERS, MINUS_BENIGN, TRIM
from sku.negate.operators.learned import LEARNED
from sku.negate.task_vector import TaskVector

OPERATORS: tuple[AnyOperator, ...] = (
    LAYERS, TRIM, NULL_SPACE, CONTRAST, MINUS_BENIGN, LEARNED,
)  # fmt: skip
"""All of them. The plain vector is that of an empty list."""
_HELD_OUT: Mapping[Need, str] = {
    "normal_held_out": "retain_validation", "harmful_held_out": "forget_validation",
    "refusals_held_out": "forget_validation", "borderline_held_out": "normal_validation",
}  # fmt: skip
"""Splits that strengths are chosen by."""


@dataclass(frozen=True, kw_only=True)
class OperatedVector:
    """What all operators of a recipe made of a task vector."""

    vector: TaskVector
    row_maps: tuple[Mapping[str, RowMap], ...] | None
    """One after the other what an adapter has to follow; None where it can't."""
    records: tuple[dict[str, Any], ...]
    """What each did, for the manifest."""


def prepare_operators(entries: Iterable[Mapping[str, Any]], where: str = "recipe") -> tuple[PreparedOperator, ...]:
    """Checks names and settings before anything is loaded.

    Args:
        entries: As in a recipe's ``negate.operators``: one name, or the path of a file ending in ``.py`` that defines
            an operator, with its settings each.
        where: Name of the recipe, for messages.

    Returns:
        The operators, in order.

    Raises:
        RecipeError: An unknown operator or setting, with a suggestion, a value out of range, or a file that can't be
            used.
    """
    known = {operator.name: operator for operator in OPERATORS}
    prepared = []
    for place, entry in enumerate(entries):
        ((name, settings),) = entry.items()
        key = f"negate.operators[{place}]"
        if name.endswith(SUFFIX):
            operator = defined_in_file(name, Operator, "apply", "MY_OPERATOR = Operator(name=..., ...)")
        elif name in known:
            operator = known[name]
        else:
            raise RecipeError(
                f"{key}: {name} is not an operator.{did_you_mean(name, known)} Known: {', '.join(known)} ({where})"
            )
        given = {} if settings is None else settings
        if operator.only_setting is not None:
            given = {operator.only_setting: given}
        try:
            checked = settings_from_dict(operator.settings, given, f"{key}.{name}", where)
        except RecipeError as error:
            # The only setting has no name of its own in a recipe.
            raise RecipeError(str(error).replace(f"{name}.{operator.only_setting}", name)) from None
        prepared.append(PreparedOperator(operator=operator, settings=checked))
    return tuple(prepared)


def operate(vector: TaskVector, operators: Sequence[PreparedOperator], context: OperatorContext) -> OperatedVector:
    """Applies operators one after the other.

    Args:
        vector: What stage 1 learned, ``theta_bad - theta_o``.
        operators: From ``prepare_operators``.
        context: What they may look at.

    Returns:
        The vector to subtract, with an account.

    Raises:
        TaskVectorError: A vector doesn't fit, or nothing is left.
        RecipeError: An operator needs data that is not there, or names weights that are not.
    """
    for prepared in operators:
        context.check(prepared.needs, prepared.who)
    maps: list[Mapping[str, RowMap]] | None = []
    records = []
    norm = vector.norm()
    for prepared in operators:
        done = prepared.operator.apply(prepared.settings, vector, context)
        vector = map_rows(vector, done.row_maps or {}, context.base) if done.vector is None else done.vector
        maps = None if maps is None or done.row_maps is None else [*maps, done.row_maps]
        before, norm = norm, vector.norm()
        norms = {"norm_before": before, "norm_after": norm}
        records.append({"name": prepared.operator.name, **done.record, **norms})
    # Not after each: one that begins with nothing of the vector may bring its own.
    if operators and norm == 0:
        raise TaskVectorError("the operators leave nothing of the task vector: weaken them")
    return OperatedVector(vector=vector, row_maps=None if maps is None else tuple(maps), records=tuple(records))


def fitted_notes(operators: Sequence[PreparedOperator]) -> list[str]:
    """A sentence for each operator that was fitted on splits by which strengths are then chosen; none for others."""
    found = []
    for prepared in operators:
        splits = list(dict.fromkeys(_HELD_OUT[need] for need in prepared.needs if need in _HELD_OUT))
        if splits:
            found.append(
                f"{prepared.who} was fitted on {', '.join(splits)}, and what strengths are "
                "chosen by is of the same splits: it flatters them; unseen and retain_test are untouched"
            )
    return found
