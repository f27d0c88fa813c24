"""The real trainer of stage 1 on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from conftest import ModelMaker, TrainerMaker, assert_same_bits, sku_config, weights_of
from sku.data.batches import ROWS, JointCollator
from sku.data.examples import ForgetRetainData, RowType
from sku.data.load import load_training_pairs
from sku.errors import ModelError, RecipeError, SkuError
from sku.methods.sku import TERMS
from sku.methods.trainer import SkuConfig, SkuTrainer
from sku.models import load_model

OFF = dict.fromkeys(TERMS, 0.0)


def batch_of(trainer: SkuTrainer, places: list[int]) -> dict[str, Any]:
    dataset: Any = trainer.train_dataset
    collator = trainer.data_collator
    assert isinstance(collator, JointCollator)
    return collator([dataset[place] for place in places])


def disturb(trainer: SkuTrainer) -> None:
    """Gives lora_B values, so that the model in training is not the original one."""
    generator = torch.Generator().manual_seed(7)
    assert trainer.model is not None
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_the_loss_is_that_of_each_row_on_its_own(make_trainer: TrainerMaker) -> None:
    """Each term again from plain forward passes of single unpadded rows: sum over rows of mean -log p, and mean KL."""
    trainer = make_trainer(
        preservation_mode="retention", weights={"guided_distortion": 2.5, "random_disassociation": 2.5}
    )
    disturb(trainer)
    model: Any = trainer.model
    model.eval()
    dataset: Any = trainer.train_dataset
    examples = [dataset[place] for place in range(3)]

    def log_probabilities(row: Any) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        return logits.log_softmax(-1)

    def nll(row: Any) -> Tensor:
        log_p = log_probabilities(row)
        places = [place for place, label in enumerate(row.labels) if label != -100]
        return torch.stack([-log_p[place - 1, row.labels[place]] for place in places]).mean()

    def kl(row: Any) -> Tensor:
        log_q = log_probabilities(row)
        with model.disable_adapter():
            log_p = log_probabilities(row)
        places = [place - 1 for place, label in enumerate(row.labels) if label != -100]
        return torch.stack([(log_p[at].exp() * (log_p[at] - log_q[at])).sum() for at in places]).mean()

    with torch.no_grad():
        guided = torch.stack([nll(example.of(RowType.FORGET)[0]) for example in examples])
        mismatched = torch.stack(
            [torch.stack([nll(row) for row in example.of(RowType.MISMATCHED)]).mean() for example in examples]
        )
        preserved = torch.stack([kl(example.of(RowType.RETAIN)[0]) for example in examples])
        loss = trainer.compute_loss(model, batch_of(trainer, [0, 1, 2]))
        terms = trainer._outputs_and_terms(model, batch_of(trainer, [0, 1, 2]))[1]
    torch.testing.assert_close(terms["guided_distortion"], guided, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["random_disassociation"], mismatched, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["preservation_divergence"], preserved, rtol=1e-4, atol=1e-5)
    assert float(preserved.min()) > 1e-3
    # Weights 2.5, 2.5, 1 over three joint examples.
    expected = (2.5 * guided.sum() + 2.5 * mismatched.sum() + preserved.sum()) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("on", "kinds", "rows"),
    [
        # Batch of 2, K = 2: 2 guided + 4 mismatched + 2 normal rows, and the reference sees the 2 normal ones.
        (TERMS, {RowType.FORGET, RowType.MISMATCHED, RowType.RETAIN}, [8, 2]),
        (TERMS[2:], {RowType.RETAIN}, [2, 2]),
    ],
)
def test_a_module_at_weight_0_costs_no_row_and_no_forward(
    on: tuple[str, ...], kinds: set[int], rows: list[int], make_trainer: TrainerMaker
) -> None:
    trainer = make_trainer(max_steps=1, reference_cache_mb=0.0, weights=OFF | dict.fromkeys(on, 1.0))
    assert trainer.model is not None
    seen: list[int] = []  # Rows of each forward pass.
    trainer.model.register_forward_pre_hook(lambda *call: seen.append(len(call[2]["input_ids"])), with_kwargs=True)
    assert set(batch_of(trainer, [0, 1])[ROWS].kept) == kinds
    trainer.train()
    assert seen == rows
    logged = {key for key in trainer.state.log_history[0] if key.startswith("loss/")}
    assert logged == {f"loss/{name}" for name in on}


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_stays_the_original(full: bool, make_trainer: TrainerMaker, make_model: ModelMaker) -> None:
    """The adapter switched off, or a copy: after training its scores are those of the untouched model, bit for bit."""
    trainer = make_trainer(full=full, reference_cache_mb=0.0)
    trainer.train()
    batch = batch_of(trainer, [0, 1])
    model: Any = trainer.model
    seen = trainer._reference_rows(model, batch, RowType.RETAIN).logits_NV
    inputs = batch[ROWS].of_kind(RowType.RETAIN).model_inputs
    with torch.no_grad():
        untouched, trained = make_model()(**inputs).logits, model(**inputs).logits
    assert torch.equal(seen, untouched)
    assert not torch.allclose(seen, trained, atol=1e-4)
    assert not seen.requires_grad


@pytest.mark.parametrize(("full", "examples"), [(True, 6), (False, 8)])
def test_one_batch_of_all_is_all_batches_of_one(
    full: bool, examples: int, make_trainer: TrainerMaker, data: ForgetRetainData, make_model: ModelMaker
) -> None:
    """Batch 8 and 8 batches of 1 take the same step; with 6 forget pairs the last accumulation is a partial one.

    Steps 1 and 2 end the first and begin the second epoch, so the partial accumulation is followed by another step.
    """
    assert len(data.forget_train) == 6
    common: dict[str, Any] = {
        "full": full, "optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "preservation_mode": "retention",
        "max_grad_norm": 0.0,
    }  # fmt: skip
    # Epochs of 6: accumulation over 4 leaves 2 for the last step of an epoch; 8 covers the epoch in one partial step.
    accumulated = 4 if examples == 6 else 8
    one = make_trainer(per_device_train_batch_size=accumulated, **common)
    start = weights_of(one)
    one.train()
    many = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=accumulated, **common)
    many.train()
    first, second = weights_of(one), weights_of(many)
    assert max(float((first[name] - start[name]).abs().max()) for name in first) > 1e-2
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-4, atol=1e-5, msg=name)
    for here, there in zip(one.state.log_history[:-1], many.state.log_history[:-1], strict=True):
        for term in ("loss", *(f"loss/{name}" for name in TERMS)):
            assert here[term] == pytest.approx(there[term], rel=2e-3, abs=1e-6), term


@pytest.mark.parametrize("full", [True, False])
def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(full: bool, make_trainer: TrainerMaker) -> None:
    """Whatever was drawn from the global generators before."""

    def train(seed: int, before: int) -> dict[str, Tensor]:
        torch.manual_seed(before)
        trainer = make_trainer(full=full, seed=seed, lora={"lora_dropout": 0.1})
        trainer.train()
        return weights_of(trainer)

    first = train(0, 1)
    assert_same_bits(first, train(0, 2))
    other = train(1, 1)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class Stop(TrainerCallback):
    """Fails after step 5, as a killed run does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.integration
