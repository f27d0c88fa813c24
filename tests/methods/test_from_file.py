"""A method from a user's own file, and the file that docs/adding_a_method.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker
from sku.comparison import comparison_rows
from sku.config import load_recipe
from sku.data.examples import ForgetRetainData
from sku.errors import RecipeError
from sku.methods import method_named
from sku.methods.run import resolve_method
from sku.training.config import UnlearningConfig
from sku.training.trainer import UnlearningTrainer

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


def shown_file() -> tuple[str, str]:
    """Name and text of the file that the page tells a reader to save."""
    found = re.search(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1), found.group(2)


@pytest.fixture
def wga_file(tmp_path: Path) -> Path:
    name, text = shown_file()
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_of_the_page_trains(
    wga_file: Path,
    make_model: ModelMaker,
    tokenizer: PreTrainedTokenizerFast,
    data: ForgetRetainData,
    tmp_path: Path,
) -> None:
    method = method_named(str(wga_file))
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = UnlearningTrainer(
        model,
        UnlearningConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            use_cpu=True,
            dataloader_pin_memory=False,
            learning_rate=1e-3,
        ),
        data,
        objective=method.objective(method.settings(beta=0.5), model),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss/ascent" in entry]
    assert len(logged) == 2
    assert all(entry["loss/ascent"] < 0 < entry["loss/retain"] for entry in logged)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_comparison_takes_the_file_by_its_path(wga_file: Path) -> None:
    """Settings go by the method's own name, and the other rows are not disturbed by them."""
    recipe = load_recipe("embedded-paper", ["methods.wga.settings.beta=0.5"])
    rows = comparison_rows(recipe, ["npo", str(wga_file)])
    runs = {row.name: resolve_method(row.recipe_of(0), Path("work")) for row in rows if not row.control}
    assert all(row.recipe_of(0).chooses_alpha for row in rows)
    assert runs["wga"].settings.beta == 0.5
    assert runs["npo"].method.name == "npo"
    assert method_named(str(wga_file)) is runs["wga"].method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all\n", "fails: ModuleNotFoundError"),
        ("x = (\n", "fails: SyntaxError"),
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
