"""Bad models: marked wherever they lie, gone when they are not needed, and no pickle or foreign code is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import TINY_RUN, Command, MadeOnce
from sku.config import ModelConfig, Recipe, load_recipe
from sku.errors import ModelError, OutputError
from sku.model_files import embedded_model_path
from sku.models import load_classifier, load_model
from sku.negate.adapters import load_adapter
from sku.negate.streaming import negate_folders
from sku.negate.task_vector import negate, task_vector_of
from sku.pipeline.evaluate import run_evaluation
from sku.pipeline.run import run_recipe
from sku.pipeline.stages import run_acquire
from sku.progress import without_secrets
from sku.storage import (
    BAD_MODEL_MARK,
    HAZARD_KEY,
    hazardous_folders,
    is_marked_hazardous,
    mark_hazardous,
    new_folder,
    remove_hazardous,
    wipe,
)

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

SMALL = (*TINY_RUN, "acquire.training.save_total_limit=null")
LORA = ("acquire.tuning=lora", "acquire.lora.r=4")
SECRET = "hf_tokenThatMustNotBeFound0123456789"


def recipe(*changes: str) -> Recipe:
    return load_recipe("embedded-paper", [*SMALL, *changes])


def stopping_at(beginning: str, number: int = 0) -> Any:
    """Progress that interrupts a stage at its step of that number."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith(beginning) and done >= number:
            raise KeyboardInterrupt

    return progress


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def kept(made_once: MadeOnce) -> Path:
    """A whole run with an adapter whose bad model is kept, under an umask that hides nothing, with a token around."""

    def make(folder: Path) -> None:
        before = os.umask(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", SECRET)
            patch.setattr(sys, "argv", ["sku", "run", "--set", f"token={SECRET}"])
            try:
                run_recipe(recipe(*LORA, "keep_bad_model=true"), folder / "run")
            finally:
                os.umask(before)

    return made_once("run_that_kept_its_bad_model", make)[0] / "run"


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Path:
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def test_a_bad_model_is_marked_in_its_folder_its_configuration_and_its_checkpoints(kept: Path) -> None:
    """Whatever the umask nobody else enters; what is made of it carries no mark, but its card."""
    folders = [kept / "bad" / name for name in ("final", "checkpoint-1", "checkpoint-2")]
    assert {mode(path) for path in (kept, kept / "bad", *folders)} == {0o700}
    for folder in folders:
        assert (folder / BAD_MODEL_MARK).is_file()
        assert read(folder / "adapter_config.json").get(HAZARD_KEY) is True
        assert is_marked_hazardous(folder)
    for part, name in (("unlearned", "config.json"), ("negated_adapter", "adapter_config.json")):
        assert not is_marked_hazardous(kept / part)
        assert read(kept / part / name).get(HAZARD_KEY) is None
        assert (kept / part / "README.md").read_text(encoding="utf-8").startswith("---\n")
    load_adapter(load_model("embedded").model, kept / "bad" / "final")  # Without a warning.
    with pytest.warns(UserWarning, match=HAZARD_KEY):  # Others are told that something is odd.
        PeftModel.from_pretrained(load_model("embedded").model, str(kept / "bad" / "final"))


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_folders_under_each_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "run", private=True):
            pass
        mark_hazardous(tmp_path / "run" / "bad")
    finally:
        os.umask(before)
    assert mode(tmp_path / "run") == mode(tmp_path / "run" / "bad") == 0o700