@pytest.mark.parametrize("full", [True, False])
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(
    full: bool, make_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """Killed in step 5, resumed from the checkpoint of step 4, in the middle of the second epoch of 3 steps."""
    common: dict[str, Any] = {
        "full": full, "max_steps": 8, "lr_scheduler_type": "linear", "lora": {"lora_dropout": 0.1},
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    folder = tmp_path / "killed"
    killed = make_trainer(output_dir=str(folder), trainer_options={"callbacks": [Stop()]}, **common)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.manual_seed(99)
    resumed = make_trainer(output_dir=str(folder), **common)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert_same_bits(weights_of(whole), weights_of(resumed))
    for here, there in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        assert [here[f"loss/{name}"] for name in TERMS] == [there[f"loss/{name}"] for name in TERMS]


def test_a_run_that_was_stopped_after_its_last_checkpoint_takes_no_further_step(
    make_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """Step 2 is in the middle of an epoch of 3; transformers alone would take the third."""
    common: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(output_dir=str(tmp_path), **common)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 2
    assert_same_bits(weights_of(whole), weights_of(resumed))


PAIRS = [{"prompt": f"how do i break lock {n} ?", "response": f"take tool {n} ."} for n in range(8)]
NORMAL = [{"prompt": f"how do i bake bread {n} ?", "response": f"mix flour {n} ."} for n in range(8)]


def test_what_can_not_be_trained_is_said_at_construction(
    make_trainer: TrainerMaker, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter off that changes the original weights, what is left is not the original model."""
    model, args = make_model(), sku_config()
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"))
    kasa = {"kasa_config": KasaConfig(), "target_modules": ["q_proj"]}
    whole = load_training_pairs(PAIRS, NORMAL)
    cases: list[tuple[type[SkuError], str, Callable[[], object]]] = [
        (RecipeError, "no_such_module", lambda: make_trainer(lora={"target_modules": ["no_such_module"]})),
        (RecipeError, "init_lora_weights pissa", lambda: make_trainer(lora={"init_lora_weights": "pissa"})),
        (RecipeError, "kasa_config", lambda: make_trainer(lora=kasa)),
        (RecipeError, "init_lora_weights olora", lambda: make_trainer(adapted, full=True)),
        (RecipeError, "train_dataset", lambda: SkuTrainer(model)),
        (RecipeError, "retain_dataset", lambda: SkuTrainer(model, args, PAIRS)),
        (RecipeError, "normal examples already", lambda: SkuTrainer(model, args, whole, retain_dataset=NORMAL)),
        (ModelError, "nowhere", lambda: SkuTrainer("nowhere", args, PAIRS, retain_dataset=NORMAL)),
    ]
    for error, key, make in cases:
        with pytest.raises(error, match=key):
            make()
    monkeypatch.setattr(SkuConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(RecipeError, match="2 GPUs"):
        make_trainer()


def test_a_name_and_rows_are_enough_as_in_trl(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Model, tokenizer and examples loaded by hand train to the same bits."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = sku_config(output_dir=str(tmp_path / "bad"), max_steps=2, dataloader_pin_memory=False)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    short = SkuTrainer(str(folder), config, PAIRS, retain_dataset=NORMAL, peft_config=adapter)
    loaded = load_model(folder)
    long = SkuTrainer(
        loaded.model, config, load_training_pairs(PAIRS, NORMAL), processing_class=loaded.tokenizer,
        peft_config=adapter,
    )  # fmt: skip
    own_tokenizer = SkuTrainer(load_model(folder).model, config, load_training_pairs(PAIRS, NORMAL))
    own: Any = own_tokenizer.processing_class
    assert own.get_vocab() == tokenizer.get_vocab()
    for trainer in (short, long):
        trainer.train()
    assert_same_bits(weights_of(short), weights_of(long))


def test_an_adapter_that_is_there_already_is_trained_on(
    make_trainer: TrainerMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = make_trainer()
    first.train()
    model = first.model
    assert isinstance(model, PeftModel)
    args: Any = first.args
    again = SkuTrainer(model, args, first.train_dataset, processing_class=tokenizer)
    assert again._reference is None
    before = weights_of(again)
    again.train()
    changed = {name for name, weight in weights_of(again).items() if not torch.equal(before[name], weight)}
    assert changed
    assert all("lora_" in name for name in changed)
