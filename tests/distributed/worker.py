"""What each of two processes does, started by ``torchrun``: trains in several ways and writes down what came of it.

accelerate shards no model on CPUs: there the processes are said to have GPUs, and gloo does the rest.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sku import __main__ as cli
from sku.config import ModulesConfig, load_recipe
from sku.methods.trainer import SkuConfig, SkuTrainer
from sku.models import load_model
from sku.pipeline.run import run_recipe
from sku.processes import current_processes
from sku.progress import quiet_libraries
from sku.training.run import save_trained
from sku.training.trainer import UnlearningTrainer

Case = dict[str, Any]
"""``full``, ``fsdp``, ``dropout``; the rest are settings of training."""


def make_trainer(folder: Path, out: Path, case: Case) -> SkuTrainer:
    """The trainer of stage 1 for the model and the data that lie in a folder."""
    case = dict(case)
    full, fsdp, dropout = (case.pop(name, False) for name in ("full", "fsdp", "dropout"))
    if fsdp:
        case |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    defaults: Case = {
        "output_dir": str(out), "per_device_train_batch_size": 4 // current_processes().count,
        "modules": ModulesConfig(random_answers=2), "learning_rate": 1e-2, "use_cpu": True,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    settings = SkuConfig(**(defaults | case))
    if fsdp:
        PartialState().distributed_type = DistributedType.MULTI_GPU
    loaded = load_model(folder / "model")
    adapter = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=float(dropout), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return SkuTrainer(
        loaded.model.requires_grad_(requires_grad=full),
        settings,
        pickle.loads((folder / "data.pickle").read_bytes()),
        processing_class=loaded.tokenizer,
        peft_config=None if full else adapter,
    )


def finish(trainer: SkuTrainer, out: Path, *, resume_from: str | None = None) -> dict[str, Tensor]:
    """Trains, writes log and weights, and gives the weights."""
    trainer.train(resume_from_checkpoint=resume_from)
    out.mkdir(parents=True, exist_ok=True)
    save_trained(trainer, out)
    if trainer.args.should_save:
        lines = [line for line in trainer.state.log_history if "loss" in line]
        (out / "log.json").write_text(json.dumps(lines))
    current_processes().run_on_rank0(lambda: None)
    return load_file(next(out.glob("*.safetensors")))


def main(folder: Path) -> None:
    """Every case, one after the other; those with ``save_steps`` are resumed as well.

    Then a whole recipe, and at last the same by the command line with a process that dies on the way.
    """
    quiet_libraries()
    jobs = json.loads((folder / "jobs.json").read_text())
    for name, case in jobs["cases"].items():
        out = folder / name
        trainer = make_trainer(folder, out / "checkpoints", case)
        finish(trainer, out)
        assert isinstance(next(iter(trainer.model.parameters())), DTensor) == ("fsdp" in case)  # type: ignore[union-attr]
        if "save_steps" in case:
            torch.manual_seed(99)
            checkpoint = out / "checkpoints" / f"checkpoint-{case['save_steps']}"
            finish(
                make_trainer(folder, out / "checkpoints", case),
                folder / f"{name}_resumed",
                resume_from=str(checkpoint),
            )
    run_recipe(load_recipe("embedded-paper", jobs["recipe"]), folder / "whole")
    (folder / f"done_{current_processes().rank}").touch()
    die_in_step(4)
    sys.argv = ["sku", *jobs["command"]]
    cli.main()


def die_in_step(step: int) -> None:
    """From now on the second process is killed in a step, as the kernel kills one that takes too much memory."""
    real = UnlearningTrainer.compute_loss

    def compute_loss(self: UnlearningTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1 and current_processes().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)

    UnlearningTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
