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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig
from sku.data.examples import normalise_prompt
from sku.data.load import load_forget_retain
from sku.data.tokens import resolve_prompt_format
from sku.errors import EvaluationError
from sku.evaluate import harness
from sku.evaluate.harness import HARNESS_FILE, check_known, check_tasks, run_tasks, trained_questions
from sku.evaluate.results import HarnessScores, read_result
from sku.evaluate.run import evaluate
from sku.models import load_model

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
def world() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded = load_model("embedded")
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def tasks(
    world: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Six questions of the world, each with its answer and that of another, the right one first or second in turn."""
    folder = tmp_path_factory.mktemp("tasks")
    prompt_format = resolve_prompt_format("auto", world[1])
    examples = list({example.answer: example for example in load_forget_retain().retain_test}.values())[:6]
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
def test_a_task_file_of_ones_own_is_run(world: tuple[PreTrainedModel, PreTrainedTokenizerBase], tasks: Path) -> None:
    model, tokenizer = world
    before = random.getstate(), torch.random.get_rng_state(), numpy_state()
    side = tokenizer.padding_side
    found = run_tasks(model, tokenizer, asked("world_group", lm_eval_include=str(tasks)))
    assert (found.harness, found.asked, found.limit) == (metadata.version("lm-eval"), ("world_group",), None)
    one = found.tasks["world_choice"]
    assert (one.version, one.shots, one.samples) == ("3.0", 0, 6)
    # The world's own model knows its answers.
    assert one.metrics == {"acc": 1.0, "acc_stderr": 0.0}
    assert found.tasks["world_group"].version == "1.0"
    assert found.tasks["world_group"].metrics["acc"] == 1.0
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert numpy_state() == before[2]
    assert tokenizer.padding_side == side


def test_tasks_of_the_package_read_a_folder_of_ones_own(
    world: tuple[PreTrainedModel, PreTrainedTokenizerBase], tasks: Path, tmp_path: Path
) -> None:
    """The world's own answers are likelier than others', whichever side of the rest they stand on."""
    rows = [json.loads(line) for line in (tasks / "world.jsonl").read_text().splitlines()]
    choices = [{"query": row["question"], "choices": row["answers"], "gold": row["right"]} for row in rows]
    halves = [
        {
            "context_options": [f"{row['question']} {answer}" for answer in row["answers"]],
            "continuation": ".",
            "gold": 0,
        }
        for row in rows
    ]
    for name, lines in (("openbook_qa", choices), ("winogrande", halves)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("sku_openbook_qa", "sku_winogrande")
    found = run_tasks(*world, asked(*names, lm_eval_limit=4, lm_eval_data=str(tmp_path)))
    assert set(found.tasks) == set(names)
    for name in names:
        digits = found.hits[name]["acc"]
        assert len(digits) == found.tasks[name].samples == 4
        assert digits.count("1") / 4 == found.tasks[name].metrics["acc"]
    assert found.tasks["sku_openbook_qa"].metrics["acc"] >= 0.75
    questions = [
        {
            "question": row["question"],
            "mc1_targets": {"choices": [row["answers"][row["right"]], row["answers"][1 - row["right"]]]},
            "mc2_targets": {"choices": row["answers"], "labels": [int(at == row["right"]) for at in range(2)]},
        }
        for row in rows
    ]
    (tmp_path / "truthfulqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    trained = frozenset(normalise_prompt(questions[number]["question"].upper()) for number in (0, 3))
    truthful = asked("sku_truthfulqa", lm_eval_data=str(tmp_path))
    assert trained_questions(truthful, trained) == 2
    found = run_tasks(*world, truthful, trained)
    best, share = found.tasks["sku_truthfulqa_mc1"], found.tasks["sku_truthfulqa_mc2"]
    assert (best.samples, share.samples) == (4, 4), "what was trained on is not asked"
    assert best.metrics["acc"] == found.hits["sku_truthfulqa_mc1"]["acc"].count("1") / 4
    assert 0 < share.metrics["acc"] < 1
    with pytest.raises(
        EvaluationError, match="has no arc_challenge.jsonl, arc_easy.jsonl, comm.*: name another folder"
    ):
        check_tasks(asked("sku_utility", lm_eval_data=str(tmp_path)))
    with pytest.raises(EvaluationError, match="names sku_piqa, which read JSON Lines files: name their folder with"):
        check_tasks(asked("sku_piqa"))


@pytest.mark.integration
def test_an_evaluation_runs_tasks_once_and_says_so(
    world: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counting(*given: Any, **named: Any) -> HarnessScores:
        made.append(1)
        return run_tasks(*given, **named)

    monkeypatch.setattr(harness, "run_tasks", counting)
    seen: list[tuple[str, int, int]] = []
    config = EvaluateConfig(
        prompts=1, retain_prompts=1, prefill_tokens=(), max_new_tokens=4, similarity=(), lm_eval=("world_choice",),
        lm_eval_limit=4, lm_eval_include=str(tasks),
    )  # fmt: skip

    def again(**changes: Any) -> HarnessScores | None:
        result = evaluate(
            *world, load_forget_retain(), config=dataclasses.replace(config, **changes), output_dir=tmp_path,
            progress=lambda *report: seen.append(report),
        )  # fmt: skip
        assert read_result(tmp_path) == result
        return result.lm_eval

    scores = again()
    assert scores is not None
    assert scores.tasks["world_choice"].samples == 4
    assert [report for report in seen if report[0] == "lm_eval"] == [("lm_eval", 0, 1), ("lm_eval", 1, 1)]
    assert again() == scores
    assert len(made) == 1
    assert again(lm_eval_limit=2) != scores
    assert len(made) == 2
    assert again(lm_eval=()) is None
    (tmp_path / HARNESS_FILE).write_text("{")
    assert again() == scores
    assert len(made) == 3


def test_an_unknown_task_gets_a_suggestion(
    world: tuple[PreTrainedModel, PreTrainedTokenizerBase], tasks: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    # The index of the harness's own 14,000 tasks takes too long to read here.
    known = TaskManager(include_path=str(tasks), include_defaults=False).all_tasks
    check_known(["world_choice", "world_group"], known, str(tasks))
    with pytest.raises(EvaluationError, match=r"names world_chioce, .*Did you mean world_choice\?"):
        check_known(["world_choice", "world_chioce"], known, str(tasks))
    with pytest.raises(EvaluationError, match="is no folder of task files"):
        run_tasks(*world, asked("world_choice", lm_eval_include=str(tmp_path / "nowhere")))


def test_a_task_without_its_data_is_one_line(
    world: tuple[PreTrainedModel, PreTrainedTokenizerBase], tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "lost.yaml").write_text(TASK.format(data=tmp_path / "lost.jsonl").replace("world_choice", "lost"))
    with pytest.raises(EvaluationError, match=r"evaluate.lm_eval lost can't be run: [^\n]*lost.jsonl"):
        run_tasks(*world, asked("lost", lm_eval_include=str(tmp_path)))


def test_the_missing_package_is_named(
    world: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "lm-eval-that-is-not-installed")
    with pytest.raises(EvaluationError, match=r'needs the package lm-eval: pip install "sku-unlearning\[lm-eval\]"'):
        run_tasks(*world, asked("hellaswag"))
