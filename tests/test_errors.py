"""What other packages' errors say, and memory that runs out, brought into one line; and nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY_RUN, Command
from sku.errors import DataError, NoMemoryError, first_line, named_memory_errors, one_line

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nof which ..."
CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def test_an_error_of_several_lines_or_of_none() -> None:
    error = OSError("\n  no such\n\tfile  \nlook elsewhere\n")
    assert (one_line(error), first_line(error)) == ("no such file look elsewhere", "no such")
    for words in ("", " \n\t"):
        assert one_line(ValueError(words)) == first_line(ValueError(words)) == "ValueError"


def test_every_way_of_saying_so_is_one_line_with_the_settings_of_the_stage() -> None:
    mps, acquire = (
        RuntimeError("MPS backend out of memory"),
        "per_device_train_batch_size activation_checkpointing=true",
    )
    for error, stage, settings in (
        (torch.OutOfMemoryError(GPU), "acquire", f"{acquire} data.max_length qlora"),
        (MemoryError(), "load", "model.dtype"),
        (RuntimeError(CPU), "evaluate_base", "evaluate.batch_size"),
        (mps, "attacks", "evaluate.attacks"),
        (torch.OutOfMemoryError(GPU), None, "data."),
    ):
        with pytest.raises(NoMemoryError) as caught, named_memory_errors(stage):
            raise error
        assert "\n" not in str(caught.value)
        assert all(setting in str(caught.value) for setting in settings.split())
        assert caught.value.__cause__ is error
    for other in (RuntimeError("shapes differ"), DataError("out of memory"), KeyError("x")):
        with pytest.raises(type(other)) as kept, named_memory_errors("acquire"):
            raise other
        assert kept.value is other


@pytest.mark.integration
@pytest.mark.parametrize(
    ("place", "stage"),
    [
        ("sku.pipeline.unlearning.train_method", " in acquire "),
        ("sku.pipeline.run.load_model", " in load "),
        ("sku.pipeline.evaluate.compare", ""),
    ],
)
def test_a_run_ends_in_one_line_and_leaves_nothing(
    place: str, stage: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(place, full)
    code, out, err = command("--quiet", "run", "--out", tmp_path / "run", *(f"--set={item}" for item in TINY_RUN))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert stage in err
    assert "CUDA out of memory" in err
    assert list(tmp_path.iterdir()) == []
