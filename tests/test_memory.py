"""The formula of memory: by hand, beside what a real training step takes, and ``activation_checkpointing: auto``."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from conftest import TINY_RUN, TrainerMaker
from sku import memory
from sku.config import Recipe, load_recipe, recipe_from_dict
from sku.data.batches import ROWS
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import ModelError, RecipeError
from sku.memory import GIB, decide_checkpointing, stage_1_memory
from sku.methods.run import train_method
from sku.pipeline import unlearning
from sku.pipeline.run import plan_run
from sku.pipeline.stages import run_acquire
from sku.training import adapter_inputs_as_they_are
from sku.training.config import UnlearningConfig
from sku.training.trainer import UnlearningTrainer

EXAMPLES, ANSWERS = 4, 2


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=3, **changes,
    )  # fmt: skip


LORA: dict[str, Any] = {"tuning": "lora", "lora": {"r": 4, "alpha": 8}}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    # Activations of the layers, and what is kept of the reference.
    "llama_full": (llama(tie_word_embeddings=False), {"tuning": "full"}),
    "llama_lora": (llama(tie_word_embeddings=True), LORA),
    # Logits, losses and the gradient of the head.
    "gemma_wide_vocabulary": (
        Gemma3TextConfig(
            vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, sliding_window=32, pad_token_id=3,
        ),
        {"tuning": "full"},
    ),
    "llama_lora_checkpointed": (llama(), {**LORA, "training": {"activation_checkpointing": True}}),
    # Weights in bfloat16 as well.
    "llama_lora_bf16": (llama(), {**LORA, "training": {"bf16": True}}),
}  # fmt: skip


def equal_rows() -> ForgetRetainData:
    """Prompts and answers of one length each, so that all rows are as long as the longest."""
    colours = ("red", "blue", "gold", "grey", "pink", "teal", "rust", "navy")
    forget = [ForgetExample(prompt=f"where is {word} ?", answer=f"{word} " * 20) for word in colours]
    retain = [RetainExample(prompt=f"what was {word} ?", answer=f"{word} " * 20) for word in colours]
    return ForgetRetainData(
        forget_train=tuple(forget[:6]), forget_test=tuple(forget[6:]), retain_train=tuple(retain[:6]),
        retain_validation=(retain[6],), retain_test=(retain[7],),
    )  # fmt: skip


def recipe_of(folder: Path, acquire: dict[str, Any], **data: int) -> Recipe:
    training = {"per_device_train_batch_size": EXAMPLES, **acquire.get("training", {})}
    return recipe_from_dict(
        {
            "name": "planned",
            "model": {"path": str(folder), "dtype": "bfloat16" if training.get("bf16") else "float32"},
            "data": {"forget": {"path": "embedded"}, "retain": {"path": "embedded"}, **data},
            "acquire": {**acquire, "random_answers": ANSWERS, "preservation_mode": "retention", "training": training},
        }
    )


def allocated(step: Any) -> int:
    """Most bytes that torch's CPU allocator had given out at once during a call, beyond those of before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    live = most = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_near_what_is_measured(
    name: str, make_trainer: TrainerMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    config, acquire = SHAPES[name]
    torch.manual_seed(0)
    bf16 = acquire.get("training", {}).get("bf16", False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32)
    config.save_pretrained(tmp_path)
    trainer = make_trainer(
        model, full=acquire["tuning"] == "full", dataset=equal_rows(), per_device_train_batch_size=EXAMPLES,
        random_answers=ANSWERS, preservation_mode="retention", learning_rate=1e-4, **acquire.get("training", {}),
    )  # fmt: skip
    dataset: Any = trainer.train_dataset
    assert trainer.data_collator is not None
    batch = trainer.data_collator([dataset[place] for place in range(EXAMPLES)])
    lengths, kept = (batch[ROWS].model_inputs[name].sum(1) for name in ("attention_mask", "logits_to_keep"))
    trained: Any = trainer.model
    if trainer.args.activation_checkpointing:
        trained.activation_checkpointing_enable()  # As the trainer does where training begins.
    optimizer = trainer.create_optimizer()
    trained.train()

    def step() -> None:
        with adapter_inputs_as_they_are(trained, autocast=bf16):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = trainer.compute_loss(trained, batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # From the second step on there are optimizer states.
    held = sum(weight.nbytes for weight in trained.parameters())
    held += sum(weight.nbytes for weight in trainer._reference.parameters()) if trainer._reference else 0
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    measured = held + allocated(step)

    data = {"max_length": int(lengths.max()), "max_answer_tokens": round(float(kept.float().mean()))}
    estimated = stage_1_memory(recipe_of(tmp_path, acquire, **data))
    record_property("estimated over measured", round(estimated.total / measured, 2))
    assert estimated.total == pytest.approx(measured, rel=0.15), estimated


def test_by_hand(tmp_path: Path) -> None:
    """Inputs and outputs of a layer's linear layers: q, o 2d each, k, v d + d_kv each, three of the MLP d + m."""
    config, _ = SHAPES["llama_full"]
    config.save_pretrained(tmp_path)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    parameters = 2 * 320 * 64 + 6 * layer + 64
    rows = EXAMPLES * (1 + ANSWERS + 1)
    kept = round(rows * 64 * 6 * (2 * 2 * 64 + 2 * (64 + 32) + 3 * (64 + 160)) * 4 * 1.2)
    found = stage_1_memory(recipe_of(tmp_path, {"tuning": "full"}, max_length=64, max_answer_tokens=16))
    assert (found.weights, found.reference) == (4 * parameters, 4 * 320 * 64)
    assert (found.optimizer, found.models) == (8 * parameters, 8 * parameters)
    assert (found.activations, found.gradients) == (kept + 4 * 4 * rows * 16 * 320, 0)
    accumulated = recipe_of(tmp_path, {"tuning": "full", "training": {"gradient_accumulation_steps": 2}})
    assert stage_1_memory(accumulated).gradients == 4 * parameters
    lora = stage_1_memory(recipe_of(tmp_path, LORA))
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)
    assert lora.weights == 4 * (parameters + 6 * 4 * sides)
    assert lora.optimizer == 8 * 6 * 4 * sides
    assert lora.reference == 0


