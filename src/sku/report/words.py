"""Figures as text, and text of users, data and models inside Markdown: one line, and nothing in it is markup."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.metrics import Rate
from sku.evaluate.statistics import Estimate

NOTHING = "\u2013"
"""Where nothing was measured."""
LONGEST = 400
"""Characters of one value that a card shows."""
_MARKUP = re.compile(r"([\\`*_\[\]|~$#])")


def percent(share: float) -> str:
    """A share as a percentage with one decimal: ``12.5 %``."""
    return f"{100 * share:.1f} %"


def interval(rate: Rate | Estimate) -> str:
    """Bounds of a share in per cent: ``7.4 to 16.1``."""
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def in_points(difference: float, low: float, high: float) -> str:
    """A difference of shares with its interval, in points: ``-7.4 (-16.1 to -1.2)``."""
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the table; the fields are its columns, in words."""

    section: str
    """What was asked: ``trained-on prompts``, ``unseen prompts, prefill, 5 tokens``, ``perplexity``, ..."""
    measure: str
    before: str
    after: str
    interval: str = ""
    """95 % interval of ``after``; of the ratio for a perplexity."""
    change: str = ""
    """Difference in points, or ratio, with its 95 % interval."""
    wanted: str = ""
    """``down``, ``up``, ``same`` or empty where neither is better."""
    p_holm: str = ""
    """Exact McNemar test of no change, Holm-corrected over the whole table; empty where a row is not tested."""
    caution: str = ""
    """Why the figures can't be taken as they stand: the judge can't measure them; ``change`` says it too."""

    @property
    def label(self) -> str:
        """Section and measure in one."""
        return f"{self.section}: {self.measure}"


class Written(str):
    """Markdown of our own, which is put into a template as it is."""

    __slots__ = ()


def one_line(text: str) -> str:
    """Without line breaks, control and direction characters, and not longer than ``LONGEST``."""
    plain = "".join(" " if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"} else char for char in text)
    line = " ".join(plain.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}\u2026"


def escaped(value: Any) -> str:
    """A value for a place inside a line or a table cell; what is ``Written`` stays."""
    if isinstance(value, Written):
        return value
    # A full stop after www and a colon before // would make a link of it.
    text = html.escape(one_line(str(value)), quote=False).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")
    return _MARKUP.sub(r"\\\1", text).replace("&\\#", "&#")


def fenced(text: str, language: str) -> Written:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Written(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def bars_escaped(text: str) -> str:
    """Text of our own for a table cell."""
    return text.replace("|", r"\|")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    cell: Callable[[str], str] = escaped,
) -> Written:
    """A table that ends with a newline; columns that are not ``left`` hold figures, and ``cell`` escapes."""
    rule = ["---" if place in left else "---:" for place in range(len(columns))]
    lines = [columns, rule, *([cell(text) for text in row] for row in rows)]
    return Written("".join(f"| {' | '.join(line)} |\n" for line in lines))


def replace_block(text: str, name: str, block: str, where: str = "the text") -> str:
    """Puts a block between ``<!-- results:NAME -->`` and ``<!-- end:NAME -->``.

    Args:
        text: Markdown with both marks, once each and in this order.
        name: Of the block.
        block: What shall stand between the marks.
        where: Name of the text, for messages.

    Returns:
        The text with the block in place of what was there.

    Raises:
        EvaluationError: The marks are missing, double or out of order.
    """
    start, end = f"<!-- results:{name} -->", f"<!-- end:{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise EvaluationError(f"{where} must hold the lines {start} and {end}, once each and in this order")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), flags=re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{block.strip()}\n\n{end}", text)
