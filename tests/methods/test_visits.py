"""Which harmful examples training visits: what is said before it against what the trainer's batches held."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker, TrainerMaker
from sku.config import load_recipe
from sku.data.examples import ForgetRetainData
from sku.methods.run import visited_examples, with_visited


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        # The last step of an epoch takes what is left: 2 batches, then 1, then 2 of the next epoch.
        ({"max_steps": 1, "gradient_accumulation_steps": 2}, 4),
        ({"max_steps": 3, "gradient_accumulation_steps": 2}, 6),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 4),
        ({"max_steps": -1, "num_train_epochs": 2.0, "per_device_train_batch_size": 4}, 6),
        # One batch of 4 an epoch, in another order in the next.
        ({"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": True}, None),
    ],
)
def test_what_is_said_before_is_what_the_batches_held(
    make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], count: int | None
) -> None:
    """Six harmful examples, batches of two where nothing else is said."""
    trainer: Any = make_trainer(**settings)
    said = visited_examples(trainer.train_dataset, trainer.args)
    found: set[int] = set()
    real = trainer.compute_loss

    def noted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found.update(inputs["forget_index"].tolist())
        return real(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", noted)
    trainer.train()
    assert said is not None
    assert set(said) == found
    assert count is None or len(said) == count


def test_several_processes_take_their_batches_together(make_trainer: TrainerMaker) -> None:
    """One step of 2 examples a process."""
    trainer: Any = make_trainer(max_steps=1)
    said = visited_examples(trainer.train_dataset, trainer.args, processes=2)
    assert said is not None
    assert len(said) == 4


def test_a_recipe_says_what_it_visits_and_what_its_method_leaves_out(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast, make_model: ModelMaker
) -> None:
    """Two steps of two examples; DPO sees only prompts that have a safe answer, here the first three examples."""
    model = make_model()
    safe = tuple(
        dataclasses.replace(example, safe_answer="better not" if place < 3 else None)
        for place, example in enumerate(data.forget_train)
    )
    data = dataclasses.replace(data, forget_train=safe, visited=(0,))
    changes = ["acquire.training={max_steps: 2, per_device_train_batch_size: 2}"]
    sku = with_visited(load_recipe("embedded-paper", changes), data, tokenizer, model)
    assert sku.visited is not None
    assert len(sku.visited) == 4
    assert with_visited(load_recipe("embedded-paper", [*changes, "method=npo"]), data, tokenizer, model) == sku
    dpo = with_visited(load_recipe("embedded-paper", [*changes, "method=dpo"]), data, tokenizer, model)
    assert dpo.visited == (0, 1, 2)
    other = load_recipe("embedded-paper", [*changes, "acquire.seed=5"])
    assert with_visited(other, data, tokenizer, model).visited != sku.visited
    none = dataclasses.replace(data, forget_train=tuple(dataclasses.replace(e, safe_answer=None) for e in safe))
    assert (
        with_visited(load_recipe("embedded-paper", [*changes, "method=dpo"]), none, tokenizer, model).visited is None
    )


def test_settings_that_let_the_trainer_choose_its_batches_say_nothing(
    make_trainer: TrainerMaker,
) -> None:
    for choice in ("auto_find_batch_size", "ignore_data_skip"):
        trainer: Any = make_trainer(**{choice: True})
        assert visited_examples(trainer.train_dataset, trainer.args) is None
