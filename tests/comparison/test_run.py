"""Whole small comparisons on the embedded world: failures, reuse, and agreement with a single run."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
from sku.comparison.bench import Bench
from sku.comparison.jobs import Job, ablation_jobs, comparison_jobs
from sku.pipeline.compare import write_comparison

from comparison.conftest import FAILING_METHOD, SMALL
from conftest import MadeOnce
from sku.comparison import bench as bench_module
from sku.comparison.run import RECORDS, WORK, FinishedComparison, run_comparison
from sku.config import Recipe, load_recipe
from sku.errors import EvaluationError, OutputError, RecipeError, SkuError
from sku.evaluate.validation import Refusals
from sku.methods.run import train_method
from sku.pipeline.run import run_recipe
from sku.report.method_records import MethodRecord, read_records
from sku.storage import write_json

pytestmark = pytest.mark.integration


def records_of(finished: FinishedComparison) -> dict[str, MethodRecord]:
    return {record.name: record for record in finished.records}


@pytest.fixture(scope="module")
def finished(small_recipe: Recipe, made_once: MadeOnce) -> FinishedComparison:
    """FT, SKU, a method whose loss is NaN and one that the data can't serve, with all controls."""

    def make(folder: Path) -> FinishedComparison:
        broken = folder / "broken.py"
        broken.write_text(FAILING_METHOD, encoding="utf-8")
        jobs = comparison_jobs(small_recipe, ["sku", "fine_tune", str(broken)])
        return run_comparison(jobs, folder / "out", isolate=False)

    finished: FinishedComparison
    folder, finished = made_once("comparison", make)
    return dataclasses.replace(finished, folder=folder / "out")


def test_one_method_that_fails_leaves_the_others(finished: FinishedComparison) -> None:
    records = records_of(finished)
    assert {name for name, record in records.items() if record.status == "failed"} == {"broken"}
    failure = records["broken"].failure
    assert failure is not None
    assert "loss term broken is nan at step 1" in failure
    assert list(records) == [
        "base", "always_refuse", "always_gibberish", "sku", "fine_tune", "broken", "random_direction",
    ]  # fmt: skip


def test_the_table_says_which_failed_and_why(finished: FinishedComparison, tmp_path: Path) -> None:
    files = write_comparison(finished.records, tmp_path, budget=1.05)
    text = files[0].read_text(encoding="utf-8")
    assert "loss term broken is nan" in text
    assert "0/1 failed" in text
    assert [path.name for path in files] == [
        "table.md", "overview.png", "overview.svg", "trade_off.png", "trade_off.svg",
    ]  # fmt: skip


def test_records_hold_what_a_reader_needs_to_repeat_them(finished: FinishedComparison) -> None:
    record = records_of(finished)["sku"]
    assert record.recipe["acquire"]["seed"] == record.seed == 0
    assert record.environment["packages"]["torch"]
    assert [source["sha256"] for source in record.data["sources"]]
    assert record.training["steps"] == 2
    assert {"loss/guided_distortion", "loss/random_disassociation"} <= set(record.training["losses"])
    roles = {role for point in record.points for role in point.roles}
    assert roles == {"sweep", "published", "matched"}
    matched = next(point for point in record.points if "matched" in point.roles)
    assert matched.utility is not None
    assert matched.utility.cost.within
    assert list(matched.utility.perplexity) == list(matched.utility.kl) == ["retain_validation"]
    assert matched.utility.kl["retain_validation"] <= 0.05
    assert matched.utility.over_refusal is not None, "it is asked where the rest is within the budget"
    assert "bound_by" in record.training
    (base,) = records_of(finished)["base"].points
    assert base.utility is not None
    assert base.utility.cost.value == 0
    (control,) = records_of(finished)["always_refuse"].points
    assert control.utility is None


def test_no_word_of_any_prompt_or_reply_is_written(finished: FinishedComparison) -> None:
    """Records may be published: of the harmful world's text nothing is in them."""
    for path in (finished.folder / RECORDS).iterdir():
        text = path.read_text(encoding="utf-8")
        assert "vornite" not in text
        assert "take " not in text


def test_hazardous_checkpoints_are_gone(finished: FinishedComparison) -> None:
    assert [path.name for path in finished.folder.iterdir()] == [RECORDS]


