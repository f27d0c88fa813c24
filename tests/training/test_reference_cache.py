"""The original model from one pass before training, against the original model asked in each step."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import ModelMaker, TrainerMaker, assert_same_bits, weights_of
from sku.data.examples import RowType
from sku.methods.sku import TERMS
from sku.methods.trainer import SkuTrainer
from sku.training import trainer as trainer_module


def losses_of(trainer: SkuTrainer) -> list[list[float]]:
    return [[line[f"loss/{name}"] for name in TERMS] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_first_look_at_each_row_gives_the_same_bits(full: bool, make_trainer: TrainerMaker) -> None:
    """Two steps of two rows: all four normal rows once, in the same batches; dropout is off, its draws are there."""
    runs = []
    for megabytes in (2048.0, 0.0):
        trainer = make_trainer(
            full=full, reference_cache_mb=megabytes, preservation_mode="retention", lora={"lora_dropout": 0.5}
        )
        trainer.train()
        runs.append((losses_of(trainer), weights_of(trainer)))
        assert (trainer._reference is None) is not (full and not megabytes)
    (cached, weights), (asked, others) = runs
    assert cached == asked
    assert cached[1][2] > 1e-6
    assert_same_bits(weights, others)


def test_each_row_is_looked_at_once(make_trainer: TrainerMaker) -> None:
    """Four normal rows in batches of two, whatever the number of steps; then no forward pass but those of training."""
    trainer = make_trainer(max_steps=5)
    rows: list[int] = []
    assert trainer.model is not None
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    # One joint example first (1 + 2 + 1 rows), to see what is asked for; then the normal rows; then five steps.
    assert rows == [4, 2, 2, 8, 8, 8, 8, 8]


def test_full_tuning_has_no_second_model_and_its_own_copy_of_a_trained_head(
    make_trainer: TrainerMaker, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any) -> None:
        pytest.fail("a second model was made")

    monkeypatch.setattr(trainer_module, "copy", SimpleNamespace(deepcopy=fail))
    trainer = make_trainer(make_model("llama_tied"), full=True)
    trainer.train()
    assert trainer._cache is not None
    kept = trainer._cache._rows[RowType.RETAIN]
    untouched = make_model("llama_tied").get_output_embeddings().weight
    assert torch.equal(kept.head.weight_VH, untouched)
    trained: Any = trainer.model
    assert not torch.equal(trained.get_output_embeddings().weight, untouched)


def test_a_resumed_run_asks_the_original_not_the_checkpoint(make_trainer: TrainerMaker, tmp_path: Path) -> None:
    common: dict[str, Any] = {"full": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**common)
    whole.train()
    resumed = make_trainer(**common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert_same_bits(weights_of(whole), weights_of(resumed))
    assert losses_of(whole) == losses_of(resumed)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_what_is_too_much_to_keep_is_asked_in_each_step(
    full: bool, make_trainer: TrainerMaker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(full=full, reference_cache_mb=0.0001)
        trainer.train()
    assert trainer._cache is None
    assert (trainer._reference is not None) is full
    assert "4 rows" in caplog.text
    other = make_trainer(full=full, reference_cache_mb=0.0)
    other.train()
    assert losses_of(trainer) == losses_of(other)


def test_a_row_that_was_not_looked_at_gives_nan_not_another_row(make_trainer: TrainerMaker) -> None:
    """One step of two normal rows is prepared; the other two are unknown."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    dataset: Any = trainer.train_dataset
    assert trainer._cache is not None
    seen = {dataset[place].retain_rows[0] for place in (0, 1)}
    for place in (0, 1, 2, 3):
        batch = trainer.data_collator([dataset[place]])
        model: Any = trainer.model
        terms = trainer._outputs_and_terms(model, batch)[1]
        known = dataset[place].retain_rows[0] in seen
        assert bool(terms["preservation_divergence"].isfinite()) is known


@pytest.mark.parametrize("megabytes", [2048.0, 0.0])
def test_under_autocast_the_original_is_asked_in_the_same_precision(
    megabytes: float, make_trainer: TrainerMaker, make_model: ModelMaker
) -> None:
    """In the first step the two models are one. Another precision would show as a divergence of 1e-4 here."""
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    trainer = make_trainer(model, full=True, reference_cache_mb=megabytes, bf16=True, max_steps=1)
    trainer.train()
    assert losses_of(trainer)[0][2] == pytest.approx(0.0, abs=1e-6)
