"""Two processes train as one does, sharded or not; a lost one ends the run, and a resumed run equals a whole one."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from conftest import MadeOnce, ModelMaker
from distributed.worker import Case, finish, make_trainer
from sku.config import load_recipe
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError, OutputError, RecipeError
from sku.pipeline.run import run_recipe
from sku.processes import Processes, current_processes

WORKER = Path(__file__).with_name("worker.py")
CASES: dict[str, Case] = {
    "ddp_accumulated": {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    # Epochs of 6 examples: 4 and 2, so that the second process has none left in every other step.
    "fsdp_lora": {"max_steps": 3, "fsdp": True},
    "ddp_kept": {"max_steps": 4, "dropout": 0.1, "save_strategy": "steps", "save_steps": 2},
    "fsdp_kept": {
        "max_steps": 4, "full": True, "fsdp": True, "save_strategy": "steps", "save_steps": 2,
        "lr_scheduler_type": "linear", "learning_rate": 1e-3,
    },
}  # fmt: skip
RECIPE = [
    "acquire.training.max_steps=4", "acquire.training.save_steps=2", "acquire.training.logging_steps=1",
    "evaluate.prompts=4", "evaluate.retain_prompts=4", "evaluate.max_new_tokens=8", "evaluate.attacks=[]",
    "evaluate.samples=2", "acquire.tuning=lora", "negate.alpha=1.0",
]  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port")
ACCELERATE = (
    "accelerate.commands.launch", "--config_file", str(WORKER.parents[2] / "src/sku/recipes/accelerate/ddp.yaml"),
    "--main_process_port",
)  # fmt: skip


def launch(launcher: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", *launcher, str(port), *arguments]
    path = os.pathsep.join([str(WORKER.parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.fixture
def jobs(
    made_once: MadeOnce, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, data: ForgetRetainData
) -> Path:
    """The folder in which two processes have done all."""

    def make(folder: Path) -> None:
        make_model().save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "data.pickle").write_bytes(pickle.dumps(data))
        (folder / "jobs.json").write_text(
            json.dumps({"cases": CASES, "recipe": RECIPE, "command": sku_run(folder / "killed")})
        )
        done = launch(TORCHRUN, str(WORKER), str(folder))
        assert all((folder / f"done_{rank}").exists() for rank in range(2)), done.stderr[-4000:]
        (folder / "stderr").write_text(done.stderr)

    return made_once("two_processes", make)[0]


def curve(folder: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = json.loads((folder / "log.json").read_text())
    return lines


@pytest.mark.integration
@pytest.mark.parametrize("name", ["ddp_accumulated", "fsdp_lora", "fsdp_kept"])
def test_the_loss_curve_is_that_of_one_process(name: str, jobs: Path, tmp_path: Path) -> None:
    case = {key: value for key, value in CASES[name].items() if key not in ("fsdp", "save_strategy", "save_steps")}
    if "gradient_accumulation_steps" in case:  # 2 processes of 1 example twice are one process of 4 at once.
        case = {"max_steps": case["max_steps"]}
    alone = finish(make_trainer(jobs, tmp_path / "checkpoints", case), tmp_path)
    here, there = curve(tmp_path), curve(jobs / name)
    assert len(here) == CASES[name]["max_steps"]
    for one, two in zip(here, there, strict=True):
        assert one.keys() == two.keys()
        for term in [key for key in one if key.startswith("loss")]:
            assert one[term] == pytest.approx(two[term], rel=1e-5, abs=1e-5), (term, one["step"])
    weights = load_file(next((jobs / name).glob("*.safetensors")))
    assert weights.keys() == alone.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, alone[key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["ddp_kept", "fsdp_kept"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(name: str, jobs: Path) -> None:
    assert curve(jobs / name) == curve(jobs / f"{name}_resumed")
    whole, resumed = (load_file(next((jobs / folder).glob("*.safetensors"))) for folder in (name, f"{name}_resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def sku_run(out: Path) -> list[str]:
    return ["run", "embedded-paper", "--out", str(out), *(f"--set={setting}" for setting in RECIPE)]


@pytest.mark.integration
def test_a_killed_process_ends_the_run_with_one_line_and_another_number_does_not_go_on(jobs: Path) -> None:
    """And within the time that ``launch`` gives all jobs."""
    stderr, out = (jobs / "stderr").read_text(), jobs / "killed"
    (said,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "one of the 2 processes" in said
    assert "--resume" in said
    assert "sku/training" not in stderr, "no traceback of ours"
    with pytest.raises(OutputError, match="2 processes.* not 1"):
        run_recipe(load_recipe("embedded-paper", RECIPE), out, resume=True)
    assert [path.name for path in (out / "bad").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.integration
def test_a_killed_run_that_is_resumed_equals_a_whole_one(jobs: Path) -> None:
    """Also by another launcher, with the configuration that ships."""
    out = jobs / "killed"
    done = launch(ACCELERATE, "-m", "sku", *sku_run(out), "--resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("verdict  ") == 1, "said once"
    whole = jobs / "whole"
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for part in ("unlearned/model.safetensors", "negated_adapter/adapter_model.safetensors"):
        assert (out / part).read_bytes() == (whole / part).read_bytes(), part
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, whole)]
    assert results[0].pop("manifest")["processes"] == results[1].pop("manifest")["processes"] == 2
    assert results[0] == results[1]


def test_attacks_and_empty_weights_of_other_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sku.pipeline.run.current_processes", lambda: Processes(rank=0, count=2))
    with pytest.raises(EvaluationError, match=r"evaluate\.attacks"):
        run_recipe(load_recipe("embedded-paper", [*RECIPE, "evaluate.attacks=[relearn]"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(RecipeError, match="fsdp_cpu_ram_efficient_loading"):
        current_processes()
