"""A method from a user's own file, and the file that docs/adding_a_method.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from conftest import weights_of
from methods.conftest import MethodTrainerMaker
from sku.comparison import comparison_rows
from sku.config import load_recipe
from sku.errors import RecipeError
from sku.methods import method_named
from sku.methods.run import resolve_method

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
MINIMAL = (
    "from dataclasses import dataclass\n"
    "from sku.data.joint import RowPlan\n"
    "from sku.methods.base import Method\n"
    "from sku.training.objective import Objective\n"
    "@dataclass(frozen=True, kw_only=True)\nclass Settings:\n    beta: float = 1.0\n"
    "def objective(settings, model):\n"
    "    return Objective(rows=RowPlan(forget=True), weights={}, losses=lambda step: {})\n"
)


@pytest.fixture
def wga_file(tmp_path: Path) -> Path:
    """The file that the page tells a reader to save."""
    found = re.search(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    path = tmp_path / found.group(1)
    path.write_text(found.group(2), encoding="utf-8")
    return path


def test_the_file_of_the_page_trains(wga_file: Path, make_method_trainer: MethodTrainerMaker) -> None:
    method = method_named(str(wga_file))
    trainer = make_method_trainer(method, full=True, settings=method.settings(beta=0.5))
    before = weights_of(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss/ascent" in entry]
    assert len(logged) == 2
    assert all(entry["loss/ascent"] < 0 < entry["loss/retain"] for entry in logged)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_a_comparison_takes_the_file_by_its_path(wga_file: Path) -> None:
    """Settings go by the method's own name, and the other rows are not disturbed by them."""
    recipe = load_recipe("embedded-paper", ["methods.wga.settings.beta=0.5"])
    rows = comparison_rows(recipe, ["npo", str(wga_file)])
    runs = {row.name: resolve_method(row.recipe_of(0)) for row in rows if not row.control}
    assert all(row.recipe_of(0).chooses_alpha for row in rows)
    assert runs["wga"].settings.beta == 0.5
    assert runs["npo"].method.name == "npo"
    assert method_named(str(wga_file)) is runs["wga"].method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all\n", "fails: ModuleNotFoundError"),
        ("from sku.methods.npo import NPO\n", "defines 0 methods of its own"),
        (
            MINIMAL + "A = Method(name='a', title='A', paper_url='', settings=Settings, objective=objective)\n"
            "B = Method(name='b', title='B', paper_url='', settings=Settings, objective=objective)\n",
            "defines 2 methods of its own",
        ),
    ],
)
def test_files_that_are_no_method(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        method_named(str(path))
