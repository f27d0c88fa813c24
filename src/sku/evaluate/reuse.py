"""Rows of an earlier run are read where they were made from the same things; else they are made and written.

Rows on their way to a finished file are appended to a partial one as they come, so that a killed run loses one batch
and no more. It lies beside the finished one as ``.NAME.partial``, with mode 0600 and the same header, and goes when
the finished one stands. Its last line may be torn; what stands after the first broken line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from sku.errors import EvaluationError
from sku.evaluate.batching import Processes
from sku.evaluate.record_files import (
    SCHEMA_VERSION,
    Row,
    header_hash,
    json_lines,
    read_if_same,
    row_from_dict,
    write_rows,
)
from sku.storage import named_disk_errors, write_private_text


class PartialFile(Generic[Row]):
    """The partial file of one finished file."""

    def __init__(self, path: Path, header: Mapping[str, Any], row_type: type[Row]) -> None:
        """Touches nothing yet.

        Args:
            path: The finished file.
            header: What its rows are made from: rows under another header are of no use.
            row_type: Dataclass of the rows.
        """
        self.path = path.with_name(f".{path.name}.partial")
        self._header = {"schema_version": SCHEMA_VERSION, **header}
        self._row_type = row_type

    def recover(self) -> list[Row]:
        """The rows of an interrupted run; the file is cut to them, or begun anew where it is of something else.

        Raises:
            OutputError: It can't be written.
        """
        rows = self._whole_rows()
        write_private_text(self.path, json_lines([self._header, *rows]))
        return list({row.id: row for row in rows}.values())

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows and waits until the disk has them.

        Raises:
            OutputError: The disk is full, or the file is gone.
        """
        with (
            named_disk_errors(self.path),
            self.path.open("a", encoding="utf-8", errors="surrogatepass", newline="\n") as file,
        ):
            file.write(json_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Removes it: the finished file has all its rows."""
        self.path.unlink(missing_ok=True)

    def _whole_rows(self) -> list[Row]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")[:-1]
            if not lines or header_hash(json.loads(lines[0])) != header_hash(self._header):
                return []
        except (OSError, ValueError):
            return []
        rows: list[Row] = []
        for line in lines[1:]:
            try:
                rows.append(row_from_dict(self._row_type, json.loads(line), str(self.path)))
            except (ValueError, AttributeError, EvaluationError):
                break
        return rows


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
        folder = self.folder
        if folder is None:
            return make()
        rows = self.processes.on_main(lambda: read_if_same(folder / file, header, row_type))
        if rows is None:
            rows = make()
            self.write(file, header, rows)
        self.close(file, header, row_type)
        return rows

    def write(self, file: str, header: Mapping[str, Any], rows: Sequence[Any]) -> None:
        """Writes a finished file."""
        folder = self.folder
        if folder is not None:
            self.processes.on_main(lambda: write_rows(folder / file, header, rows))

    def saved(self, file: str, header: Mapping[str, Any], row_type: type[Row]) -> dict[str, Any]:
        """Options of ``generate_replies``: the rows of an interrupted run, and what keeps those of each batch."""
        if self.folder is None:
            return {}
        partial = PartialFile(self.folder / file, header, row_type)
        return {"finished": self.processes.on_main(partial.recover), "keep": partial.append}

    def close(self, file: str, header: Mapping[str, Any], row_type: type[Row]) -> None:
        """Removes the partial file."""
        if self.folder is not None and self.processes.is_main:
            PartialFile(self.folder / file, header, row_type).remove()

    def rows_of_main(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """As ``rows``, for work that is not shared: only the main process does it, the others wait."""
        return self.rows(file, header, row_type, lambda: self.processes.on_main(make))
