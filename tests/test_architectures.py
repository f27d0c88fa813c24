"""The whole way, on a tiny random model of each architecture: train, negate, save, load again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import ARCHITECTURES, ModelMaker, TrainerMaker
from negate.conftest import logits_of
from sku.methods.sku import TERMS
from sku.negate.task_vector import negate, save_unlearned


@pytest.mark.parametrize(
    ("architecture", "full"),
    [*((name, False) for name in ARCHITECTURES), *((name, True) for name in ("llama_tied", "opt", "gpt2"))],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_trained_negated_saved_and_loaded_again(
    architecture: str, full: bool, make_model: ModelMaker, make_trainer: TrainerMaker,
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
) -> None:  # fmt: skip
    trainer = make_trainer(make_model(architecture), full=full, max_steps=2, learning_rate=1e-3)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        values = [line["loss"], *(line[f"loss/{name}"] for name in TERMS)]
        assert torch.isfinite(torch.tensor(values)).all()
    assert lines[-1]["loss/preservation_divergence"] < -1e-7, "the model has moved away from the original"

    base = make_model(architecture)
    bad: Any = trainer.model
    unlearned = negate(base, bad)
    save_unlearned(unlearned, tokenizer, tmp_path / "unlearned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unlearned")
    assert torch.equal(logits_of(loaded), logits_of(unlearned))
    for other in (base, bad):
        assert not torch.allclose(logits_of(loaded), logits_of(other), atol=1e-6)
