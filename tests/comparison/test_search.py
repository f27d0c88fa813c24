"""The small search: what it trains, what it chooses, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comparison.conftest import SMALL
from sku.comparison import bench as bench_module
from sku.comparison.jobs import comparison_jobs
from sku.comparison.run import RECORDS, run_comparison
from sku.comparison.search import Trial, best_of, search, search_judge, with_training
from sku.config import Recipe, SearchConfig, load_recipe
from sku.data.load import load_data
from sku.errors import EvaluationError, RecipeError
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.methods.run import resolve_method, train_method

SEARCHED = (
    *SMALL,
    "compare.strengths=[]",
    "compare.max_strength=0.5",
    "compare.search={learning_rate: [1.0e-3, 1.0e-4], max_steps: [1]}",
    "sweep={prompts: 3, retain_prompts: 3, max_new_tokens: 4, prefill_tokens: [3]}",
)


def trial(rate: float, free: float, prefill: float = 0.0, **changes: Any) -> Trial:
    return Trial(learning_rate=rate, max_steps=1, left={"free": free, "3": prefill}, **changes)


def test_the_least_that_is_left_wins_and_of_equals_the_gentlest() -> None:
    """By the worst kind of reply, then by the mean of all kinds, then by the order of the trainings."""
    assert best_of([trial(1.0, 0.1, 0.6), trial(2.0, 0.5, 0.5), trial(3.0, 0.5, 0.4)]).learning_rate == 3.0
    assert best_of([trial(1.0, 0.2, 0.2), trial(2.0, 0.2, 0.2)]).learning_rate == 1.0
    failed = Trial(learning_rate=1.0, max_steps=1, failure="loss is nan")
    assert best_of([failed, trial(2.0, 1.0)]).learning_rate == 2.0
    with pytest.raises(EvaluationError, match="none of the 1 trainings .*; the first: loss is nan"):
        best_of([failed])


def test_the_points_are_all_pairs_the_gentlest_first() -> None:
    assert len(SearchConfig().points) == 6
    assert SearchConfig(learning_rate=(2.0, 1.0, 2.0), max_steps=(9, 3)).points == [(1, 3), (2, 3), (1, 9), (2, 9)]
    with pytest.raises(RecipeError, match=r"compare\.search\.max_steps\[0\] is 0"):
        load_recipe("embedded", ["compare.search.max_steps=[0]"])
    assert load_recipe("embedded", ["compare.search={}"]).compare.search == SearchConfig()


@pytest.mark.parametrize("method", ["sku", "npo", "rmu"])
def test_the_settings_reach_the_training_of_their_method_alone(method: str) -> None:
    """RMU has a rate of its own in the recipe."""
    recipe = load_recipe("embedded", [f"method={method}"])
    changed = with_training(recipe, 0.5, 7)
    training = resolve_method(changed, Path("unused")).training
    assert (training.learning_rate, training.max_steps) == (0.5, 7)
    other = dataclasses.replace(changed, method="dpo")
    if method != "sku":
        assert resolve_method(other, Path("unused")).training.max_steps == 150


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Killed in the third of four trainings; of the second call two are taken over, of another key none."""
    recipe = load_recipe("embedded", ["compare.search={learning_rate: [1.0, 2.0], max_steps: [1, 2]}"])
    path, trained = tmp_path / "sku--search.json", list[tuple[float, int]]()

    def measure(own: Recipe) -> Trial:
        training = own.acquire.training
        trained.append((training["learning_rate"], training["max_steps"]))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return Trial(learning_rate=trained[-1][0], max_steps=trained[-1][1], left={"free": 0.5})

    with pytest.raises(KeyboardInterrupt):
        search(recipe, path, "key", measure, lambda *_: None)
    trials, chosen = search(recipe, path, "key", measure, lambda *_: None)
    assert trained == [(1, 1), (2, 1), (1, 2), (1, 2), (2, 2)]
    assert [trial.max_steps for trial in trials] == [1, 1, 2, 2]
    assert chosen == trials[0]
    assert search(recipe, path, "other", measure, lambda *_: None)[0] == trials
    assert len(trained) == 9


@pytest.mark.integration
def test_a_comparison_searches_once_and_takes_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds: one search of two trainings, with the first seed, then one training a seed."""
    trained: list[tuple[float, int | None]] = []

    def train(recipe: Recipe, *args: Any) -> Any:
        training = resolve_method(recipe, Path("unused")).training
        trained.append((training.learning_rate, recipe.acquire.seed))
        return train_method(recipe, *args)

    monkeypatch.setattr(bench_module, "train_method", train)
    recipe = load_recipe("embedded", SEARCHED)
    jobs = [job for job in comparison_jobs(recipe, ["fine_tune"], seeds=2) if job.name == "fine_tune"]
    records = run_comparison(jobs, tmp_path / "out", isolate=False).records
    assert [record.failure for record in records] == [None, None]
    account = records[0].training["search"]
    chosen = account["chosen"]["learning_rate"]
    assert trained == [(1e-4, 0), (1e-3, 0), (chosen, 0), (chosen, 1)]
    assert [entry["learning_rate"] for entry in account["trials"]] == [1e-4, 1e-3]
    assert {*account["chosen"]["left"]} == {"free", "3"}
    for record in records:
        assert record.recipe["methods"]["fine_tune"]["training"] == {"learning_rate": chosen, "max_steps": 1}
        assert record.training["steps"] == 1
    file = json.loads((tmp_path / "out" / RECORDS / "fine_tune--search.json").read_text(encoding="utf-8"))
    assert file["trials"] == account["trials"]
    again = run_comparison(jobs, tmp_path / "out", isolate=False)
    assert (again.reused, len(trained)) == (2, 4)


def test_a_judge_of_unknown_errors_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("embedded", [*SEARCHED, "evaluate.judge=refusal_rules"])
    data = load_data(recipe.data, recipe.seed, forget_validation=recipe.search_validation)
    assert search_judge(recipe, data).card.calibration is not None
    uncalibrated = dataclasses.replace(RefusalRulesJudge().card, calibration=None)
    monkeypatch.setattr("sku.comparison.search.choose_judge", lambda *_: SimpleNamespace(card=uncalibrated))
    with pytest.raises(EvaluationError, match=r"compare\.search can't choose by the judge refusal_rules"):
        search_judge(recipe, data)
