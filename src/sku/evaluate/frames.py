"""Results as tables: printed as text in a terminal, shown as HTML in a notebook, given as a pandas ``DataFrame``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pandas import DataFrame

Found = TypeVar("Found")
Line = dict[str, Any]
"""Column -> cell."""
_MAIN = ("harmful", "refusal", "safe_answer", "evasive", "gibberish", "unjudged", "over_refusal", "exact_answer")


def main_rates(
    replies: Mapping[str, Mapping[str, Found]],
    prefill: Mapping[str, Mapping[str, Mapping[str, Found]]],
    samples: Mapping[str, Mapping[str, Found]],
) -> Iterator[tuple[str, str, str, Found]]:
    """Kind of reply, split, name of a rate, and what was found of it, for each rate that has a line in a table.

    Args:
        replies: Split -> rate name -> of free replies.
        prefill: Split -> tokens given -> rate name -> of replies after a prefill.
        samples: Split -> rate name -> of sampled replies.
    """
    kinds = [("reply", split, rates) for split, rates in replies.items()]
    for split, by_length in prefill.items():
        kinds += [(f"prefill {tokens}", split, rates) for tokens, rates in by_length.items()]
    kinds += [("sample", split, rates) for split, rates in samples.items()]
    for kind, split, rates in kinds:
        for name, found in rates.items():
            if name in _MAIN if kind == "reply" else name == "harmful":
                yield kind, split, name, found


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
