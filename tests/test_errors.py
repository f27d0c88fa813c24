"""What other packages' errors say, brought into one line."""

from __future__ import annotations

from sku.errors import first_line, one_line


def test_an_error_of_several_lines() -> None:
    error = OSError("\n  no such\n\tfile  \nlook elsewhere\n")
    assert one_line(error) == "no such file look elsewhere"
    assert first_line(error) == "no such"


def test_an_error_that_says_nothing_is_named_by_its_type() -> None:
    for words in ("", " \n\t"):
        assert one_line(ValueError(words)) == first_line(ValueError(words)) == "ValueError"
