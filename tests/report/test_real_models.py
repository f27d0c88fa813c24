"""The table of all models, from the embedded world's record with other numbers in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sku.errors import EvaluationError
from sku.report.real_models import FIGURES, KEYS, run_row, table_rows

RECORD = Path(__file__).resolve().parents[2] / "results" / "embedded.json"
RELEARN = "relearn_half_steps"


def rate(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "total": total, "value": count / total, "low": 0.0, "high": 1.0}


def harm(before: int, after: int, total: int) -> dict[str, Any]:
    """The judge alone calls three more harmful."""
    return {
        name: {"before": rate(before + more, total), "after": rate(after + more, total)}
        for name, more in (("harmful", 0), ("harmful_ungated", 3))
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Without twins; with two other sources of harmful prompts, and three tasks, one of them not asked for."""
    content: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    content["manifest"]["recipe"]["acquire"]["twin"] = "none"
    normal = {name: {"before": rate(0, 100), "after": rate(2, 100)} for name in ("over_refusal", "gibberish")}
    tasks = {
        name: {"version": "1", "shots": 0, "samples": 9, "metrics": metrics}
        for name, metrics in (
            ("arc_easy", {"acc,none": 0.5, "acc_norm,none": 0.4, "acc_stderr,none": 9.0}),
            ("piqa", {"acc,none": 0.6}),
            ("part_of_a_group", {"acc,none": 0.9}),
        )
    }
    asked = {"harness": "0.4", "limit": None, "asked": ["arc_easy", "piqa"], "tasks": tasks}
    content["unlearned"] |= {"lm_eval": asked, "agreement": {"retain_test": {"kl": 0.03}}}
    return content | {
        "replies": {
            "forget_test": harm(40, 4, 200), "harmful:a": harm(6, 1, 30), "harmful:b": harm(2, 2, 10),
            "retain_test": normal,
        },
        "normal": {"retain_test": normal},
        "prefill_by_key": {"forget_test": {"1": harm(15, 3, 20), "5": harm(15, 5, 20)}},
        "leak": {}, "perplexity": {},
    }  # fmt: skip


def test_a_run_gives_every_figure_and_those_of_its_base(results: dict[str, Any]) -> None:
    row = run_row(results)
    beside = ["intervals", "recipe_sha256", "environment"]
    assert list(row) == [*KEYS, *(f"base_{name}" for name in FIGURES), *beside]
    assert row["intervals"]["harmful_unseen"] == [0.0, 1.0]
    assert {name: row[name] for name in KEYS if row[name] is not None} == {
        "model": "embedded", "method": "sku", "seed": 0, "verdict": results["verdict"]["line"], "n": 200,
        "harmful_unseen": 0.02, "harmful_unseen_judge": 7 / 200, "harmful_other_source": 3 / 40,
        "harmful_other_source_judge": 9 / 40, "worst_prefill": 0.25, "worst_prefill_judge": 8 / 20,
        "normal_refused": 0.02, "gibberish": 0.02, "kl_normal": 0.03, "utility_accuracy": 0.5,
    }  # fmt: skip
    assert (row["base_harmful_unseen"], row["base_kl_normal"]) == (0.2, 0.0)
    results["unlearned"] |= {"lm_eval": None, "agreement": {}}
    row = run_row(results)
    assert [row[name] for name in ("kl_normal", "base_kl_normal", "utility_accuracy")] == [None] * 3
    with pytest.raises(EvaluationError, match="not that of a finished run"):
        run_row({"manifest": {}})


def test_twins_are_a_method_of_their_own_and_the_seed_is_that_of_the_training(results: dict[str, Any]) -> None:
    recipe = results["manifest"]["recipe"]
    recipe["negate"] |= {"transform": "mine/null_space.py"}
    assert run_row(results)["method"] == "sku+null_space"
    recipe["acquire"] |= {"twin": "good", "seed": 8}
    recipe["negate"] = {"twin": {"good": 1.1, "bad": 0.08}}
    row = run_row(results)
    assert (row["method"], row["seed"]) == ("twins (1.1 good - 0.08 bad)", 8)
    recipe["negate"]["twin"]["bad"] = 0.0
    assert run_row(results)["method"] == "good twin alone (1.1)"


def test_a_model_method_and_seed_stand_in_the_table_once(results: dict[str, Any], tmp_path: Path) -> None:
    first, again = tmp_path / "run", tmp_path / "again"
    for folder in (first, again):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(EvaluationError, match="both hold sku on embedded with seed 0"):
        table_rows([first, again])
    results["manifest"]["recipe"] |= {"method": "npo"}
    (again / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert [row["method"] for row in table_rows([first, again])] == ["npo", "sku"]
    with pytest.raises(EvaluationError):
        table_rows([tmp_path])


def test_attacks_give_the_worst_template_and_the_cost_of_relearning(results: dict[str, Any]) -> None:
    def subject(*shares: int) -> dict[str, Any]:
        return {"variants": {str(share): rate(share, 10) for share in shares}}

    lines = [{"model": {"half_steps": steps}} for steps in (None, 32)]
    results["attacks"] = {
        "results": [{"attack": "template", "model": subject(1, 5, 2), "control": subject(9)}],
        "relearn": {"results": lines, "steps": [4, 256]},
    }  # fmt: skip
    row = run_row(results)
    assert (row["worst_template"], row["base_worst_template"], row[RELEARN]) == (0.5, 0.9, 32)
    assert row[f"base_{RELEARN}"] is None
    results["attacks"]["relearn"]["results"] = lines[:1]
    assert run_row(results)[RELEARN] == "> 256"
