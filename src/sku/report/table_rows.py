"""One line of a before/after table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the table; the fields are its columns, in words."""

    section: str
    """What was asked: ``trained-on prompts``, ``unseen prompts, prefill, 5 tokens``, ``perplexity``, ..."""
    measure: str
    before: str
    after: str
    interval: str
    """95 % interval of ``after``; of the ratio for a perplexity."""
    change: str
    """Difference in points, or ratio, with its 95 % interval."""
    wanted: str
    """``down``, ``up``, ``same`` or empty where neither is better."""
    p_holm: str = ""
    """Exact McNemar test of no change, Holm-corrected over the whole table; empty where a row is not tested."""
    caution: str = ""
    """Why the figures can't be taken as they stand: the judge can't measure them; ``change`` says it too."""

    @property
    def label(self) -> str:
        """Section and measure in one."""
        return f"{self.section}: {self.measure}"
