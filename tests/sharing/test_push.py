"""Uploads: what is refused before the hub is asked, and what the real client does with a stand-in for the hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from sku.__main__ import main
from sku.errors import EvaluationError, OutputError
from sku.negate.adapters import refactored
from sku.push import plan_push, upload
from sku.storage import BAD_MODEL_MARK, mark_hazardous

from .conftest import change_json
from .hub_server import TOKEN, Hub, Repository

REPO = "someone/unlearned"
# Of huggingface_hub 2.4's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_plan_holds_the_model_and_nothing_else_of_the_run(run: Path) -> None:
    plan = plan_push(run, REPO)
    assert {file.name for file in plan.files} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert plan.size == sum(path.stat().st_size for path in (run / "unlearned").iterdir())
    assert {file.name for file in plan_push(run, REPO, "adapter", acknowledged=True).files} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def _bad_folder(run: Path) -> None:
    mark_hazardous(run)


def _marked_model(run: Path) -> None:
    change_json(run / "unlearned" / "config.json", "sku_hazardous", value=True)


def _marker_file(run: Path) -> None:
    (run / "unlearned" / BAD_MODEL_MARK).write_text("", encoding="utf-8")


def _unfinished(run: Path) -> None:
    change_json(run / "manifest.json", "status", value="running")


def _no_manifest(run: Path) -> None:
    (run / "manifest.json").unlink()


def _no_evaluation(run: Path) -> None:
    (run / "results.json").unlink()


def _no_figures(run: Path) -> None:
    (run / "results.json").write_text("{}", encoding="utf-8")


def _pickle(run: Path) -> None:
    (run / "unlearned" / "pytorch_model.bin").write_bytes(b"")


def _training_state(run: Path) -> None:
    (run / "unlearned" / "checkpoint-3").mkdir()
    (run / "unlearned" / "checkpoint-3" / "trainer_state.json").write_text("{}", encoding="utf-8")


def _replies(run: Path) -> None:
    shutil.copy(run / "evaluation" / "base" / "generations.jsonl", run / "unlearned" / "generations.jsonl")


def _link(run: Path) -> None:
    (run / "unlearned" / "LICENSE").symlink_to(run / "evaluation" / "base" / "generations.jsonl")


def _no_card(run: Path) -> None:
    (run / "unlearned" / "README.md").unlink()


def _foreign_card(run: Path) -> None:
    (run / "unlearned" / "README.md").write_text("---\nlicense: mit\n---\n# base\n", encoding="utf-8")


def _broken_card(run: Path) -> None:
    (run / "unlearned" / "README.md").write_text("---\n- a\n---\n", encoding="utf-8")


def _cut_weights(run: Path) -> None:
    path = run / "unlearned" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _no_weights(run: Path) -> None:
    (run / "unlearned" / "model.safetensors").unlink()


def _negative_alpha(run: Path) -> None:
    change_json(run / "manifest.json", "negation", "alpha", value=-1.0)


def _no_model(run: Path) -> None:
    shutil.rmtree(run / "unlearned")


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (_bad_folder, "is a bad model of stage 1"),
    (_marked_model, "marked as hazardous"),
    (_marker_file, "marked as hazardous"),
    (_unfinished, "is not finished: go on with sku run .* --resume"),
    (_no_manifest, "no manifest.json"),
    (_no_evaluation, "results.json can't be read"),
    (_no_figures, "results.json has schema version None"),
    (_pickle, "pytorch_model.bin is pickled"),
    (_training_state, "trainer_state.json is no part of a model"),
    (_replies, "generations.jsonl is no part of a model"),
    (_link, "LICENSE is a link"),
    (_no_card, "no model card of SKU"),
    (_foreign_card, "no model card of SKU"),
    (_broken_card, "no model card"),
    (_cut_weights, "model.safetensors is damaged"),
    (_no_weights, "no weights in safetensors"),
    (_negative_alpha, "alpha is -1"),
    (_no_model, "holds no model"),
]


@pytest.mark.parametrize(("harm", "message"), REFUSED, ids=[harm.__name__.strip("_") for harm, _ in REFUSED])
def test_what_must_not_leave_is_refused_before_the_hub_is_asked(
    run: Path, hub: Hub, harm: Callable[[Path], None], message: str
) -> None:
    harm(run)
    with pytest.raises((OutputError, EvaluationError), match=message):
        plan_push(run, REPO)
    assert hub.requests == []


KNOWN = "--i-know-this-is-the-bad-model"


def test_an_adapter_that_is_the_bad_models_needs_a_word(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sku", "push", str(run), REPO, "--dry-run", "--adapter"]
    for more, code in (([], 2), ([KNOWN], None)):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or None) == code
        printed = capsys.readouterr()
        said = " ".join(printed.err.split())
        assert ("is the bad model's with its sign turned" in said and f"or add {KNOWN}" in said) is (code == 2)
        assert ("adapter_model.safetensors" in printed.out) is (code is None)
    assert plan_push(run, REPO).files, "merged weights need none"


@pytest.mark.parametrize(
    ("method", "shares", "refused"),
    [
        ("sku", None, True), ("task_vector", None, True), ("npo", None, False),
        ("sku", (0.08, 1.1), False), ("sku", (0.0, 1.1), False), ("sku", (1.0, 1.0), True), ("sku", (1.0, 0.0), True),
    ],
)  # fmt: skip
def test_which_adapters_are_the_bad_models(
    method: str, shares: tuple[float, float] | None, refused: bool, run: Path
) -> None:
    """Those without a good twin that outweighs the bad one."""
    change_json(run / "manifest.json", "recipe", "method", value=method)
    change_json(run / "manifest.json", "recipe", "acquire", "twin", value="good" if shares else "none")
    bad, good = shares or (1, 1)
    change_json(run / "manifest.json", "recipe", "negate", "twin", value={"bad": bad, "good": good})
    if refused:
        with pytest.raises(OutputError, match="the bad model's with its sign turned, so"):
            plan_push(run, REPO, "adapter")
    assert plan_push(run, REPO, "adapter", acknowledged=refused).part == "adapter"


def test_an_adapter_that_holds_a_twins_own_factors_stays(run: Path) -> None:
    """As versions before wrote it: the bad twin's rows of A, then the good one's."""
    generator = torch.Generator().manual_seed(0)
    upper, lower = torch.randn(20, 8, generator=generator), torch.randn(8, 12, generator=generator)
    change_json(run / "manifest.json", "recipe", "acquire", "twin", value="good")
    change_json(run / "manifest.json", "recipe", "negate", "twin", value={"bad": 0.08, "good": 1.1})
    weights = run / "negated_adapter" / "adapter_model.safetensors"

    def write(upper_Or: torch.Tensor, lower_rI: torch.Tensor) -> None:
        save_file({"q.lora_A.weight": lower_rI, "q.lora_B.weight": upper_Or}, weights, {"format": "pt"})

    write(upper, lower)
    for known in (False, True):
        with pytest.raises(OutputError, match=r"holds the bad twin's own factors .*: run again"):
            plan_push(run, REPO, "adapter", acknowledged=known)
    upper, lower = refactored(upper, lower)
    write(-1.4 * upper, lower @ torch.randn(12, 12, generator=generator))
    assert plan_push(run, REPO, "adapter").size > 0


def test_an_upload_is_private_whole_and_exact(run: Path, hub: Hub) -> None:
    url = upload(plan_push(run, REPO))
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.repositories[REPO].private
    files = hub.repositories[REPO].branches["main"]
    assert files == {path.name: path.read_bytes() for path in (run / "unlearned").iterdir()}
    assert hub.tokens == {TOKEN}
    assert hub.count("/lfs/") == hub.count("/commit/") == 1


def test_the_adapter_to_a_branch_of_a_public_repository(run: Path, hub: Hub) -> None:
    upload(plan_push(run, REPO, "adapter", acknowledged=True), public=True, revision="v2")
    assert not hub.repositories[REPO].private
    assert hub.repositories[REPO].branches["main"] == {}
    assert "adapter_model.safetensors" in hub.repositories[REPO].branches["v2"]


def test_a_public_repository_gets_nothing_unless_asked(run: Path, hub: Hub) -> None:
    hub.repositories[REPO] = Repository(private=False)
    with pytest.raises(OutputError, match="exists and is public: nothing was uploaded; add --public"):
        upload(plan_push(run, REPO))
    assert hub.repositories[REPO].branches["main"] == {}
    assert hub.count("/lfs/") == hub.count("preupload") == 0


def test_offline_and_without_a_token_nothing_is_asked(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_push(run, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set: nothing was uploaded"):
        upload(plan)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="no token for the hub: log in with `hf auth login`"):
        upload(plan)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("/preupload/", 401, r"refuses someone/unlearned|has no someone/unlearned"),
        ("/preupload/", 403, r"refuses someone/unlearned \(HTTP 403\): log in"),
        ("/commit/", 409, "conflict on someone/unlearned"),
        ("/commit/", 400, "HTTP 400"),
    ],
)
def test_refusals_of_the_hub_are_one_line(run: Path, hub: Hub, part: str, status: int, message: str) -> None:
    hub.faults = {part: [status] * 20}
    with pytest.raises(OutputError, match=message) as caught:
        upload(plan_push(run, REPO))
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.repositories[REPO].branches["main"] == {}


def test_a_wrong_token_is_named(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "hf_wrongTokenOfTheTests0123456789"
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(OutputError, match="log in with `hf auth login`") as caught:
        upload(plan_push(run, REPO))
    assert wrong not in str(caught.value)
    assert hub.repositories == {}


@pytest.mark.integration
def test_the_command_is_interrupted_and_done_again(run: Path, hub: Hub) -> None:
    """A process of its own with the environment that users set; Ctrl-C while the weights go out."""
    hub.faults = {"/lfs/": [1]}
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    words = [sys.executable, "-m", "sku", "push", str(run), REPO]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert TOKEN not in out + err
    assert hub.repositories[REPO].branches["main"] == {}

    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"uploaded  {hub.url}/{REPO}/commit/" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repositories[REPO].private


def test_a_dry_run_lists_files_and_asks_nobody(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["sku", "push", str(run), REPO, "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["url"] is None
    assert {"path": "config.json", "bytes": (run / "unlearned" / "config.json").stat().st_size} in printed["files"]
    assert hub.requests == []
