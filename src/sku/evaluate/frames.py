"""Results as tables: printed as text in a terminal, shown as HTML in a notebook, given as a pandas ``DataFrame``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

Line = dict[str, Any]
"""Column -> cell."""
_MAIN = ("harmful", "refusal", "safe_answer", "evasive", "gibberish", "unjudged", "over_refusal", "exact_answer")


def is_shown(kind: str, rate: str) -> bool:
    """Whether a table has a line for a rate of free replies, of those after a prefill, or of sampled ones."""
    return rate in _MAIN if kind == "reply" else rate == "harmful"


class Tabular:
    """What can be read as a table: ``print`` it, let a notebook show it, or take ``to_pandas``."""

    def lines(self) -> Iterator[Line]:
        """One an entry of the table, all with the same columns."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """The table, with a row a line: shares from 0 to 1, perplexities, KL in nats a token."""
        import pandas

        return pandas.DataFrame(list(self.lines()))

    def __str__(self) -> str:
        return str(self.to_pandas().to_string(index=False, float_format=_number, na_rep=""))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(self.to_pandas().to_html(index=False, float_format=_number, na_rep="", border=0))


def _number(value: float) -> str:
    return f"{value:.3g}"
