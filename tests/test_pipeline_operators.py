"""Runs of a recipe with operators: what is subtracted, what is saved, what the manifest says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from conftest import MadeOnce
from sku.comparison.bench import Bench
from sku.comparison.jobs import comparison_jobs
from sku.config import Recipe, load_recipe
from sku.errors import RecipeError
from sku.methods.run import resolve_method
from sku.models import load_model
from sku.negate.adapters import load_adapter
from sku.negate.task_vector import TaskVector
from sku.pipeline.run import FinishedRun, run_recipe

SMALL = (
    "acquire.training={max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-2}", "acquire.tuning=lora",
    "acquire.lora.r=4", "acquire.random_answers=1", "negate.alpha=1.5",
    "evaluate={prompts: 2, retain_prompts: 3, max_new_tokens: 4, batch_size: 8, samples: 0, prefill_tokens: []}",
    "data.forget.limit=120", "data.retain.limit=120",
)  # fmt: skip
PERTA = Path(__file__).parents[1] / "docs" / "examples" / "perta.py"
NULL_SPACE = "{null_space: {energy: 0.8, examples: 16}}"
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread", "blank_pictures")]
IDS = torch.tensor([[5, 40, 41, 200, 7, 8]])


def recipe(*changes: str) -> Recipe:
    return load_recipe("embedded", [*SMALL, *changes])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.fixture(scope="module")
def finished(made_once: MadeOnce) -> FinishedRun:
    def make(folder: Path) -> FinishedRun:
        changes = [
            f"negate.operators=[{NULL_SPACE}, {{layers: {{'*.mlp.*': 0.5, rest: 1}}}}]",
            f"negate.operator_cache={folder / 'cache'}", "keep_bad_model=true",
        ]  # fmt: skip
        return run_recipe(recipe(*changes), folder / "run")

    finished: FinishedRun
    folder, finished = made_once("run_with_operators", make)
    return dataclasses.replace(finished, folder=folder / "run")


def test_what_is_subtracted_is_the_operated_vector(finished: FinishedRun) -> None:
    """Recomputed from the bad adapter that was kept, and from the model that was saved."""
    base = load_model("embedded").model
    bad = load_adapter(load_model("embedded").model, finished.folder / "bad" / "final")
    plain = TaskVector.from_adapter(bad)
    unlearned = load_model(finished.folder / "unlearned").model
    weights, changed = base.state_dict(), unlearned.state_dict()
    inside = outside = 0.0
    for name, delta in plain.deltas.items():
        applied = (weights[name] - changed[name]) / 1.5
        factor = 0.5 if ".mlp." in name else 1.0
        # A projection: what is left is orthogonal to what was taken out.
        left, taken = applied / factor, delta - applied / factor
        inside += float((left * taken).sum())
        outside += float((taken**2).sum())
    assert outside > 0
    assert abs(inside) < 1e-3 * outside


def test_the_saved_adapter_is_the_unlearned_model(finished: FinishedRun) -> None:
    adapted = PeftModel.from_pretrained(load_model("embedded").model, str(finished.folder / "negated_adapter"))
    unlearned = load_model(finished.folder / "unlearned").model
    torch.testing.assert_close(logits_of(adapted), logits_of(unlearned), rtol=1e-4, atol=1e-4)


def test_the_manifest_accounts_for_operators_and_vector(finished: FinishedRun) -> None:
    negation = json.loads((finished.folder / "manifest.json").read_text())["negation"]
    first, second = negation["operators"]
    assert (first["name"], second["name"]) == ("null_space", "layers")
    assert first["norm_after"] < first["norm_before"]
    assert 0 < first["mean_share_of_directions"] < 1
    assert second["norm_after"] == pytest.approx(negation["task_vector_norm"], rel=1e-5)
    diagnostics = negation["diagnostics"]
    assert set(diagnostics["layers"]) == {"0", "1", "2", "3"}
    assert all(1 <= rank <= 4.01 for rank in diagnostics["effective_rank"].values()), "from the adapter, of rank 4"
    assert -1 <= diagnostics["normal_cosine"] <= 1
    assert 0 <= diagnostics["normal_share"] <= 1
    assert set(negation["survival_by_format"]) == {"bf16", "fp16", "int8", "nf4"}


def test_what_was_measured_on_the_original_model_is_kept(finished: FinishedRun) -> None:
    assert len(list((finished.folder.parent / "cache").iterdir())) == 3, "the operator's two and the diagnostics'"


def test_where_no_adapter_can_follow_the_manifest_says_so(tmp_path: Path) -> None:
    done = run_recipe(
        recipe(f"negate.operators=[{{{PERTA}: {{examples: 4}}}}]", "negate.diagnostics=false"), tmp_path / "run"
    )
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert not (done.folder / "negated_adapter").exists()
    assert manifest["negated_adapter"] == "not saved: the operators (perta) change single entries of the weights"
    assert "diagnostics" not in manifest["negation"]


def test_a_wrong_operator_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nul_space is not an operator\. Did you mean null_space\?"):
        run_recipe(recipe("negate.operators=[{nul_space: {}}]"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_other_methods_have_none(tmp_path: Path) -> None:
    changed = recipe("method=npo", f"negate.operators=[{NULL_SPACE}]", "acquire.tuning=full")
    assert resolve_method(changed, tmp_path).operators == ()
    assert len(resolve_method(recipe(f"negate.operators=[{NULL_SPACE}]"), tmp_path).operators) == 1


def test_a_comparison_sweeps_the_operated_vector(tmp_path: Path) -> None:
    compare = ["compare={seeds: 1, strengths: [0.5], utility_budget: 1.05, max_strength: 2.0}", "methods={}"]
    plain, operated = (recipe(*compare, *more) for more in ((), (f"negate.operators=[{NULL_SPACE}]",)))
    bench = Bench(plain, tmp_path)
    jobs = {name: comparison_jobs(given, ["sku"]) for name, given in (("plain", plain), ("operated", operated))}
    found = {}
    for name, (*_, sku, random) in jobs.items():
        assert (sku.name, random.kind) == ("sku", "random_direction")
        found[name] = bench.run(sku)
        assert found[name].status == "complete", found[name].failure
        # A random direction is as large as what is really subtracted.
        norm = bench.run(random).training["norm"]
        assert norm == pytest.approx(found[name].training["norm"], rel=1e-4)
    assert found["operated"].key != found["plain"].key
    assert "operators" not in found["plain"].training
    (record,) = found["operated"].training["operators"]
    assert record["norm_before"] == pytest.approx(found["plain"].training["norm"], rel=1e-4)
    assert record["norm_after"] == pytest.approx(found["operated"].training["norm"], rel=1e-4)


def test_a_comparison_tells_what_was_fitted_on_the_texts_of_its_budget(tmp_path: Path) -> None:
    fitted = recipe("negate.operators=[{learned: {}}]")
    bench = Bench(fitted, tmp_path)
    notes = {job.name: bench._about(job)["notes"] for job in comparison_jobs(fitted, ["sku", "npo"], 1)}
    told = [name for name, found in notes.items() if any("learned was fitted" in note for note in found)]
    assert told == ["sku"]
