"""Tables of the documentation are those of the records that lie in ``results/``."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sku import load_recipe
from sku.report.real_models import FIGURES, KEYS

ROOT = Path(__file__).resolve().parent.parent


def test_recipes_that_were_measured_are_read_as_written() -> None:
    measured = load_recipe(ROOT / "results" / "smollm2-135m-twins.yaml")
    shipped = load_recipe("smollm2-135m-twins")
    for name in (
        "twin",
        "weights",
        "preservation_mode",
        "deep_refusal_fraction",
        "depth_tokens",
        "normal_per_harmful",
        "lora",
    ):
        assert getattr(measured.acquire, name) == getattr(shipped.acquire, name), name
    assert measured.negate.twin == shipped.negate.twin
    steps = {"max_steps", "learning_rate", "per_device_train_batch_size"}
    assert {key: measured.acquire.training[key] for key in steps} == {
        key: shipped.acquire.training[key] for key in steps
    }


def test_the_other_methods_were_asked_what_the_twins_were() -> None:
    twins, others = (load_recipe(ROOT / "results" / f"smollm2-135m-{name}.yaml") for name in ("twins", "methods"))
    assert others.evaluate == twins.evaluate
    assert others.model == twins.model
    assert others.data == dataclasses.replace(twins.data, misplaced_refusals=None)
    for key in ("max_steps", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps"):
        assert others.acquire.training[key] == twins.acquire.training[key]
    assert (others.acquire.tuning, others.acquire.lora) == (twins.acquire.tuning, twins.acquire.lora)


def test_real_models_are_described_as_the_issue_of_them_says() -> None:
    """One object a model, method and seed; rates between 0 and 1; the base's figures beside them."""
    rows = json.loads((ROOT / "results" / "real_models.json").read_text(encoding="utf-8"))
    assert len({(row["model"], row["method"], row["seed"]) for row in rows}) == len(rows)
    for row in rows:
        assert {*KEYS, *(f"base_{name}" for name in FIGURES), "intervals", "outcomes", "recipe_sha256"} <= row.keys()
        no_rates = ("n", "kl_normal", "perplexity_ratio", "relearn_half_steps")
        rates = [row[f"{side}{name}"] for side in ("", "base_") for name in FIGURES if name not in no_rates]
        assert all(rate is None or 0 <= rate <= 1 for rate in rates)


def test_the_page_shows_all_rows_of_real_models() -> None:
    done = subprocess.run([sys.executable, "scripts/real_models_table.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run: python scripts/real_models_table.py"


def test_the_table_refuses_rows_whose_bases_differ() -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "real_models_table.py"))["table"]
    row = {"model": "m", "method": "a", "seed": 0, "verdict": "unlearned: so", **dict.fromkeys(FIGURES)}
    row |= {f"base_{name}": 0.5 for name in FIGURES} | {"harmful_unseen": 0.1, "harmful_unseen_judge": 0.2}
    assert "| a | \u2013 | 20 % (10) |" in table([row, {**row, "method": "b"}])
    with pytest.raises(SystemExit, match="the base of b differs from that of a in harmful_final"):
        table([row, {**row, "method": "b", "base_harmful_final": 0.6}])


def test_the_readme_shows_what_was_recorded() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    recorded = json.loads((ROOT / "results" / "embedded.json").read_text(encoding="utf-8"))
    unseen, normal = recorded["replies"]["forget_test"], recorded["normal"]["retain_test"]
    for words, change in (
        ("harmful, unseen prompts", unseen["harmful_ungated"]),
        ("harmful after the worst prefill of 1/3/5/10 tokens", recorded["prefill"]["forget_test"]["harmful_ungated"]),
        ("refused, normal prompts", normal["over_refusal"]),
        ("exact answers, normal prompts", normal["exact_answer"]),
    ):
        before, after = (f"{100 * change[side]['value']:.3g} %" for side in ("before", "after"))
        assert f"| {words} | {before} | {after} |" in page
