"""What the estimate says of shapes whose numbers are known, and what it advises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

from sku.cli.main import app
from sku.config import load_recipe
from sku.errors import ModelError, RecipeError
from sku.plan.estimate import GIB, estimated, first_that_fits, suggestions
from sku.plan.fit import decided_job
from sku.plan.job import Job, job_of, weights_of
from sku.plan.trace import StepTrace, trace_step
from sku.training import optimizer

RECIPE = Path(__file__).with_name("llama-3.2-1b.yaml")
"""Of all three modules and one bad model."""
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def shallow(tmp_path: Path) -> Path:
    """Two layers, which are traced at once."""
    LlamaConfig(**(SMALL | {"num_hidden_layers": 2})).save_pretrained(tmp_path)
    return tmp_path


def job(folder: Path, *changes: str, **options: Any) -> Job:
    plain = ["acquire.training.activation_checkpointing=false", "data.max_length=64", "data.max_answer_tokens=16"]
    overrides = [f"model.path={folder}", *plain, *changes]
    return job_of(load_recipe(RECIPE, overrides), **options)


def test_weights_are_counted_by_hand(folder: Path) -> None:
    """Embedding and head V d each; in a layer q, o d^2, k, v d d_kv, the MLP 3 d m, two norms; a last norm."""
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    parameters = 2 * 500 * 64 + 8 * layer + 64
    full = weights_of(job(folder, "acquire.tuning=full"))
    assert (full.parameters, full.trainable, full.adapter) == (parameters, parameters, 0)
    assert full.held_bytes == full.trainable_bytes == 4 * parameters, "full fine-tuning holds float32"
    lora = weights_of(job(folder, "acquire.tuning=lora", "acquire.lora.r=4"))
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)
    assert (lora.parameters, lora.adapter, lora.trainable) == (parameters, 8 * 4 * sides, 8 * 4 * sides)
    assert lora.held_bytes == 2 * parameters + 4 * lora.adapter, "bfloat16 below a float32 adapter"
    assert lora.adapted == 8 * (layer - 2 * 64)
    qlora = weights_of(job(folder, "acquire.tuning=qlora", "acquire.lora.r=4"))
    rest = parameters - lora.adapted
    assert qlora.held_bytes == pytest.approx(lora.adapted * 4.127 / 8 + 4 * rest + 4 * qlora.adapter, rel=1e-3)


def test_work_is_six_times_weights_and_tokens(folder: Path) -> None:
    """Forward 2, backward 4 for each weight of a matrix product and token; of the head only where a token is kept."""
    made = job(folder, "acquire.tuning=full", "acquire.weights.preservation_divergence=0", "model.dtype=float32")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    rows, length, kept = made.rows, 64, 16
    assert rows == 8 * (1 + 3)
    products = 6 * (8 * layer * rows * length + 500 * 64 * rows * kept)
    attention = 8 * (4 + 10) * rows * 64 * length**2  # Two products forward, five backward.
    # The first layer's input needs its gradient as well: the embedding is trained.
    assert trace_step(made).flops == pytest.approx(products + attention, rel=0.01)


@pytest.mark.integration
def test_more_layers_are_a_straight_line(folder: Path) -> None:
    """What is traced on two and four layers is what all layers take."""
    from sku.plan import trace as traced

    made = job(folder, "acquire.training.activation_checkpointing=true")
    assert trace_step(made) == traced._joined(*traced._traced(made, 8))


def test_sharding_divides_what_it_should(folder: Path) -> None:
    copied = ("acquire.tuning=full", "acquire.training.reference=copy")
    alone = estimated(job(folder, *copied))
    step = alone.step
    shared = {
        sharding: estimated(job(folder, *copied, gpus=4, sharding=sharding), step=step).stage_1
        for sharding in ("ddp", "fsdp2", "zero3")
    }
    one = alone.stage_1
    assert one.optimizer == 2 * one.weights == 2 * one.reference
    assert (shared["ddp"].weights, shared["ddp"].optimizer) == (one.weights, one.optimizer)
    assert shared["ddp"].communication == one.weights, "buckets of gradients"
    for sharding in ("fsdp2", "zero3"):
        assert shared[sharding].weights == pytest.approx(one.weights / 4, abs=4)
        assert shared[sharding].optimizer == pytest.approx(one.optimizer / 4, abs=4)
        assert 0 < shared[sharding].communication < one.weights
    assert shared["fsdp2"].reference == pytest.approx(one.reference / 4, abs=4)
    assert shared["zero3"].reference == one.reference
    assert shared["fsdp2"].activations == one.activations


@pytest.mark.integration
def test_a_second_model_only_where_nothing_can_be_kept(folder: Path) -> None:
    """As the trainer settles it; a trained head is kept as it was."""
    found = {
        sharding: job(folder, "acquire.tuning=full", gpus=4, sharding=sharding).copies_reference
        for sharding in ("ddp", "fsdp2", "zero3")
    }
    assert found == {"ddp": False, "fsdp2": True, "zero3": True}
    kept, copied = (
        estimated(job(folder, "acquire.tuning=full", f"acquire.training.reference={mode}")).stage_1
        for mode in ("cache", "copy")
    )
    assert 0 < kept.reference < copied.reference == copied.weights
    assert estimated(job(folder, "acquire.tuning=lora")).stage_1.reference == 0


@pytest.mark.integration
def test_an_adapter_on_bfloat16_weights_needs_less_under_autocast(shallow: Path) -> None:
    settings = ("acquire.tuning=lora", "model.dtype=bfloat16")
    made = estimated(job(shallow, *settings))
    advice = {entry.change: entry for entry in suggestions(dataclasses.replace(made, gpu_memory=made.needed - 1))}
    followed = estimated(job(shallow, *settings, "acquire.training.bf16=true"))
    assert followed.stage_1.activations < made.stage_1.activations
    assert advice["--set acquire.training.bf16=true"].needed == followed.needed < made.needed
    assert followed.stage_1 == estimated(job(shallow, *settings, "acquire.training.bf16=auto")).stage_1


@pytest.mark.integration
def test_advice_is_what_the_recipe_gives_when_it_is_followed(shallow: Path) -> None:
    made = estimated(job(shallow, "acquire.tuning=full"))
    assert made.fits
    assert suggestions(made) == [], "nothing to mend"
    advice = suggestions(dataclasses.replace(made, gpu_memory=made.needed - 1))
    assert [suggestion.fits for suggestion in advice] == sorted((entry.fits for entry in advice), reverse=True)
    names = " ".join(suggestion.change for suggestion in advice)
    for part in ("activation_checkpointing=true", "per_device_train_batch_size=1", "tuning=lora", "bf16=true"):
        assert part in names
    for suggestion in advice:
        settings = [part.strip() for part in suggestion.change.split("--set ") if part.strip()]
        followed = estimated(job(shallow, "acquire.tuning=full", *settings))
        assert followed.needed == suggestion.needed < made.needed, suggestion.change


def test_experts_are_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    from sku.plan import trace as traced

    def depends(*_: Any) -> Any:
        raise DataDependentOutputException(torch.ops.aten.item.default)

    MixtralConfig(**SMALL, num_local_experts=2).save_pretrained(tmp_path)
    monkeypatch.setattr(traced, "_run", depends)
    with pytest.raises(ModelError, match="depends on the data"):
        trace_step(job(tmp_path, "acquire.lora.target_modules=[q_proj]"))


def test_what_can_not_be_planned_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="method is npo"):
        job(folder, "method=npo")
    with pytest.raises(RecipeError, match="optim=lomo is not known here"):
        job(folder, "acquire.training.optim=lomo")
    with pytest.raises(RecipeError, match="the answer is a part of its row"):
        job(folder, answer_tokens=65)


def test_a_paged_optimizer_is_planned_where_there_is_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: object())
    paged = "acquire.training.optim=paged_adamw_8bit"
    assert job(folder, paged).state_bytes == 2
    with pytest.raises(RecipeError, match="nothing to page out without a GPU"):
        job(folder, paged, on_cpu=True)
    with pytest.raises(RecipeError, match="stochastic_rounding is AdamW's, and optim is paged_adamw_8bit"):
        job(folder, paged, "acquire.training.stochastic_rounding=true")


@pytest.mark.integration
def test_the_command_says_what_the_estimate_is(shallow: Path) -> None:
    options = [
        "plan", str(RECIPE), "--model", str(shallow), "--row-tokens", "64", "--answer-tokens", "16",
        "--set", "acquire.training.activation_checkpointing=false",
    ]  # fmt: skip
    said = CliRunner().invoke(app, [*options, "--json", "--gpus", "2", "--gpu-memory", "24"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    expected = estimated(job(shallow, gpus=2), gpu_memory=24 * GIB)
    assert found == json.loads(json.dumps({**expected.to_dict(), "suggestions": []}))
    assert found["fits"] is True
    assert found["seconds"] == pytest.approx(200 * found["step_flops"] / (989e12 * 0.3))
    shown = CliRunner().invoke(app, [*options, "--gpus", "2", "--gpu-memory", str((expected.needed - 1) / GIB)])
    assert "too large by 0.0 GiB" in shown.output
    assert "fits: --set acquire.training.activation_checkpointing=true" in shown.output
    assert "stage 2 and evaluation" in shown.output
    wrong = CliRunner().invoke(app, [*options, "--sharding", "fsdp3"])
    assert wrong.exit_code == 2


PARAMETERS = {
    "llama-2-13b-paper": 13.016, "llama-2-7b-paper": 6.738, "llama-3.1-8b": 8.030, "opt-2.7b-paper": 2.652,
    "smollm2-135m-twins": 0.135, "gemma-3-270m-twins": 0.268, "qwen2.5-coder-0.5b-twins": 0.494, str(RECIPE): 1.236,
}  # fmt: skip
"""Billions, as their cards say."""


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_models_of_the_recipes_are_known_without_the_hub(name: str) -> None:
    made = job_of(load_recipe(name))
    assert made.shipped_shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made.config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == PARAMETERS[name]


@pytest.mark.integration
def test_the_8b_recipe_fits_a_card_of_80_gb_by_its_own_setting() -> None:
    """Its real shape, with rows as long as they may be; such a card has 79 GiB."""
    recipe = load_recipe("llama-3.1-8b")
    shipped = job_of(recipe)
    plain = estimated(dataclasses.replace(shipped, checkpointing=False), gpu_memory=79 * GIB)
    assert not plain.fits
    first = first_that_fits(plain)
    assert first is not None
    assert first.change == "--set acquire.training.activation_checkpointing=true"
    assert decided_job(shipped, recipe, 79 * GIB).checkpointing, "so what the recipe needs is what was estimated"
    assert not decided_job(shipped, recipe, 1.01 * plain.needed).checkpointing
    assert first.needed < 40 * GIB


def test_a_model_that_no_recipe_names_is_not_made_up() -> None:
    with pytest.raises(ModelError, match="nobody/else can't be loaded"):
        job_of(load_recipe("llama-3.1-8b", ["model.path=nobody/else"]))


def test_accumulation_keeps_gradients_beside_activations(folder: Path) -> None:
    step = StepTrace(activation_bytes=1000, peak_bytes=1300, flops=1)
    once = estimated(job(folder), step=step)
    twice = estimated(job(folder, "acquire.training.gradient_accumulation_steps=2"), step=step)
    assert once.stage_1.gradients == 300
    assert twice.stage_1.gradients == twice.weights.trainable_bytes
    assert twice.step_flops == 2 * once.step_flops
