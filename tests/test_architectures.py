"""The whole way, on a tiny random model of each architecture: train, negate, save, load again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import ARCHITECTURES, ModelMaker, TrainerMaker
from sku.acquire.objective import TERMS
from sku.acquire.trainer import SkuTrainer
from sku.data.batches import ROWS, PaddedRows
from sku.negate.run import negate_with_record, save_unlearned

IDS = torch.tensor([[5, 40, 41, 200, 7, 8, 30, 31]])


def logits_of(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
    unlearned, record = negate_with_record(base, bad)
    assert record.task_vector_norm > 0
    assert record.survival == pytest.approx(1.0, abs=1e-3)
    save_unlearned(unlearned, tokenizer, tmp_path / "unlearned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unlearned")
    assert torch.equal(logits_of(loaded), logits_of(unlearned))
    for other in (base, bad):
        assert not torch.allclose(logits_of(loaded), logits_of(other), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_padding_changes_no_loss(architecture: str, make_model: ModelMaker, make_trainer: TrainerMaker) -> None:
    """Absolute positions, sliding windows and attention sinks included."""
    trainer: SkuTrainer = make_trainer(make_model(architecture), preservation_mode="retention")
    model: Any = trainer.model
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    dataset: Any = trainer.train_dataset
    collator: Any = trainer.data_collator
    tight = collator([dataset[0], dataset[1]])
    rows: PaddedRows = tight[ROWS]
    wider = dataclasses.replace(
        rows,
        input_ids=torch.nn.functional.pad(rows.input_ids, (0, 23), value=3),
        attention_mask=torch.nn.functional.pad(rows.attention_mask, (0, 23)),
        kept_RT=torch.nn.functional.pad(rows.kept_RT, (0, 23)),
    )
    wide = {**tight, ROWS: wider}
    results = []
    for batch in (tight, wide):
        with torch.no_grad():
            results.append(trainer._outputs_and_terms(model, batch)[1])
    assert set(results[0]) == set(TERMS)
    for name in TERMS:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert float(results[0]["preservation_divergence"].min()) > 1e-4
