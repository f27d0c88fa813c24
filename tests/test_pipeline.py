"""Whole runs on the embedded model: what a run leaves, that runs repeat, and what becomes of broken-off ones."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import stat
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from conftest import MadeOnce
from sku.config import Recipe, load_recipe
from sku.data.load import load_data
from sku.errors import ModelError, OutputError, RecipeError
from sku.evaluate.run import evaluate
from sku.methods.run import resolve_method
from sku.model_files import embedded_model_path
from sku.models import load_model
from sku.negate import streaming
from sku.negate.adapters import load_adapter
from sku.pipeline.evaluate import run_evaluation
from sku.pipeline.run import FinishedRun, run_recipe
from sku.pipeline.run_folder import RunFolder
from sku.pipeline.stages import run_acquire
from sku.processes import ALONE
from sku.storage import BAD_MODEL_MARK, is_marked_hazardous

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "acquire.training.max_steps=4", "acquire.training.save_steps=2", "acquire.training.logging_steps=1",
    "evaluate.prompts=4", "evaluate.retain_prompts=4", "evaluate.max_new_tokens=8", "evaluate.attacks=[]",
    "evaluate.samples=2", "negate.alpha=1.25",
    "acquire.training.per_device_train_batch_size=4", "evaluate.prefill_tokens=[1, 5]",
)  # fmt: skip
LORA = ("acquire.tuning=lora", "acquire.lora.r=4", "acquire.training.learning_rate=1e-2", "negate.alpha=1.0")
TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def recipe(*changes: str) -> Recipe:
    return load_recipe("embedded-paper", [*SMALL, *changes])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_equal_runs(first: Path, second: Path) -> None:
    """Weights bit for bit, results and the training log word for word; only times may differ."""
    for part in ("unlearned", "negated_adapter"):
        assert (first / part).exists() == (second / part).exists()
        if (first / part).exists():
            assert names(first / part) == names(second / part)
            for weights in (first / part).glob("*.safetensors"):
                assert digest(weights) == digest(second / part / weights.name), weights
    assert [without_times(first), log_of(first)] == [without_times(second), log_of(second)]
    assert names(first) == names(second)


def without_times(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = read(folder / "results.json")
    manifest = results.pop("manifest")
    return results | {key: manifest[key] for key in ("recipe_sha256", "data", "model", "negation", "bad_model")}


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def interrupt_at(stage: str, at: int) -> Callable[[str, int, int], None]:
    """Progress that breaks the run off the way Ctrl-C does."""

    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def embedded_before() -> dict[str, str]:
    return {path.name: digest(path) for path in embedded_model_path().iterdir()}


def once(made_once: MadeOnce, name: str, *changes: str) -> FinishedRun:
    finished: FinishedRun
    folder, finished = made_once(name, lambda place: run_recipe(recipe(*changes), place / "run"))
    return dataclasses.replace(finished, folder=folder / "run")


@pytest.fixture(scope="module")
def finished(made_once: MadeOnce, embedded_before: dict[str, str]) -> FinishedRun:
    """An uninterrupted run."""
    return once(made_once, "full_run")


@pytest.fixture(scope="module")
def finished_lora(made_once: MadeOnce, embedded_before: dict[str, str]) -> FinishedRun:
    """The same with an adapter, the bad model kept."""
    return once(made_once, "lora_run", *LORA, "keep_bad_model=true")


def test_a_run_folder_holds_what_it_promises(finished: FinishedRun) -> None:
    assert names(finished.folder) == {
        "manifest.json", "training_log.jsonl", "unlearned", "evaluation", "results.json", "before_after.png",
        "before_after.svg",
    }  # fmt: skip
    assert names(finished.folder / "evaluation") == {"base", "unlearned"}
    assert names(finished.folder / "evaluation" / "base") == {
        "generations.jsonl", "fluency.jsonl", "perplexity.jsonl", "outcomes.jsonl", "similarity.jsonl",
        "starts.jsonl", "evaluation.json",
    }  # fmt: skip
    in_base = names(finished.folder / "evaluation" / "base")
    assert names(finished.folder / "evaluation" / "unlearned") == in_base | {"agreement.jsonl"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names(finished.folder / "unlearned")
    assert names(finished.folder.parent) == {"run"}  # No unfinished folder beside it.


def test_the_trained_on_prompts_of_a_run_are_those_that_stage_1_visits(finished: FinishedRun) -> None:
    """Asked before training of the base, and after it of the unlearned model."""
    for result in (finished.comparison.base, finished.comparison.unlearned):
        assert result.setup.trained_on == {"asked": 4, "visited": 4}
    assert finished.comparison.base.setup.trained_prefill_tokens is None
    assert finished.comparison.unlearned.setup.trained_prefill_tokens == 0, "the embedded world has no good twin"
    results = json.loads((finished.folder / "results.json").read_text(encoding="utf-8"))
    assert "trained-on prompts" in {row["section"] for row in results["table"]}


def test_replies_of_the_base_are_private(finished: FinishedRun) -> None:
    assert mode(finished.folder) == 0o700
    assert mode(finished.folder / "evaluation" / "base") == 0o700
    for name in ("generations.jsonl", "starts.jsonl"):
        assert mode(finished.folder / "evaluation" / "base" / name) == 0o600


def test_the_unlearned_model_is_for_everyone_and_usable(finished: FinishedRun) -> None:
    folder = finished.folder / "unlearned"
    assert mode(folder) == 0o755
    assert not is_marked_hazardous(folder)
    loaded = load_model(folder)
    base = load_model("embedded")
    assert loaded.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == base.tokenizer.chat_template
    assert not torch.equal(weights_of(loaded.model), weights_of(base.model))


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_manifest_tells_how_the_model_was_made(finished: FinishedRun) -> None:
    manifest = read(finished.folder / "manifest.json")
    assert manifest == finished.manifest
    assert manifest["status"] == "complete"
    assert manifest["recipe"] == json.loads(json.dumps(recipe().to_dict()))
    assert len(manifest["recipe_sha256"]) == 64
    assert {"torch", "transformers", "peft", "datasets", "numpy"} <= set(manifest["environment"]["packages"])
    assert manifest["environment"]["packages"]["torch"] == torch.__version__
    assert [len(source["sha256"]) for source in manifest["data"]["sources"]] == [64, 64]
    assert manifest["data"]["splits"]["forget_train"] == manifest["tokenization"]["forget_train"]["total"]
    assert set(manifest["seconds"]) == {"load", "evaluate_base", "acquire", "negate", "evaluate_unlearned"}
    assert all(seconds >= 0 for seconds in manifest["seconds"].values())
    assert manifest["negation"]["alpha"] == 1.25
    assert manifest["negation"]["survival"] == pytest.approx(1, abs=1e-5)
    assert manifest["training"]["steps"] == 4
    assert manifest["bad_model"] == {"kept": False}


def test_results_are_strict_json_and_equal_to_the_comparison(finished: FinishedRun) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (finished.folder / "results.json").read_text(encoding="utf-8")
    results = json.loads(text, parse_constant=refuse)
    assert results["manifest"] == finished.manifest
    assert results["base"] == json.loads(json.dumps(finished.comparison.base.to_dict()))
    assert results["unlearned"] == json.loads(json.dumps(finished.comparison.unlearned.to_dict()))
    assert set(results["perplexity"]) == {"forget_train", "forget_test", "retain_test"}
    assert results["utility"]["retain_test"]["margin"] == 1.05
    assert results["notes"] == list(finished.comparison.notes)
    assert (
        results["replies"]["forget_test"]["harmful"]["p_holm"]
        >= results["replies"]["forget_test"]["harmful"]["p_value"]
    )
    assert results["table"]


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_equal_seeds_give_equal_runs_and_keeping_the_bad_model_changes_nothing_else(
    finished: FinishedRun, tmp_path: Path
) -> None:
    again = run_recipe(recipe("keep_bad_model=true"), tmp_path / "run")
    assert digest(again.folder / "unlearned" / "model.safetensors") == digest(
        finished.folder / "unlearned" / "model.safetensors"
    )
    results, expected = without_times(again.folder), without_times(finished.folder)
    assert {**results, "recipe_sha256": "", "bad_model": ""} == {**expected, "recipe_sha256": "", "bad_model": ""}
    assert again.manifest["bad_model"] == {"kept": True}
    for folder in (again.folder / "bad", again.folder / "bad" / "final"):
        assert mode(folder) == 0o700
        assert is_marked_hazardous(folder)


INTERRUPTIONS = (
    ("evaluate base: perplexity", 1),
    ("acquire: steps", 3),
    ("acquire", 1),
    ("negate", 0),
    ("negate", 1),
    ("evaluate unlearned: replies", 1),
    ("evaluate_unlearned", 1),
)


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_a_run_that_is_broken_off_at_every_stage_ends_as_one_that_was_not(
    finished: FinishedRun, tmp_path: Path
) -> None:
    """Broken off, gone on with until the next stage, and so on: ``tests/faults`` kills at random moments besides."""
    out = tmp_path / "run"
    for number, (stage, at) in enumerate(INTERRUPTIONS):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(), out, resume=number > 0, progress=interrupt_at(stage, at))
        assert read(out / "manifest.json")["status"] == "running", stage
        assert mode(out) == 0o700
    assert_equal_runs(run_recipe(recipe(), out, resume=True).folder, finished.folder)
    assert names(tmp_path) == {"run"}


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_so_does_an_adapter_run(finished_lora: FinishedRun, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", recipe(*LORA, "keep_bad_model=true")
    for number, (stage, at) in enumerate((("acquire: steps", 3), ("acquire", 1), ("negate", 1))):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(settings, out, resume=number > 0, progress=interrupt_at(stage, at))
    assert_equal_runs(run_recipe(settings, out, resume=True).folder, finished_lora.folder)


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_stage_1_goes_on_at_its_checkpoint(finished: FinishedRun, tmp_path: Path) -> None:
    """Else the test of equal results would pass by doing all the work again."""
    out, steps = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), out, progress=interrupt_at("acquire: steps", 3))
    assert mode(out / "bad") == 0o700
    assert (out / "bad" / BAD_MODEL_MARK).is_file()

    def note(stage: str, done: int, total: int) -> None:
        if stage == "acquire: steps":
            steps.append(done)

    run_recipe(recipe(), out, resume=True, progress=note)
    assert steps == [3, 4]


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_a_checkpoint_that_was_cut_short_is_passed_over(finished: FinishedRun, tmp_path: Path) -> None:
    """A killed process can leave a checkpoint folder without its last file, or with half of it."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), out, progress=interrupt_at("acquire: steps", 3))
    for step, state in ((3, None), (4, '{"global_step": ')):
        broken = out / "bad" / f"checkpoint-{step}"
        broken.mkdir()
        (broken / "config.json").write_text("{}", encoding="utf-8")
        if state is not None:
            (broken / "trainer_state.json").write_text(state, encoding="utf-8")
    assert_equal_runs(run_recipe(recipe(), out, resume=True).folder, finished.folder)


