"""The notebooks run from top to bottom, and hold what the last run of them printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import sku

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL: dict[str, dict[str, Any]] = {
    "embedded_world": {"steps": 2, "prompts": 2, "alphas": [1.0]},
    "your_own_model": {"pretraining_steps": 2, "steps": 2, "prompts": 2},
    "compare_methods": {"steps": 2, "prompts": 2},
}
"""Settings of the cell with the tag ``parameters`` that make a run short."""


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def cells_with_tag(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_the_outputs_of_one_run_and_nothing_of_a_machine(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "run scripts/run_notebooks.py"
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 3
    said = "".join(str(output) for cell in code for output in cell.outputs)
    assert [text for text in ("stderr", "Traceback", "/work/", "/home/", "/root/") if text in said] == []
    assert len(cells_with_tag(notebook, "install")) == len(cells_with_tag(notebook, "parameters")) == 1
    assert name in SMALL


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(name)
    (parameters,) = cells_with_tag(notebook, "parameters")
    set_there: dict[str, Any] = {}
    exec(parameters.source, set_there)  # A cell of our own with numbers.
    assert set(SMALL[name]) == set(set_there) - {"__builtins__"}
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())

    paths = [str(Path(sku.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # The models are tiny: threads would wait for each other.
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # Raises at the first cell that fails.
    printed = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("text")]
    assert printed
    assert list(tmp_path.iterdir()) == []