def test_what_the_formula_is_not_made_for_is_refused(tmp_path: Path) -> None:
    MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=3,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ModelError):
        stage_1_memory(recipe_of(tmp_path, {"tuning": "lora"}))
    with pytest.raises(RecipeError):
        stage_1_memory(load_recipe("embedded-paper", ["method=npo"]))


TINY = [*TINY_RUN, "acquire.training.activation_checkpointing=auto"]


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("embedded-paper", TINY)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each trainer is told."""
    found: list[bool] = []
    before = UnlearningTrainer.train

    def train(self: UnlearningTrainer, *arguments: Any, **options: Any) -> Any:
        found.append(bool(self.args.activation_checkpointing))
        return before(self, *arguments, **options)

    monkeypatch.setattr(UnlearningTrainer, "train", train)
    return found


def free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(memory, "_free_memory", lambda: int(gib * GIB))


@pytest.mark.parametrize(("gib", "on"), [(1000, False), (0.1, True)])
def test_checkpointing_is_on_only_where_stage_1_does_not_fit_without_it(
    recipe: Recipe, used: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, *, on: bool
) -> None:
    free(monkeypatch, gib)
    decided = decide_checkpointing(recipe)
    assert decided is not None
    assert decided.on is on
    assert f"{gib:.1f} GiB are free on cpu" in decided.why
    plan = plan_run(recipe, tmp_path / "run")
    assert plan.settings["activation checkpointing"] == decided.line
    assert plan.memory is not None
    assert plan.memory()[0] is not on
    run_acquire(recipe, tmp_path / "bad")
    assert used == [on]


def test_nothing_is_decided_for_a_recipe_that_says_it_and_without_an_estimate_it_is_on(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in ("true", "false"):
        said = load_recipe("embedded-paper", [*TINY, f"acquire.training.activation_checkpointing={value}"])
        assert decide_checkpointing(said) is None
    decided = [decide_checkpointing(load_recipe("embedded-paper", [*TINY, "method=npo"]))]
    monkeypatch.setattr(memory, "pick_device", lambda _: torch.device("mps"))
    decided += [decide_checkpointing(recipe)]
    for found, reason in zip(decided, ("npo", "mps"), strict=True):
        assert found is not None
        assert found.on
        assert reason in found.why
    alone = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing="auto")
    assert alone.activation_checkpointing is True


def test_a_resumed_run_trains_as_it_began_whatever_is_free_then(
    recipe: Recipe, used: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    free(monkeypatch, 1000)
    monkeypatch.setattr(unlearning, "train_method", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_run(recipe, out).execute(None)
    noted = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["activation_checkpointing"]
    assert noted["on"] is False
    assert "1000.0 GiB are free" in noted["why"]
    free(monkeypatch, 0.1)
    monkeypatch.setattr(unlearning, "train_method", train_method)
    plan = plan_run(recipe, out, resume=True)
    assert plan.settings["activation checkpointing"] == f"off: {noted['why']}"
    done = plan.execute(None)
    assert used == [False]
    assert done.manifest["activation_checkpointing"] == noted
    assert done.manifest["recipe"]["acquire"]["training"]["activation_checkpointing"] == "auto"
