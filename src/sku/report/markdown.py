"""Text of users, data and models inside Markdown: one line, and nothing in it is markup."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from sku.errors import EvaluationError

LONGEST = 400
"""Characters of one value that a card shows."""
_MARKUP = re.compile(r"([\\`*_\[\]|~$#])")


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
