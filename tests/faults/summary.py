"""A pytest plugin: how many wrong inputs each battery tried, and how many of them left nothing behind but one line.

A test notes its cases with ``record_cases``; the notes travel with its report, so that they come together under
pytest-xdist too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

PROPERTY = "fault cases"
RecordCases = Callable[[str], None]


@pytest.fixture
def record_cases(request: pytest.FixtureRequest) -> RecordCases:
    """Counts one case of the named battery each time it is called; the case before it has then survived."""
    count = 0
    noted: list[tuple[str, object]] = request.node.user_properties

    def record(name: str) -> None:
        nonlocal count
        count += 1
        noted[:] = [(key, value) for key, value in noted if key != PROPERTY]
        noted.append((PROPERTY, (name, count)))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each battery: cases, and survivors."""
    cases, survivors = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties if report.when == "call" else ():
                if name == PROPERTY:
                    battery, count = value
                    cases[battery] += count
                    # A failed test fell at its last case.
                    survivors[battery] += count - (outcome == "failed")
    if cases:
        terminalreporter.section("fault batteries")
        for battery in sorted(cases):
            terminalreporter.line(f"{battery}: {cases[battery]} cases, {survivors[battery]} survivors")
        terminalreporter.line(f"all: {cases.total()} cases, {survivors.total()} survivors")