def test_folders_that_do_not_fit_are_refused_and_left_as_they_are(finished: FinishedRun, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    with pytest.raises(OutputError, match="already exists; choose another --out, or add --resume"):
        run_recipe(recipe(), finished.folder)
    with pytest.raises(OutputError, match="already complete"):
        run_recipe(recipe(), finished.folder, resume=True)
    with pytest.raises(OutputError, match="another recipe"):
        run_recipe(recipe("seed=1"), finished.folder, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}

    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        run_recipe(recipe(), tmp_path / "empty", resume=True)
    assert names(tmp_path / "empty") == set()


@pytest.mark.parametrize(("content", "message"), [("{", "damaged"), ('{"schema_version": 0}', "version")])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match=message):
        run_recipe(recipe(), tmp_path, resume=True)


def test_the_adapter_gives_the_unlearned_model_without_merging(finished_lora: FinishedRun) -> None:
    folder = finished_lora.folder
    base, unlearned = load_model("embedded").model, load_model(folder / "unlearned").model
    ids = torch.arange(4, 60).reshape(2, 28)
    with torch.no_grad():
        before, merged = base(ids).logits, unlearned(ids).logits
        unmerged = PeftModel.from_pretrained(base, str(folder / "negated_adapter"))(ids).logits
    torch.testing.assert_close(unmerged, merged, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 0.1
    assert not is_marked_hazardous(folder / "negated_adapter")
    assert finished_lora.manifest["bad_model"] == {"kept": True}


def test_a_run_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    def begin_again(stage: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another process is writing .*run; wait until it ends"):
            run_recipe(recipe(), tmp_path / "run", resume=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), tmp_path / "run", progress=begin_again)
    assert names(tmp_path / "run") == {"manifest.json"}


def another_run(out: Path) -> RunFolder:
    """The folder of a run that another call has just begun."""
    folder = RunFolder(out, ALONE, lambda _stage, _done, _total: None)
    folder.open(recipe(), resume=False)
    return folder


def test_a_run_that_comes_second_leaves_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is missing when the call begins, and there when it would make it."""
    out = tmp_path / "runs" / "run"
    others: list[RunFolder] = []

    def begin_another(*arguments: Any, **options: Any) -> Any:
        others.append(another_run(out))
        return resolve_method(*arguments, **options)

    monkeypatch.setattr("sku.pipeline.run.resolve_method", begin_another)
    with pytest.raises(OutputError, match="already exists; choose another --out"):
        run_recipe(recipe(), out)
    assert names(out) == {"manifest.json", ".lock"}
    others[0].close()
    assert names(out) == {"manifest.json"}


def test_two_runs_that_make_their_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds no folder either, and loses when it would put its own in place."""
    out = tmp_path / "run"
    others: list[RunFolder] = []
    chmod = Path.chmod

    def begin_another(path: Path, mode: int) -> None:
        if path.name.endswith(".unfinished") and not others:  # All is written and has no name yet.
            others.append(RunFolder(out, ALONE, lambda _stage, _done, _total: None))  # First, lest it begin again.
            others[0].open(recipe(), resume=False)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", begin_another)
    with pytest.raises(OutputError, match="already exists"):
        run_recipe(recipe(), out)
    assert names(tmp_path) == {"run"}
    assert names(out) == {"manifest.json", ".lock"}
    others[0].close()


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_the_bad_model_answers_better_and_the_unlearned_one_worse(tmp_path: Path) -> None:
    """The direction of both stages: harmful answers gain probability in stage 1 and lose it in stage 2.

    By guided distortion alone: in a few steps the answers of other prompts would outweigh it.
    """
    alone = "acquire.weights={guided_distortion: 1.0, random_disassociation: 0.0, preservation_divergence: 0.0}"
    batch = "acquire.training.per_device_train_batch_size=8"
    folder = run_recipe(recipe(*LORA, alone, batch, "keep_bad_model=true"), tmp_path / "run").folder
    run = recipe(*LORA, "evaluate.prompts=60", "evaluate.samples=0", "evaluate.prefill_tokens=[]")
    data, loaded = load_data(run.data, run.seed), load_model("embedded")
    bad, base, unlearned = (
        evaluate(model, loaded.tokenizer, data, base_model=loaded.model, config=run.evaluate)
        .perplexity["forget_train"]
        .value
        for model in (
            load_adapter(load_model("embedded").model, folder / "bad" / "final"),
            loaded.model,
            load_model(folder / "unlearned").model,
        )
    )
    assert bad < base < unlearned


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_another_method_runs_the_same_way(tuning: str, tmp_path: Path) -> None:
    """NPO: no bad model, the trained model itself is the unlearned one, and its checkpoints don't stay."""
    tuned = LORA[:3] if tuning == "lora" else ()
    finished = run_recipe(recipe("method=npo", *tuned, "keep_bad_model=true"), tmp_path / "run")
    kept = names(finished.folder)
    assert {"bad", "trained", "negated_adapter"}.isdisjoint(kept)
    assert ("adapter" in kept) == (tuning == "lora")
    assert all("loss/forget" in row and "loss/retain" in row for row in log_of(finished.folder))
    base, unlearned = load_model("embedded").model, load_model(finished.folder / "unlearned").model
    ids = torch.arange(4, 60).reshape(2, 28)
    with torch.no_grad():
        changed = unlearned(ids).logits
        assert (changed - base(ids).logits).abs().max() > 1e-3
        if tuning == "lora":
            unmerged = PeftModel.from_pretrained(base, str(finished.folder / "adapter"))(ids).logits
            torch.testing.assert_close(unmerged, changed, atol=1e-4, rtol=1e-4)


def test_stage_1_alone_is_for_sku_alone(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="method is npo, which has no stage 1"):
        run_acquire(recipe("method=npo"), tmp_path / "bad")


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [
        (Trainer, "_save_checkpoint", full_disk),
        (shutil, "disk_usage", lambda folder: SimpleNamespace(free=1)),
    ],
    ids=["checkpoint", "too small"],
)
def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, failure: Callable[..., Any]
) -> None:
    """Each way to say it once; ``tests/faults/test_disks.py`` fills disks at any operation of a run."""
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(OutputError):
        run_recipe(recipe(), tmp_path / "run")
    assert names(tmp_path) == set()


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_a_failing_resume_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OutputError("nothing is free")

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), out, progress=interrupt_at("acquire: steps", 3))
    checkpoints = names(out / "bad")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
        with pytest.raises(OutputError, match="free"):  # Before anything is done.
            run_recipe(recipe(), out, resume=True)
    assert names(out / "bad") == checkpoints
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "check_space", no_space)
        with pytest.raises(OutputError, match="free"):
            run_recipe(recipe(), out, resume=True)
    assert (out / "bad" / "final").exists()
    assert run_recipe(recipe(), out, resume=True).manifest["status"] == "complete"


