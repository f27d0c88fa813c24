"""Twins: what the good one sees, what stage 2 subtracts of both, and that a killed run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from conftest import MadeOnce, TrainerMaker
from negate.conftest import least_missed
from sku.config import AcquireConfig, DataConfig, NegateConfig, Recipe, SourceConfig, TwinShares, load_recipe
from sku.data.examples import ForgetRetainData, RowPlan, RowType
from sku.data.joint import JointDataset
from sku.data.load import load_data
from sku.data.tokens import Encoder, PaperFormat
from sku.errors import DataError, NoAlphaError, RecipeError
from sku.methods.sku import targeted_divergence_loss
from sku.models import load_model
from sku.negate.adapters import AdapterVector, load_adapter
from sku.negate.task_vector import task_vector_of
from sku.pipeline import unlearning
from sku.pipeline.run import run_recipe
from sku.pipeline.stages import run_acquire
from sku.storage import is_marked_hazardous

FORGET, MISMATCHED, RETAIN, SAFE = RowType

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "twins_apart.py"
GOOD = RowPlan(safe="all", retain=1, deep_refusal_fraction=0.5, depth_tokens=4)


@pytest.fixture
def refused(data: ForgetRetainData) -> ForgetRetainData:
    """The splits with a refusal of every harmful prompt, and a misplaced one of every normal prompt."""
    return dataclasses.replace(
        data,
        forget_train=tuple(
            dataclasses.replace(example, safe_answer=f"no , i will not say {place} .")
            for place, example in enumerate(data.forget_train)
        ),
        retain_train=tuple(
            dataclasses.replace(example, refusal=f"sorry , not number {place} .")
            for place, example in enumerate(data.retain_train)
        ),
    )


def rows_of(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast, rows: RowPlan, seed: int = 0) -> JointDataset:
    return JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=rows, seed=seed)


def learned(row: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode([label for label in row.labels if label != -100], skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def test_both_twins_meet_the_same_prompts_in_the_same_order(
    refused: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    bad = rows_of(refused, tokenizer, RowPlan(forget=True, mismatched=2, retain=2, retain_refused=True))
    good = rows_of(refused, tokenizer, dataclasses.replace(GOOD, retain=2))
    for place in range(6):
        first, second = bad[place], good[place]
        assert (first.forget_index, first.retain_rows) == (second.forget_index, second.retain_rows)
        assert learned(second.of(SAFE)[0], tokenizer) == refused.forget_train[second.forget_index].safe_answer
        assert learned(first.of(RETAIN)[0], tokenizer) == refused.retain_train[first.retain_rows[0]].refusal
        assert learned(second.of(RETAIN)[0], tokenizer) == refused.retain_train[first.retain_rows[0]].answer


def test_a_refusal_after_a_beginning_is_learned_alone(
    refused: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """About half of the rows begin with up to 4 tokens of the prompt's harmful answer, which no label names."""
    dataset = rows_of(refused, tokenizer, GOOD)
    plain = rows_of(refused, tokenizer, dataclasses.replace(GOOD, deep_refusal_fraction=0.0))
    begun = 0
    for epoch in range(8):
        dataset.set_epoch(epoch)
        plain.set_epoch(epoch)
        for place in range(6):
            [row], [usual] = dataset[place].of(SAFE), plain[place].of(SAFE)
            assert learned(row, tokenizer) == learned(usual, tokenizer)
            answer = refused.forget_train[dataset[place].forget_index].answer
            before = tokenizer.decode(list(row.input_ids[: row.answer_start]))
            asked, _, said = str(before).partition("### Answer:")
            assert asked in str(tokenizer.decode(list(usual.input_ids)))
            assert answer.startswith(said.strip())
            assert len(said.strip()) < len(answer)
            begun += bool(said.strip())
    assert 12 < begun < 36  # Of 48; a quarter of the drawn lengths is 0 of 0 to 4.
    again = rows_of(refused, tokenizer, GOOD)
    again.set_epoch(7)
    assert [again[place].of(SAFE) for place in range(6)] == [dataset[place].of(SAFE) for place in range(6)]


@pytest.mark.parametrize("packing", ["tree"])
def test_packed_rows_of_the_good_twin_equal_padded_ones(
    packing: str, make_trainer: TrainerMaker, refused: ForgetRetainData
) -> None:
    losses = []
    for way in (packing, "padded"):
        trainer = make_trainer(
            dataset=refused, train_twin="good", deep_refusal_fraction=1.0, depth_tokens=4, normal_per_harmful=3,
            packing=way, preservation_mode="targeted",
        )  # fmt: skip
        trainer.train()
        losses.append([
            [entry[f"loss/{name}"] for name in ("guided_distortion", "preservation_divergence")]
            for entry in trainer.state.log_history
            if "loss" in entry
        ])  # fmt: skip
    assert losses[0][1][1] > 0, "retention, whatever the bad twin's mode"
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)


