"""The report's file, and the folder of its plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sku.errors import EvaluationError, OutputError, one_line
from sku.report.html.page import comparison_page, run_page
from sku.report.html.run_folder import read_run
from sku.storage import write_private_text


def write_report(
    folders: Sequence[Path], out: Path, *, plots: Path | None = None, replies: bool = True
) -> tuple[Path, list[Path]]:
    """Writes the report of one run, or of several side by side.

    Args:
        folders: Of finished runs; one or more.
        out: ``.html``; what is there is replaced. Readable by its owner alone, since replies of a base model are
            harmful text.
        plots: Folder for every picture as ``.png`` and ``.svg``, made where it is missing.
        replies: Whether the replies of the models go into the report of one run.

    Returns:
        ``out``, and the files of the plots.

    Raises:
        EvaluationError: A folder is none of a finished run, or a file in it is broken.
        OutputError: Another suffix, a folder named twice, or something can't be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the report {out} must end in .html")
    try:
        places = [folder.resolve() for folder in folders]
    except (OSError, RuntimeError) as error:  # Links in a circle; a RuntimeError before Python 3.13.
        raise EvaluationError(f"a run folder can't be read: {one_line(error)}") from None
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise OutputError(f"{folder} is named twice: name each run once")
    several = len(folders) > 1
    runs = [read_run(folder, replies=replies and not several) for folder in folders]
    if not out.parent.is_dir():
        raise OutputError(f"{out} can't be written: there is no folder {out.parent}")
    if plots is not None:
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"folder {plots} can't be made: {error.strerror}") from None
    page = comparison_page(runs) if several else run_page(runs[0])
    drawn = [] if plots is None else [path for picture in page.pictures for path in picture.save(plots)]
    write_private_text(out, page.html)
    return out, drawn
