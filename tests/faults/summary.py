"""A pytest plugin: how many cases each battery tried, and how many of them the package survived.

A test notes its cases with ``tally``; the notes travel with its report, so that they come together under pytest-xdist
too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

PROPERTY = "fault case"
Tally = Callable[..., None]
"""Notes a case: its battery, and its kind if there are several. The case before it has then survived."""


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Notes the cases of a test."""

    def note(battery: str, kind: str = "") -> None:
        request.node.user_properties.append((PROPERTY, (battery, kind)))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each battery: cases, and survivors."""
    cases: dict[str, Counter[str]] = {}
    survived: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            noted = [value for name, value in report.user_properties if name == PROPERTY and report.when == "call"]
            for number, (battery, kind) in enumerate(noted, start=1):
                cases.setdefault(battery, Counter())[kind] += 1
                # A failed test fell at its last case.
                survived[battery] += outcome == "passed" or number < len(noted)
    if not cases:
        return
    terminalreporter.section("batteries of faults")
    for battery, kinds in sorted(cases.items()):
        parts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common() if kind)
        line = f"{battery}: {kinds.total()} cases, {survived[battery]} survived"
        terminalreporter.line(f"{line} ({parts})" if parts else line)
    total = sum(kinds.total() for kinds in cases.values())
    terminalreporter.line(f"all: {total} cases, {survived.total()} survived")
