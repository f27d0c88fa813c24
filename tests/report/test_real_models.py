"""The table of all models, from invented records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sku.errors import EvaluationError
from sku.report.real_models import FIGURES, KEYS, run_row, table_rows

RELEARN = "relearn_half_steps"


def rate(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "total": total, "value": count / total, "low": 0.0, "high": 1.0}


def harm(count: int, total: int, unjudged: int = 0) -> dict[str, Any]:
    """The judge alone calls three more harmful."""
    return {
        "harmful": rate(count, total),
        "harmful_ungated": rate(count + 3, total),
        "unjudged": rate(unjudged, total),
    }


def evaluation(harmful: int, *, lm_eval: bool = True, other: bool = True) -> dict[str, Any]:
    replies = {
        "forget_train": harm(9, 10),
        "forget_test": harm(harmful, 200),
        "xstest_unsafe": harm(7, 10),
        "xstest_safe": {"over_refusal": rate(4, 50), "gibberish": rate(9, 50)},
        "retain_test": {"over_refusal": rate(1, 100), "gibberish": rate(2, 100)},
    }
    if other:
        # Of two other sources together: 3 of 40.
        replies |= {"harmful:a": harm(1, 30), "harmful:b": harm(2, 10)}
    tasks = {
        name: {"version": "1", "shots": 0, "samples": 9, "metrics": metrics}
        for name, metrics in (
            ("arc_easy", {"acc,none": 0.5, "acc_norm,none": 0.4, "acc_stderr,none": 9.0}),
            ("piqa", {"acc,none": 0.6}),
            ("part_of_a_group", {"acc,none": 0.9}),
        )
    }
    harness = {"harness": "0.4", "limit": None, "asked": ["arc_easy", "piqa"], "tasks": tasks}
    return {
        "replies": replies,
        "prefill": {"forget_test": {"1": harm(3, 20), "5": harm(5, 20)}, "forget_train": {}},
        "agreement": {"retain_test": {"kl": 0.03}},
        "replies_by_category": {},
        "lm_eval": harness if lm_eval else None,
    }


def results(transform: str | None = None, **acquire: Any) -> dict[str, Any]:
    recipe = {
        "model": {"path": "hub/Small-1B"}, "method": "sku", "seed": 3, "acquire": {"seed": None, **acquire},
        "negate": {"transform": transform},
    }  # fmt: skip
    base = {**evaluation(40), "agreement": {}}
    manifest = {"recipe": recipe, "recipe_sha256": "0", "environment": {"cpu": "c"}}
    found = paired({"manifest": manifest, "unlearned": evaluation(4), "base": base})
    return {**found, "verdict": {"line": "unlearned: so"}, "leak": {}, "perplexity": {}}


def paired(content: dict[str, Any]) -> dict[str, Any]:
    """With the changes that a run writes beside both evaluations."""

    def changes(base: Any, unlearned: Any) -> Any:
        if "count" in unlearned:
            return {"before": base, "after": unlearned}
        return {key: changes(base[key], found) for key, found in unlearned.items()}

    sides = content["base"], content["unlearned"]
    replies = changes(*(side["replies"] for side in sides))
    normal = {split: rates for split, rates in replies.items() if split in ("retain_test", "xstest_safe")}
    return {
        **content, "replies": replies, "normal": normal,
        "prefill_by_key": changes(*(side["prefill"] for side in sides)),
    }  # fmt: skip


def test_a_run_gives_every_figure_and_those_of_its_base() -> None:
    row = run_row(results())
    beside = ["intervals", "recipe_sha256", "environment"]
    assert list(row) == [*KEYS, *(f"base_{name}" for name in FIGURES), *beside]
    assert row["intervals"]["harmful_unseen"] == [0.0, 1.0]
    assert {name: row[name] for name in KEYS if row[name] is not None} == {
        "model": "Small-1B", "method": "sku", "seed": 3, "verdict": "unlearned: so", "n": 200, "harmful_unseen": 0.02,
        "harmful_other_source": 3 / 40, "worst_prefill": 0.25, "xstest_safe_refused": 0.08, "normal_refused": 0.01,
        "gibberish": 0.02, "kl_normal": 0.03, "utility_accuracy": 0.5, "xstest_unsafe": 0.7,
        "xstest_unsafe_judge": 1.0, "harmful_unseen_judge": 7 / 200, "harmful_other_source_judge": 9 / 40,
        "worst_prefill_judge": 8 / 20,
    }  # fmt: skip
    assert (row["base_harmful_unseen"], row["base_kl_normal"]) == (0.2, 0.0)


def test_figures_are_of_the_prompts_with_a_verdict_for_both_models() -> None:
    """Those of the comparison, not of either evaluation, in which 10 of 30 replies have none."""
    found = results()
    for name in ("unlearned", "base"):
        found[name]["replies"]["harmful:a"] = harm(1, 30, unjudged=10)
    found["replies"]["harmful:a"] = {"harmful": {"before": rate(6, 18), "after": rate(1, 18)}}
    row = run_row(found)
    assert (row["harmful_other_source"], row["base_harmful_other_source"]) == (3 / 28, 8 / 28)


def test_twins_are_a_method_of_their_own_and_the_seed_is_that_of_the_training() -> None:
    found = results(twin="good", seed=8)
    found["manifest"]["recipe"]["negate"]["twin"] = {"good": 1.1, "bad": 0.08}
    row = run_row(found)
    assert (row["method"], row["seed"]) == ("twins (1.1 good - 0.08 bad)", 8)
    found["manifest"]["recipe"]["negate"]["twin"]["bad"] = 0.0
    assert run_row(found)["method"] == "good twin alone (1.1)"
    assert run_row(results("docs/examples/random_direction.py"))["method"] == "sku+random_direction"


def test_what_was_not_measured_is_null() -> None:
    content = results()
    content["unlearned"] = {**evaluation(4, lm_eval=False, other=False), "prefill": {}, "agreement": {}}
    row = run_row(paired(content))
    missing = {"harmful_other_source", "worst_prefill", "kl_normal", "utility_accuracy", "borderline_refused"}
    assert all(row[name] is None for name in (*missing, "harmful_final", "sampled_any4", "perplexity_ratio", RELEARN))
    assert row["base_kl_normal"] is None
    with pytest.raises(EvaluationError, match="not that of a finished run"):
        run_row({"manifest": {}})


def test_a_model_method_and_seed_stand_in_the_table_once(tmp_path: Path) -> None:
    first, again = tmp_path / "run", tmp_path / "again"
    content = results()
    for folder in (first, again):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(EvaluationError, match="both hold sku on Small-1B with seed 3"):
        table_rows([first, again])
    content["manifest"]["recipe"] |= {"method": "npo", "seed": 0}
    (again / "results.json").write_text(json.dumps(content), encoding="utf-8")
    assert [(row["method"], row["seed"]) for row in table_rows([first, again])] == [("npo", 0), ("sku", 3)]
    with pytest.raises(EvaluationError):
        table_rows([tmp_path])


def test_attacks_give_the_worst_template_and_the_cost_of_relearning() -> None:
    content = results()

    def subject(*shares: int) -> dict[str, Any]:
        return {"variants": {str(share): rate(share, 10) for share in shares}}

    lines = [{"model": {"half_steps": steps}} for steps in (None, 32)]
    content["attacks"] = {
        "results": [{"attack": "template", "model": subject(1, 5, 2), "control": subject(9)}],
        "relearn": {"results": lines, "steps": [4, 256]},
    }  # fmt: skip
    row = run_row(content)
    assert (row["worst_template"], row["base_worst_template"], row[RELEARN]) == (0.5, 0.9, 32)
    assert row[f"base_{RELEARN}"] is None
    content["attacks"]["relearn"]["results"] = lines[:1]
    assert run_row(content)[RELEARN] == "> 256"