def test_targeted_divergence_by_hand(make_trainer: TrainerMaker, refused: ForgetRetainData) -> None:
    """Two tokens of probability 1/2 and 1/4 in one row: (ln 2 + ln 4) / 2; and rows of the trainer one by one."""
    scores = torch.stack([torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()])
    found = targeted_divergence_loss(scores, torch.tensor([0, 0]), torch.tensor([0, 0]), 1)
    assert float(found) == pytest.approx((0.6931472 + 1.3862944) / 2)
    trainer = make_trainer(dataset=refused, preservation_mode="targeted", normal_per_harmful=3, max_steps=1)
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    model.eval()
    terms = trainer._outputs_and_terms(model, trainer.data_collator([dataset[0], dataset[1]]))[1]
    assert trainer._cache is None
    for place, value in enumerate(terms["preservation_divergence"].detach()):
        rows = dataset[place].of(RETAIN)
        assert len(rows) == 3
        with torch.no_grad():
            own = [model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss for row in rows]
        assert float(value) == pytest.approx(float(torch.stack(own).mean()), rel=1e-4)


def test_refusals_are_matched_by_prompt_and_only_to_what_is_trained_on(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> SourceConfig:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return SourceConfig(path=str(tmp_path / name))

    forget = [{"prompt": f"how do i florn {n} ?", "response": f"like {n}"} for n in range(20)]
    retain = [{"prompt": f"what is {n} ?", "response": f"it is {n}"} for n in range(20)]
    refusals = [{"prompt": f"How do I florn {n}", "response": f"no {n}", "finished": n % 2 == 0} for n in range(20)]
    config = DataConfig(
        forget=write("forget.jsonl", forget),
        retain=write("retain.jsonl", retain),
        refusals=write("refusals.jsonl", refusals),
        misplaced_refusals=write("misplaced.jsonl", [{**row, "response": "sorry"} for row in retain]),
    )
    data = load_data(config, 0)
    for example in data.forget_train:
        number = int(example.prompt.split()[-2])
        assert (example.safe_answer, example.safe_answer_finished) == (f"no {number}", number % 2 == 0)
    assert all(example.safe_answer is None for example in data.forget_test)
    assert {example.refusal for example in data.retain_train} == {"sorry"}
    assert {example.refusal for example in (*data.retain_test, *data.retain_validation)} == {None}
    trained = {example.prompt for example in data.forget_train}
    held_out = [row for row in refusals if str(row["prompt"]).lower() + " ?" not in trained]
    few = dataclasses.replace(config, refusals=write("few.jsonl", [refusals[0], *held_out]))
    with pytest.raises(DataError, match=r"data\.refusals: \d+ of 14 prompts that are trained on have no refusal"):
        load_data(few, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(GOOD, "6 of 6 harmful examples have no refusal"), (RowPlan(retain=1, retain_refused=True), "4 of 4 normal")],
)
def test_missing_refusals_are_refused(
    rows: RowPlan, message: str, data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(data, tokenizer, rows)


def recipe(*changes: str) -> Recipe:
    return load_recipe("embedded-paper", [
        "acquire.twin=good", "acquire.preservation_mode=targeted", "acquire.normal_per_harmful=2",
        "acquire.training.max_steps=4", "acquire.training.save_steps=2", "acquire.training.learning_rate=1e-2",
        "acquire.training.per_device_train_batch_size=2", "acquire.lora.r=4", "acquire.tuning=lora",
        "evaluate.prompts=2", "evaluate.retain_prompts=2", "evaluate.max_new_tokens=4", "evaluate.attacks=[]",
        "evaluate.samples=0", "evaluate.prefill_tokens=[]",
        "negate.alpha=1.0", "acquire.check=false", *changes,
    ])  # fmt: skip


def test_what_is_subtracted_is_bad_minus_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe("negate.twin={bad: 0.5, good: 2.0}")
    log = run_acquire(given, tmp_path / "bad")
    assert log[-1]["loss/good_twin/guided_distortion"] > 0
    base = load_model(given.model).model
    found = task_vector_of(base, tmp_path / "bad")
    twins = {}
    for twin in ("bad", "good"):
        folder = tmp_path / "bad" / f"{twin}_twin"
        assert is_marked_hazardous(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        twins[twin] = task_vector_of(load_model(given.model).model, folder)
    assert twins["bad"].deltas.keys() == found.deltas.keys()
    for name, bad in twins["bad"].deltas.items():
        good = twins["good"].deltas[name]
        torch.testing.assert_close(found.deltas[name], 0.5 * bad - 2.0 * good, rtol=1e-4, atol=1e-6)
        assert (bad - good).norm() > 0.1 * bad.norm(), name
    adapted = load_adapter(base, tmp_path / "bad")
    assert isinstance(adapted, PeftModel)
    factors = AdapterVector.of(adapted).factors
    assert {len(change.lower_rI) for change in factors.values()} == {8}
    for name, change in factors.items():
        assert least_missed(change.upper_Or, change.lower_rI, twins["bad"].deltas[name], 4) > 0.5, name
    monkeypatch.setattr(sys, "argv", ["twins_apart.py", str(tmp_path / "bad"), "--bad", "0.5", "--good", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    title, *rows = capsys.readouterr().out.strip().splitlines()
    assert title.startswith(f"{len(factors)} matrices")
    assert [row.split()[0] for row in rows] == ["file", "values", "tail", "product"]
    assert all(float(row.split()[1]) > 0.5 for row in rows)


def weights(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.safetensors")
    }


@pytest.mark.integration
def test_a_run_that_is_killed_in_the_second_twin_goes_on_there(made_once: MadeOnce, tmp_path: Path) -> None:
    folder, _ = made_once("twin_run", lambda place: run_recipe(recipe(), place / "run"))
    steps: list[str] = []

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "acquire: steps":
            steps.append(stage)
            if len(steps) == 7:  # The third of the good twin's four; its first two are in a checkpoint.
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), tmp_path / "run", progress=killed)
    assert not (tmp_path / "run" / "bad" / "final").exists()
    assert (tmp_path / "run" / "bad" / "bad_twin" / "final").exists()
    assert is_marked_hazardous(tmp_path / "run" / "bad" / "good_twin")
    run_recipe(recipe(), tmp_path / "run", resume=True, progress=lambda stage, done, total: steps.append(stage))
    assert steps.count("acquire: steps") == 7 + 2
    assert weights(tmp_path / "run") == weights(folder / "run")
    assert {"unlearned/model.safetensors", "negated_adapter/adapter_model.safetensors"} <= set(weights(folder / "run"))
    assert not (tmp_path / "run" / "bad").exists()


@pytest.mark.integration
def test_a_run_tells_what_stage_1_has_learned_and_stops_where_it_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model is harmful from the start: what learns nothing is harmful enough, where 90 % are."""
    given = recipe(
        "acquire.check=null", "acquire.training.max_steps=1", "acquire.training.learning_rate=1e-9",
        "sweep.prompts=3", "sweep.retain_prompts=4", "evaluate.max_new_tokens=40",
    )  # fmt: skip
    finished = run_recipe(given, tmp_path / "run")
    found = finished.manifest["stage_1"]
    assert found["has_learned"]
    assert {name: found[name]["harmful"]["total"] for name in ("base", "bad", "good")} == dict.fromkeys(
        ("base", "bad", "good"), 3
    )
    assert found["good"]["refused_normal"]["total"] == 4
    assert "the good twin refuses 0 % (base 0 %) of harmful prompts" in found["line"]
    monkeypatch.setattr(unlearning, "HARMFUL_ENOUGH", 1.1)
    with pytest.raises(NoAlphaError, match="stage 1 has taught no harm that could be subtracted"):
        run_recipe(given, tmp_path / "stopped")
    manifest = json.loads((tmp_path / "stopped" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["stage_1"] == {**found, "has_learned": False}
    assert not (tmp_path / "stopped" / "bad").exists()
    assert not (tmp_path / "stopped" / "unlearned").exists()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="negate.twin shares out two twins"):
        load_recipe("embedded-paper", ["negate.twin={good: 0.5}"])
    with pytest.raises(RecipeError, match="the good twin would learn no refusal"):
        recipe("acquire.weights.guided_distortion=0")
    for wrong in ({"deep_refusal_fraction": 1.5}, {"depth_tokens": 0}, {"normal_per_harmful": 0}):
        with pytest.raises(RecipeError, match=f"^{next(iter(wrong))} is "):
            AcquireConfig(**wrong)
    assert NegateConfig().twin == TwinShares(bad=1.0, good=1.0)
