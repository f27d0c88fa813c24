"""Rows of an earlier run are read where they were made from the same things; else they are made and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sku.evaluate.partial_files import PartialFile
from sku.evaluate.processes import Processes
from sku.evaluate.record_files import read_if_same, write_rows
from sku.evaluate.records import (
    AgreementRow,
    ExampleLoss,
    FluencyRecord,
    GenerationRecord,
    RelevanceRow,
    SimilarityRow,
    Start,
)

Row = TypeVar("Row", GenerationRecord, FluencyRecord, ExampleLoss, AgreementRow, SimilarityRow, RelevanceRow, Start)


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The files of one evaluation."""

    folder: Path | None
    """Nothing is read or written without one."""
    processes: Processes

    def rows(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """The rows of a file.

        Args:
            file: Its name.
            header: What its rows are made from.
            row_type: Of the rows.
            make: Called in every process where the file does not hold them; gives all rows in each.

        Returns:
            The rows, in every process.

        Raises:
            OutputError: The file can't be written.
        """
        if self.folder is None:
            return make()
        path = self.folder / file
        rows = self.processes.on_main(lambda: read_if_same(path, header, row_type))
        if rows is None:
            rows = made = make()
            self.processes.on_main(lambda: write_rows(path, header, made))
        if self.processes.is_main:
            PartialFile(path, header, row_type).remove()
        return rows

    def rows_of_main(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """As ``rows``, for work that is not shared: only the main process does it, the others wait."""
        return self.rows(file, header, row_type, lambda: self.processes.on_main(make))