def test_a_second_call_reuses_what_stands_and_tries_again_what_failed(
    finished: FinishedComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a copy: what is tried again is written again, and other tests read the records.
    folder = Path(shutil.copytree(finished.folder, tmp_path / "again"))
    trained: list[str] = []
    real = train_method

    def train(recipe: Recipe, *args: object) -> object:
        trained.append(recipe.method)
        return real(recipe, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_module, "train_method", train)
    recipe = load_recipe("embedded", SMALL)
    broken = str(finished.folder.parent / "broken.py")
    again = run_comparison(comparison_jobs(recipe, ["sku", "fine_tune", broken]), folder, isolate=False)
    assert again.reused == 6
    assert trained == [broken]
    assert [record.to_dict() for record in again.records if record.name != "broken"] == [
        record.to_dict() for record in finished.records if record.name != "broken"
    ]


def test_records_are_read_as_they_were_written(finished: FinishedComparison) -> None:
    """Losses are rounded to four decimals on the way; the rest is equal."""
    read = {record.name: record for record in read_records(finished.folder / RECORDS)}
    for record in finished.records:
        # Tuples of the recipe are lists in a file.
        assert read[record.name].to_dict() == json.loads(json.dumps(record.to_dict()))


@pytest.mark.usefixtures("blank_pictures")
def test_the_published_point_is_what_sku_run_measures(finished: FinishedComparison, tmp_path: Path) -> None:
    """The same recipe through ``run_recipe``: the same losses on the fixed answers, the same outcomes.

    A comparison takes alpha 1 where a run would choose one.
    """
    recipe = load_recipe("embedded", [*SMALL, "negate.alpha=1.0"])
    single = run_recipe(recipe, tmp_path / "run").comparison.unlearned
    point = next(point for point in records_of(finished)["sku"].points if "published" in point.roles)
    expected = [loss.nll for loss in sorted(single.losses, key=lambda row: row.id) if loss.split == "retain_test"]
    assert point.losses["retain_test"] == pytest.approx(expected, abs=1e-3)
    harmful = single.replies["forget_test"]["harmful"]
    assert point.outcomes["forget_test/reply"].count("h") == harmful.count


def test_what_decides_a_result_decides_the_key(small_recipe: Recipe, tmp_path: Path) -> None:
    jobs = {job.name: job for job in comparison_jobs(small_recipe, ["sku", "npo"])}
    bench = Bench(small_recipe, tmp_path)

    def key(name: str, *overrides: str) -> str:
        recipe = load_recipe("embedded", [*SMALL, *overrides])
        return bench.key(next(job for job in comparison_jobs(recipe, ["sku", "npo"]) if job.name == name))

    for name in ("sku", "npo"):
        assert key(name) == bench.key(jobs[name])
        assert key(name, "name=other", "description=other", "keep_bad_model=true", "compare.seeds=7") == key(name)
        assert key(name, "acquire.training.learning_rate=2e-4") != key(name)
        assert key(name, "evaluate.max_new_tokens=9") != key(name)
        assert key(name, "compare.strengths=[0.7]") != key(name)
    assert key("npo", "methods.npo.settings.beta=0.2") != key("npo")
    assert key("sku", "methods.npo.settings.beta=0.2") == key("sku")
    assert key("npo", "acquire.weights.guided_distortion=3", "negate.alpha=2") == key("npo")
    assert key("sku", "acquire.weights.guided_distortion=3") != key("sku")
    assert key("sku", "negate.alpha=2") != key("sku")
    assert key("base", "acquire.training.learning_rate=2e-4", "compare.strengths=[0.7]") == key("base")
    later = dataclasses.replace(jobs["npo"], seed=1)
    assert bench.key(later) != bench.key(jobs["npo"])


def test_wrong_settings_are_refused_before_anything_is_run(small_recipe: Recipe, tmp_path: Path) -> None:
    wrong = {
        "methods.npo.settings.betta=1": "methods.npo.settings.betta is not a known key. Did you mean beta",
        "methods.npo.settings.beta=-1": "beta",
        "methods.nqo.strength=1": "methods.nqo is not a method. Did you mean npo",
        "methods.sku.strength=1": "methods.sku has its own place",
        "methods.npo.training.learning_rat=1": "learning_rat is not a field",
        "methods.npo.strength=0": "strength is 0",
    }
    for override, message in wrong.items():
        with pytest.raises(RecipeError, match=message):
            run_comparison(comparison_jobs(load_recipe("embedded", [*SMALL, override]), ["npo"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_made_anew(small_recipe: Recipe, tmp_path: Path) -> None:
    jobs = comparison_jobs(small_recipe, ["fine_tune"])[:1]
    first = run_comparison(jobs, tmp_path / "out", isolate=False)
    path = tmp_path / "out" / RECORDS / "base--seed0.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    again = run_comparison(jobs, tmp_path / "out", isolate=False)
    assert again.reused == 0
    assert again.records[0].points == first.records[0].points


def test_an_ablation_runs_through_the_same_machine(small_recipe: Recipe, tmp_path: Path) -> None:
    jobs = [job for job in ablation_jobs(small_recipe, ["modules"]) if job.name in ("base", "no_guided_distortion")]
    record = run_comparison(jobs, tmp_path / "out", isolate=False).records[1]
    assert record.status == "complete"
    assert "loss/guided_distortion" not in record.training["losses"]


def test_a_strength_that_can_not_be_measured_is_noted_and_left_out(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half the strength the validation loss breaks; the published point stands all the same."""
    recipe = load_recipe("embedded", [*SMALL, "compare.max_strength=1.0"])
    job = next(job for job in comparison_jobs(recipe, ["fine_tune"]) if job.name == "fine_tune")
    real = Bench._evaluate
    calls: list[str] = []

    def evaluate(self: Bench, model: object, name: str) -> object:
        calls.append(name)
        if len(calls) == 1:
            raise EvaluationError("the loss is nan")
        return real(self, model, name)  # type: ignore[arg-type]

    bench = Bench(recipe, tmp_path)
    monkeypatch.setattr(Bench, "_evaluate", evaluate)
    record = bench.run(job)
    assert record.status == "complete"
    assert list(record.training["unmeasured"].values()) == ["the loss is nan"]
    assert {role for point in record.points for role in point.roles} >= {"published"}


def test_divergence_and_refusals_bind_where_the_perplexity_does_not(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on normal answers keeps their perplexity: at twice its strength it was within the budget."""

    def bound_by(*changes: str) -> tuple[float, str | None]:
        recipe = load_recipe("embedded", [*SMALL, "acquire.training.learning_rate=1.0e-3", *changes])
        bench = Bench(recipe, tmp_path)
        record = bench.run(job_named(comparison_jobs(recipe, ["fine_tune"]), "fine_tune"))
        assert record.status == "complete", record.failure
        matched = next(point for point in record.points if "matched" in point.roles)
        return matched.strength, record.training["bound_by"]

    wide = bound_by("compare.utility_budget=9", "compare.kl_budget=9", "compare.over_refusal_limit=0.9")
    assert wide == (2.0, None)
    strength, bound = bound_by("compare.utility_budget=9", "compare.kl_budget=1.0e-4")
    assert bound == "KL on retain_validation"
    assert strength < 2
    # A model that refuses more the stronger it is changed, by the strength that is asked about.
    asked = iter((0.3, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05))
    monkeypatch.setattr(Refusals, "excess", lambda self, model: next(asked))
    strength, bound = bound_by("compare.utility_budget=9", "compare.kl_budget=9")
    assert strength == pytest.approx(1.0)
    assert bound == "over-refusal"


def killing_method(folder: Path) -> str:
    path = folder / "killer.py"
    path.write_text(
        "import os, signal\n"
        "from dataclasses import dataclass\n"
        "from sku.data.joint import RowPlan\n"
        "from sku.methods.base import Method\n"
        "from sku.training.objective import Objective\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Settings:\n    pass\n"
        "def objective(settings, model):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "KILLER = Method(name='killer', title='Killer', paper_url='', settings=Settings, objective=objective)\n",
        encoding="utf-8",
    )
    return str(path)


def test_a_process_that_is_killed_takes_only_its_own_job_with_it(small_recipe: Recipe, tmp_path: Path) -> None:
    """As when the system runs out of memory: the next job gets a new process."""
    jobs = [
        job
        for job in comparison_jobs(small_recipe, [killing_method(tmp_path), "fine_tune"])
        if job.name in ("killer", "fine_tune")
    ]
    told: list[tuple[str, int, int]] = []
    finished = run_comparison(jobs, tmp_path / "out", progress=lambda *message: told.append(message))
    killed, fine = finished.records
    assert (killed.status, fine.status) == ("failed", "complete")
    assert killed.failure is not None
    assert "memory ran out" in killed.failure
    assert ("jobs", 2, 2) in told
    assert any(stage.startswith("fine_tune--seed0") for stage, _, _ in told), "progress of the other process"
    stored = json.loads((tmp_path / "out" / RECORDS / "killer--seed0.json").read_text(encoding="utf-8"))
    assert stored["status"] == "failed"


def test_a_folder_that_can_not_be_made(small_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(Exception, match="can't be written"):
        run_comparison(comparison_jobs(small_recipe, ["npo"]), tmp_path / "file" / "out")


@pytest.mark.parametrize("mine", [False, True])
def test_data_that_can_not_be_loaded_leave_nothing(mine: bool, tmp_path: Path) -> None:
    """Not even an empty folder, unless it was there before."""
    recipe = load_recipe(
        "embedded", [*SMALL, f"data.forget.path={tmp_path / 'missing.csv'}", "data.retain.path=none.csv"]
    )
    out = tmp_path / "out"
    if mine:
        out.mkdir()
    with pytest.raises(SkuError, match="missing.csv"):
        run_comparison(comparison_jobs(recipe, ["npo"]), out, isolate=False)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if mine else [])
    assert not mine or not list(out.iterdir())


def test_a_comparison_is_written_by_one_process_at_a_time(small_recipe: Recipe, tmp_path: Path) -> None:
    """The second one removes nothing of the first, whose records may still be to come."""
    jobs, out = comparison_jobs(small_recipe, ["npo"]), tmp_path / "out"

    def begin_again(stage: str, done: int, total: int) -> None:
        before = sorted(out.rglob("*"))
        with pytest.raises(OutputError, match="another process is writing .*out; wait until it ends"):
            run_comparison(jobs, out, isolate=False)
        assert sorted(out.rglob("*")) == before
        assert {out / RECORDS, out / WORK} < {*before}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(jobs, out, progress=begin_again, isolate=False)
    assert not out.exists()


def test_the_random_direction_is_as_large_as_the_vector_of_sku(finished: FinishedComparison) -> None:
    records = records_of(finished)
    assert math.isclose(records["random_direction"].training["norm"], records["sku"].training["norm"], rel_tol=1e-4)


def job_named(jobs: list[Job], name: str) -> Job:
    return next(job for job in jobs if job.name == name)


def test_records_of_other_data_are_refused_together(
    finished: FinishedComparison, small_recipe: Recipe, tmp_path: Path
) -> None:
    other = load_recipe("embedded", [*SMALL, "evaluate.prompts=2"])
    record = run_comparison([job_named(comparison_jobs(other), "base")], tmp_path / "o", isolate=False).records[0]
    write_json(tmp_path / "base--seed0.json", record.to_dict())
    fine = records_of(finished)["fine_tune"]
    write_json(tmp_path / fine.file_name, fine.to_dict())
    with pytest.raises(Exception, match="different prompts"):
        read_records(tmp_path)


def test_an_interrupt_ends_the_job_at_once_and_leaves_what_is_finished(small_recipe: Recipe, tmp_path: Path) -> None:
    """The first record stands; the job in progress is neither waited for nor recorded; no checkpoint stays."""
    jobs = [job for job in comparison_jobs(small_recipe, ["fine_tune"]) if job.name in ("always_refuse", "fine_tune")]

    finished: list[str] = []

    def on_record(record: MethodRecord, was_there: bool) -> None:
        finished.append(record.name)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_comparison(jobs, out, on_record=on_record)
    assert finished == ["always_refuse"]
    assert [path.name for path in (out / RECORDS).iterdir()] == ["always_refuse--seed0.json"]
    assert not (out / WORK).exists()
    assert multiprocessing.active_children() == []
