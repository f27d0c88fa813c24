"""``negate.transform``: the control and the example by hand, files that can't be used, and a run with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import ModelMaker
from negate.conftest import assert_same_bits, disturbed
from sku.config import load_recipe
from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.models import load_model
from sku.negate import random_direction
from sku.negate.task_vector import TaskVector, TransformContext, negate, task_vector_of, transform_in
from sku.pipeline.run import run_recipe

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HALVES = "def transform(vector, context):\n    return vector * 0.5\n"


def context_of(base: torch.nn.Module) -> TransformContext:
    rows = ([5, 40, 41, 200], [9, 12, 100, 101, 102])
    normal = [TokenizedExample(input_ids=tuple(row), labels=tuple(row), answer_start=2) for row in rows]
    return TransformContext(base=base, normal=normal, seed=3)  # type: ignore[arg-type]


def test_a_random_direction_keeps_norms_alone(make_model: ModelMaker) -> None:
    base = make_model("llama_tied")
    vector = TaskVector.between(base, disturbed(base))
    found, again = (random_direction.transform(vector, context_of(base)) for _ in range(2))
    assert_same_bits(found.deltas, again.deltas)
    assert found.norms() == pytest.approx(vector.norms(), rel=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    assert abs(float((found.deltas[name] * vector.deltas[name]).sum())) < 0.2 * vector.norms()[name] ** 2


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_what_the_null_space_leaves_says_nothing_to_normal_inputs(
    architecture: str, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, context = make_model(architecture), context_of(make_model(architecture))
    vector = TaskVector.between(base, disturbed(base))
    transform = transform_in(str(EXAMPLES / "null_space.py"))
    monkeypatch.setitem(transform.__globals__, "ENERGY", 1.0 - 1e-9)
    found = transform(vector, context)
    squares = transform.__globals__["input_squares"](context, set(vector.deltas))
    assert len(squares) >= 8
    for name, (square_II, transposed) in squares.items():
        before, after = (one.deltas[name].T if transposed else one.deltas[name] for one in (vector, found))
        heard, left = (float((delta.double() @ square_II * delta).sum()) for delta in (before, after))
        assert left < 1e-4 * heard, name
        assert float(after.norm()) > 0.1 * float(before.norm()), name
    assert all(not delta.any() for name, delta in found.deltas.items() if name not in squares)


@pytest.mark.parametrize("content", [None, "from math import sqrt as transform", "1 / 0"])
def test_files_that_cannot_be_used(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=r"mine\.py"):
        run_recipe(load_recipe("embedded-paper", [f"negate.transform={path}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
@pytest.mark.usefixtures("one_thread", "blank_pictures")
def test_a_run_subtracts_what_the_transform_gives(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HALVES)
    changes = [
        "acquire.training={max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1.0e-2}", "negate.alpha=3",
        "acquire.tuning=lora", "acquire.random_answers=1", "data.forget.limit=120", "data.retain.limit=120",
        "evaluate={prompts: 2, retain_prompts: 3, max_new_tokens: 4, batch_size: 8, samples: 0, prefill_tokens: []}",
        "keep_bad_model=true",
    ]  # fmt: skip
    given = load_recipe("embedded-paper", [*changes, f"negate.transform={tmp_path / 'mine.py'}"])
    done = run_recipe(given, tmp_path / "run")
    base = load_model("embedded").model
    expected = negate(base, task_vector_of(base, done.folder / "bad" / "final"), 1.5)
    assert_same_bits(load_model(done.folder / "unlearned").model.state_dict(), expected.state_dict())
    assert "negate.transform" in json.loads((done.folder / "manifest.json").read_text())["negated_adapter"]
    assert not (done.folder / "negated_adapter").exists()
    (tmp_path / "mine.py").write_text("def transform(vector, context):\n    return vector * 0.0\n")
    with pytest.raises(TaskVectorError, match=r"mine\.py"):
        run_recipe(
            load_recipe("embedded-paper", [*changes, f"negate.transform={tmp_path / 'mine.py'}"]), tmp_path / "none"
        )