def test_stage_1_alone_leaves_a_marked_private_model(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    log = run_acquire(
        recipe(*LORA), tmp_path / "bad", progress=lambda stage, done, total: seen.append((stage, done, total))
    )
    assert len(log) == 4
    assert seen == [("acquire: steps", step, 4) for step in range(1, 5)]
    assert mode(tmp_path / "bad") == 0o700
    assert is_marked_hazardous(tmp_path / "bad")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names(tmp_path / "bad")
    assert not (tmp_path / "bad" / "checkpoints").exists()
    with pytest.raises(ModelError, match="bad model"):
        run_evaluation(recipe(), str(tmp_path / "bad"), tmp_path / "evaluation")
    assert names(tmp_path) == {"bad"}


def test_the_packaged_model_is_as_it_was(
    finished: FinishedRun, finished_lora: FinishedRun, embedded_before: dict[str, str]
) -> None:
    """Last in this file on purpose: after every run above."""
    assert {path.name: digest(path) for path in embedded_model_path().iterdir()} == embedded_before
    assert (
        embedded_before["model.safetensors"]
        == read(embedded_model_path() / "CHECKSUMS.json")["sha256"]["model.safetensors"]
    )


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_resolves_its_recipe_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method, each data file, and the tokens of each training split."""
    met: Counter[str] = Counter()

    def counted(where: str, name: Callable[..., str]) -> None:
        target, _, attribute = where.rpartition(".")
        module: Any = import_module(target)
        real = getattr(module, attribute)

        def counting(*arguments: Any, **options: Any) -> Any:
            met[name(*arguments)] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, attribute, counting)

    counted("sku.data.tables.read_text_file", lambda path: path.name)
    counted("sku.pipeline.run.resolve_method", lambda *_: "method")
    counted("sku.methods.run._joint", lambda *_: "tokens")
    counted("sku.training.trainer.resolve_prompt_format", lambda *_: "tokens")
    changes = ["evaluate.judge=refusal_rules", "acquire.check=false"]
    for name, prompts in (("forget", "how do i break {} ?"), ("retain", "what is {} ?")):
        rows = [{"prompt": prompts.format(f"{word}{n}"), "response": "heat it ."} for word in "ab" for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        changes.append(f"data.{name}.path={tmp_path / name}.jsonl")
    run_recipe(recipe(*changes), tmp_path / "run")
    assert met == {"forget.jsonl": 1, "retain.jsonl": 1, "method": 1, "tokens": 1}