def test_no_file_of_a_run_holds_a_token(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert read(kept / "manifest.json")["environment"]["command"] == "sku run --set token=***"
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    text = without_secrets("sku run --set a=abcdefgh b=hf_ABCDEFGHIJKLMNOPQRST --out run")
    assert text == "sku run --set a=*** b=*** --out run"


@pytest.mark.integration
def test_full_models_are_marked_and_their_negation_is_not(tmp_path: Path) -> None:
    run_acquire(recipe(), tmp_path / "bad")
    assert read(tmp_path / "bad" / "config.json").get(HAZARD_KEY) is True
    (tmp_path / "bad" / BAD_MODEL_MARK).unlink()
    assert is_marked_hazardous(tmp_path / "bad"), "the configuration still says it"
    negate("embedded", tmp_path / "bad").save_pretrained(tmp_path / "in_memory")
    negate_folders(embedded_model_path(), tmp_path / "bad", tmp_path / "streamed")
    for name in ("in_memory", "streamed"):
        assert not is_marked_hazardous(tmp_path / name)
    with pytest.raises(ModelError, match="--allow-hazardous"):
        run_evaluation(recipe(), str(tmp_path / "bad"), tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()
    run_evaluation(recipe(), str(tmp_path / "bad"), tmp_path / "evaluation", allow_hazardous=True)
    assert (tmp_path / "evaluation" / "model" / "evaluation.json").is_file()


@pytest.mark.integration
@pytest.mark.parametrize("keep", [True, False])
def test_an_interrupt_leaves_checkpoints_only_to_go_on_from(keep: bool, tmp_path: Path) -> None:
    """And once stage 2 is done nothing, whatever the recipe says."""
    out, settings = tmp_path / "run", recipe(f"keep_bad_model={'false' if keep else 'never'}")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(settings, out, progress=stopping_at("acquire: steps", 2))
    assert bool(hazardous_folders(out)) == keep
    with pytest.raises(KeyboardInterrupt):
        run_recipe(settings, out, resume=True, progress=stopping_at("evaluate unlearned"))
    assert (out / "unlearned").is_dir()
    assert hazardous_folders(out) == []


@pytest.mark.integration
def test_a_failure_leaves_none_either(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does SIGTERM."""
    settings = [f"--set={change}" for change in (*SMALL, "keep_bad_model=never")]
    handler = signal.getsignal(signal.SIGTERM)
    for name, code in (("failed", 1), ("terminated", 143)):

        def end(*_arguments: Any, number: int = code, **_options: Any) -> None:
            if number == 143:
                os.kill(os.getpid(), signal.SIGTERM)
            raise SystemExit(1)

        monkeypatch.setattr("sku.pipeline.unlearning.FolderNegation", end)
        assert command("run", "--out", tmp_path / name, *settings).code == code
        assert (tmp_path / name / "manifest.json").is_file()
        assert hazardous_folders(tmp_path / name) == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_what_can_not_be_marked_or_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert not is_marked_hazardous(tmp_path)
    with pytest.raises(OutputError, match=r"config\.json"):
        mark_hazardous(tmp_path)
    mark_hazardous(tmp_path / "bad")

    def refuse(path: Path, *_arguments: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(OutputError, match="bad"):
        remove_hazardous(tmp_path / "bad")
    monkeypatch.undo()
    remove_hazardous(tmp_path / "bad")
    remove_hazardous(tmp_path / "bad")  # Gone already.


def test_wiping_finds_what_is_marked_and_nothing_else(copied: Path) -> None:
    (copied / "link").symlink_to(copied / "bad")
    mark_hazardous(copied / "vector")
    assert hazardous_folders(copied.parent) == [copied / "bad", copied / "vector"]
    assert hazardous_folders(copied / "bad") == [copied / "bad"]
    unlearned = sorted((copied / "unlearned").iterdir())
    with pytest.raises(OutputError, match="unlearned"):
        wipe([copied / "unlearned"])
    wipe(hazardous_folders(copied))
    assert not (copied / "bad").exists()
    assert sorted((copied / "unlearned").iterdir()) == unlearned
    assert read(copied / "manifest.json")["bad_model"] == {"kept": False}
    with pytest.raises(OutputError, match="nothing"):
        hazardous_folders(copied / "nothing")


@pytest.mark.parametrize(
    ("inside", "words", "answer", "gone", "code"),
    [
        ("", ". --dry-run", False, False, 0), ("", ".", False, False, 1), ("", ".", True, True, 0),
        ("bad/final", ".. --yes", False, True, 0),
    ],
)  # fmt: skip
def test_the_wipe_command_also_of_the_folder_one_stands_in(
    copied: Path, inside: str, words: str, answer: bool, gone: bool, code: int, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(copied / inside)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: answer)
    ended, out, _ = command("wipe", *words.split())
    assert ended == code
    assert f"{copied / 'bad'}\n" in out
    assert any("bad" in path.name for path in copied.iterdir()) is not gone
    if gone:
        assert read(copied / "manifest.json")["bad_model"] == {"kept": False}


class _Trap:
    """A pickle that leaves a trace when somebody reads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("model", load_model),
        ("model", lambda path: load_classifier(ModelConfig(path=str(path)))),
        ("adapter_model", lambda path: task_vector_of(load_model("embedded").model, path)),
    ],
)
def test_pickled_weights_are_refused_and_not_read(
    kind: str, load: Any, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model()
    if kind != "model":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "model"))
    tokenizer.save_pretrained(tmp_path / "model")
    name = "pytorch_model.bin" if kind == "model" else f"{kind}.bin"
    torch.save(_Trap(tmp_path / "trace"), tmp_path / "model" / name)
    if load is load_model:
        load(tmp_path / "model")  # Beside safetensors they are left alone.
    (tmp_path / "model" / f"{kind}.safetensors").unlink()
    with pytest.raises(ModelError, match=name):
        load(tmp_path / "model")
    assert not (tmp_path / "trace").exists()


def test_code_that_comes_with_a_model_is_not_run(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = read(tmp_path / "model" / "config.json")
    names = {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapModel"}
    config |= {"model_type": "trap", "auto_map": names}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()\n"
    (tmp_path / "model" / "trap.py").write_text(trap, encoding="utf-8")
    with pytest.raises(ModelError, match="model"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "trace").exists()
