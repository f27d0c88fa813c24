"""What other packages' errors say, and memory that runs out, brought into one line; and nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Command
from sku.errors import DataError, NoMemoryError, first_line, named_memory_errors, one_line

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nof which ..."
CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
SMALL = (
    "--set", "acquire.training.max_steps=2", "--set", "evaluate.prompts=2", "--set", "evaluate.retain_prompts=2",
    "--set", "evaluate.max_new_tokens=2", "--set", "evaluate.samples=0",
    "--set", "evaluate.attacks=[]", "--set", "negate.alpha=1",
)  # fmt: skip


def test_an_error_of_several_lines() -> None:
    error = OSError("\n  no such\n\tfile  \nlook elsewhere\n")
    assert one_line(error) == "no such file look elsewhere"
    assert first_line(error) == "no such"


def test_an_error_that_says_nothing_is_named_by_its_type() -> None:
    for words in ("", " \n\t"):
        assert one_line(ValueError(words)) == first_line(ValueError(words)) == "ValueError"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(GPU), MemoryError(), RuntimeError(CPU), RuntimeError("MPS backend out of memory")]
)
def test_every_way_of_saying_so_is_one_line(error: Exception) -> None:
    with pytest.raises(NoMemoryError) as caught, named_memory_errors("acquire"):
        raise error
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("memory ran out in acquire (")
    for setting in ("per_device_train_batch_size", "activation_checkpointing=true", "data.max_length", "qlora"):
        assert setting in said
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("load", "model.dtype"),
        ("evaluate_base", "evaluate.batch_size"),
        ("attacks", "evaluate.attacks"),
        (None, "data."),
    ],
)
def test_the_setting_that_helps_is_that_of_the_stage(stage: str | None, setting: str) -> None:
    with pytest.raises(NoMemoryError, match=setting), named_memory_errors(stage):
        raise torch.OutOfMemoryError(GPU)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), DataError("out of memory"), KeyError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, named_memory_errors("acquire"):
        raise error
    assert caught.value is error


@pytest.mark.integration
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("sku.pipeline.unlearning.train_method", "memory ran out in acquire (CUDA out of memory)"),
        ("sku.pipeline.run.load_model", "memory ran out in load (CUDA out of memory)"),
        ("sku.pipeline.evaluate.compare", "memory ran out (CUDA out of memory)"),
    ],
)
def test_a_run_ends_in_one_line_and_leaves_nothing(
    place: str, message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(place, full)
    code, out, err = command("--quiet", "run", "--out", tmp_path / "run", *SMALL)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}; what needs less: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
