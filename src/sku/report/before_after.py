"""The before/after picture of a run: what harmful prompts are answered with, and what it cost elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sku.evaluate.comparison import Comparison
from sku.report.figures import STYLE, check_suffix, light, save_figure
from sku.report.html.drawing import bare
from sku.report.html.result_charts import (
    draw_normal,
    draw_outcomes,
    draw_perplexities,
    normal_changes,
    outcome_groups,
    outcome_legend,
)


def before_after_figure(comparison: Comparison, path: Path) -> Path:
    """Draws base against unlearned model.

    Left, the outcome shares of replies to harmful prompts, freely answered and after the worst prefill. Right, normal
    prompts (shares with Wilson 95 % intervals) and the perplexity ratio of fixed answers (bootstrap 95 % intervals).

    Args:
        comparison: From ``sku.evaluate.comparison.compare``.
        path: ``.png``, ``.svg`` or ``.pdf``; what is there is replaced.

    Returns:
        ``path``.

    Raises:
        OutputError: Another suffix, or a folder that can't be written.
    """
    check_suffix(path)
    groups, normal = outcome_groups(comparison), normal_changes(comparison)
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
        figure = Figure(figsize=(10.5, 1.9 + 0.78 * max(len(groups), 3)), layout=spacing)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(1, 0.9))
        outcomes = _panel(figure, grid[:, 0], "Replies to harmful prompts")
        outcome_legend(outcomes, draw_outcomes(outcomes, groups), (0.5, -0.06), 6)
        total = max((change.before.total for _, change in normal), default=0)
        shares = _panel(figure, grid[0, 1], f"Normal prompts (n = {total})")
        draw_normal(shares, normal)
        for row, (_, change) in enumerate(normal):
            shares.text(
                1.05, row, f"{100 * change.before.value:.0f} \u2192 {100 * change.after.value:.0f} %", va="center"
            )
        draw_perplexities(_panel(figure, grid[1, 1], "Perplexity, unlearned / base"), comparison)
        figure.supxlabel(_footer(comparison), fontsize=7.5, color=light("base"), x=0.005, ha="left")
        save_figure(figure, path)
    return path


def _panel(figure: Figure, place: Any, title: str) -> Axes:
    axes = bare(figure.add_subplot(place))
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=7)
    return axes


def _footer(comparison: Comparison) -> str:
    judge = comparison.unlearned.judge
    bound = ", an upper bound of the harmful share" if judge.name == "refusal_rules" else ""
    names = f"{comparison.base.setup.model['name']} / {comparison.unlearned.setup.model['name']}"
    return f"{names}. Judge: {judge.name}{bound}. Ranges: 95 % intervals."
