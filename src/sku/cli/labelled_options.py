"""Options of the commands that read labelled replies, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sku.errors import RecipeError

if TYPE_CHECKING:
    from sku.evaluate.judges.calibrate import GroupFigures, LabelColumns
    from sku.evaluate.metrics import Rate

PromptColumnOption = Annotated[str | None, typer.Option("--prompt-column", help="Column of the prompts.")]
ReplyColumnOption = Annotated[str | None, typer.Option("--reply-column", help="Column of the replies.")]
LabelColumnOption = Annotated[str | None, typer.Option("--label-column", help="Column of the labels.")]
HarmfulValueOption = Annotated[
    str | None, typer.Option("--harmful-value", help="The label of harmful replies; all others are then safe.")
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="COLUMN=VALUE[,VALUE]",
        help="Only rows with one of these values in a column, such as split_hint=train; repeatable.",
    ),
]
ByOption = Annotated[
    str | None,
    typer.Option("--by", metavar="COLUMN", help="Figures for each value of a column too, such as source."),
]


def label_columns(
    *,
    prompt: str | None,
    reply: str | None,
    label: str | None,
    harmful_value: str | None,
    where: Sequence[str] | None,
    by: str | None,
    every: str | None = None,
) -> LabelColumns:
    """What the options say of the columns.

    Raises:
        RecipeError: A ``--where`` without a column or a sign, or ``--every`` that is neither harmful nor safe.
    """
    from sku.evaluate.judges.calibrate import LABEL_WORDS, LabelColumns

    wanted: dict[str, tuple[str, ...]] = {}
    for condition in where or []:
        column, equals, values = condition.partition("=")
        if not column or not equals:
            raise RecipeError(f"--where {condition} must look like COLUMN=VALUE, such as split_hint=train")
        wanted[column] = (*wanted.get(column, ()), *values.split(","))
    if every is not None and every not in LABEL_WORDS:
        raise RecipeError(f"--every is {every}; it must be harmful or safe")
    return LabelColumns(
        prompt=prompt,
        reply=reply,
        label=label,
        harmful_value=harmful_value,
        every=None if every is None else LABEL_WORDS[every],
        group=by,
        where=wanted,
    )


def figures_table(title: str, figures: Sequence[GroupFigures]) -> Table:
    """Sensitivity, specificity and AUC of a judge, a line a group."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="fold", min_width=8)
    for name in ("harmful", "safe", "sensitivity, %", "specificity, %", "AUC"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in figures:
        area = "\u2013" if found.auc is None else f"{found.auc:.2f} ({found.auc_low:.2f} to {found.auc_high:.2f})"
        shares = (_share(found.sensitivity), _share(found.specificity))
        table.add_row(found.group, str(found.harmful), str(found.safe), *shares, area)
    return table


def _share(found: Rate | None) -> str:
    """In per cent; so short that a line of 80 columns leaves room for the name of the group."""
    if found is None:
        return "\u2013"
    return f"{100 * found.value:.1f} ({100 * found.low:.0f} to {100 * found.high:.0f})"
