"""Runs the notebooks of docs/notebooks as they are written, and stores what they print and draw.

    python scripts/run_notebooks.py [NAME ...]

What a machine says of itself, such as progress bars and warnings on standard error, is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def run(path: Path) -> None:
    """Runs one notebook in an empty folder."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as work:
        client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": work}})
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr" and not _is_progress(output)
            ]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]


def _is_progress(output: nbformat.NotebookNode) -> bool:
    shown = output.get("data", {})
    return "ProgressBar" in str(shown.get("text/html", "")) or "<progress" in str(shown.get("text/html", ""))


def main() -> None:
    """Runs those that are named, else all."""
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        run(FOLDER / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    main()
