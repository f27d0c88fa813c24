"""lm-evaluation-harness on the embedded world's model, with a task file of invented text. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sku.config import EvaluateConfig
from sku.data.tokens import resolve_prompt_format
from sku.errors import EvaluationError
from sku.evaluate import utility
from sku.evaluate.results import HarnessScores, read_result
from sku.evaluate.run import evaluate
from sku.evaluate.utility import HARNESS_FILE, run_tasks

from .conftest import World

# Not imported here: that would cost each worker seconds while tests are collected.
pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = """\
task: world_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: answers
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""
GROUP = """\
group: world_group
task: [world_choice]
aggregate_metric_list: [{metric: acc}]
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def tasks(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six questions of the world, each with its answer and that of another, the right one first or second in turn."""
    folder = tmp_path_factory.mktemp("tasks")
    prompt_format = resolve_prompt_format("auto", world.tokenizer)
    examples = list({example.answer: example for example in world.data.retain_test}.values())[:6]
    rows = []
    for number, example in enumerate(examples):
        other = next(entry.answer for entry in examples if entry.answer != example.answer)
        answers = [example.answer, other] if number % 2 == 0 else [other, example.answer]
        rows.append(
            {"question": prompt_format.render(example.prompt).prompt_text, "answers": answers, "right": number % 2}
        )
    data = folder / "world.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "world.yaml").write_text(TASK.format(data=data))
    (folder / "group.yaml").write_text(GROUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


def asked(*tasks: str, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(lm_eval=tasks, batch_size=4, **settings)


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002 - the harness seeds the global one
    return list(state[1])


@pytest.mark.integration
def test_a_task_file_of_ones_own_is_run(world: World, tasks: Path) -> None:
    model, tokenizer, _ = world
    before = random.getstate(), torch.random.get_rng_state().tolist(), numpy_state(), tokenizer.padding_side
    found = run_tasks(model, tokenizer, asked(f"{tasks}/world_group"))
    assert (found.harness, found.asked, found.limit) == (metadata.version("lm-eval"), (f"{tasks}/world_group",), None)
    one = found.tasks["world_choice"]
    assert (one.version, one.shots, one.samples) == ("3.0", 0, 6)
    # The world's own model knows its answers.
    assert one.metrics == {"acc": 1.0, "acc_stderr": 0.0}
    assert found.hits["world_choice"]["acc"] == "111111"
    assert found.tasks["world_group"].version == "1.0"
    assert found.tasks["world_group"].metrics["acc"] == 1.0
    assert (random.getstate(), torch.random.get_rng_state().tolist(), numpy_state(), tokenizer.padding_side) == before


@pytest.mark.integration
def test_an_evaluation_runs_tasks_once(
    world: World, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(
        prompts=1, retain_prompts=1, prefill_tokens=(), max_new_tokens=4, lm_eval=(f"{tasks}/world_choice",),
        lm_eval_limit=4,
    )  # fmt: skip

    def again(**changes: Any) -> HarnessScores | None:
        settings = dataclasses.replace(config, **changes)
        result = evaluate(*world, base_model=world.model, config=settings, output_dir=tmp_path)
        assert read_result(tmp_path) == result
        return result.lm_eval

    scores = again()
    assert scores is not None
    assert scores.tasks["world_choice"].samples == 4
    assert (tmp_path / HARNESS_FILE).is_file()
    assert again(lm_eval=()) is None
    with monkeypatch.context() as patch:
        patch.setattr(utility, "run_tasks", lambda *_: pytest.fail("asked twice"))
        assert again() == scores
    assert again(lm_eval_limit=2) != scores


@pytest.mark.parametrize(
    ("task", "offending"),
    [("{}/lost/lost", "lost.jsonl"), ("{}/nowhere/world_choice", "nowhere"), ("missing", "lm-eval")],
)
def test_what_cannot_be_run_is_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, offending: str
) -> None:
    (tmp_path / "lost").mkdir()
    lost = TASK.format(data=tmp_path / "lost.jsonl").replace("world_choice", "lost")
    (tmp_path / "lost" / "lost.yaml").write_text(lost)
    if task == "missing":
        monkeypatch.setattr(utility, "PACKAGE", "lm-eval-that-is-not-installed")
    with pytest.raises(EvaluationError, match=offending) as caught:
        run_tasks(world.model, world.tokenizer, asked(task.format(tmp_path)))
    assert "\n" not in str(caught.value)
