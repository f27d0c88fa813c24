"""A comparison small enough for a test: the embedded world, two steps, a handful of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sku.config import Recipe, load_recipe

SMALL = (
    "data.forget.limit=80",
    "data.retain.limit=120",
    "acquire.training={max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-4}",
    "acquire.random_answers=1",
    "evaluate={prompts: 3, retain_prompts: 6, max_new_tokens: 8, batch_size: 8}",
    "compare={seeds: 1, strengths: [0.5], utility_budget: 1.05, max_strength: 2.0}",
    "methods={}",
)

FAILING_METHOD = '''"""A method whose loss is NaN."""
from dataclasses import dataclass
from sku.data.examples import RowPlan, RowType
from sku.methods.base import Method
from sku.training.objective import Objective

@dataclass(frozen=True, kw_only=True)
class Settings:
    """None."""

def objective(settings, model):
    def losses(step):
        return {"broken": step.rows(RowType.FORGET).mean_nll() * float("nan")}
    return Objective(rows=RowPlan(forget=True), weights={"broken": 1.0}, losses=losses)

BROKEN = Method(name="broken", title="Broken", paper_url="", settings=Settings, objective=objective)
'''


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    return load_recipe("embedded", SMALL)


@pytest.fixture
def broken_method(tmp_path: Path) -> str:
    path = tmp_path / "broken.py"
    path.write_text(FAILING_METHOD, encoding="utf-8")
    return str(path)
