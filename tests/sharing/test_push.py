"""Uploads: what is refused before the hub is asked, and what is asked of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import HfHubHTTPError

from conftest import Command
from sku.errors import EvaluationError, OutputError
from sku.push import plan_push, upload
from sku.storage import BAD_MODEL_MARK, mark_hazardous

from .conftest import TOKEN, change_json

REPO = "someone/unlearned"


def test_the_plan_holds_the_model_and_nothing_else_of_the_run(run: Path) -> None:
    plan = plan_push(run, REPO)
    assert set(plan.files) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert plan.files == {path.name: path.stat().st_size for path in (run / "unlearned").iterdir()}
    assert set(plan_push(run, REPO, "adapter", acknowledged=True).files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def unlink(*parts: str) -> Callable[[Path], None]:
    return lambda run: run.joinpath(*parts).unlink()


def write(name: str, content: str = "") -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        (run / "unlearned" / name).parent.mkdir(exist_ok=True)
        (run / "unlearned" / name).write_text(content, encoding="utf-8")

    return harm


def change(name: str, *keys: str, to: object) -> Callable[[Path], None]:
    return lambda run: change_json(run / name, *keys, value=to)


def cut_weights(run: Path) -> None:
    path = run / "unlearned" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def link(run: Path) -> None:
    (run / "unlearned" / "LICENSE").symlink_to(run / "evaluation" / "base" / "generations.jsonl")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bad model": (mark_hazardous, "stage 1"),
    "marked in its config": (change("unlearned/config.json", "sku_hazardous", to=True), "sku_hazardous"),
    "marked by a file": (write(BAD_MODEL_MARK), "sku_hazardous"),
    "unfinished": (change("manifest.json", "status", to="running"), "--resume"),
    "without an evaluation": (unlink("results.json"), "results.json"),
    "a pickle": (write("pytorch_model.bin"), "pytorch_model.bin"),
    "state of a training": (write("checkpoint-3/trainer_state.json", "{}"), "trainer_state.json"),
    "replies": (write("generations.jsonl"), "generations.jsonl"),
    "a link": (link, "LICENSE"),
    "without a card": (unlink("unlearned", "README.md"), "model card"),
    "a foreign card": (write("README.md", "---\nlicense: mit\n---\n# base\n"), "model card"),
    "a broken card": (write("README.md", "---\n- a\n---\n"), "model card"),
    "cut weights": (cut_weights, "model.safetensors"),
    "no weights": (unlink("unlearned", "model.safetensors"), "safetensors"),
    "a negative alpha": (change("manifest.json", "negation", "alpha", to=-1.0), "-1"),
    "no model": (lambda run: shutil.rmtree(run / "unlearned"), "model"),
}


@pytest.mark.parametrize(("harm", "named"), REFUSED.values(), ids=REFUSED)
def test_what_must_not_leave_is_refused_before_the_hub_is_asked(
    run: Path, hub: MagicMock, harm: Callable[[Path], None], named: str
) -> None:
    harm(run)
    with pytest.raises((OutputError, EvaluationError), match=named):
        plan_push(run, REPO)
    assert hub.mock_calls == []


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
        with pytest.raises(OutputError, match="--i-know-this-is-the-bad-model"):
            plan_push(run, REPO, "adapter")
    assert plan_push(run, REPO, "adapter", acknowledged=refused).part == "adapter"


def uploaded(hub: MagicMock) -> dict[str, bytes]:
    """The files of the one commit."""
    [(_, operations)] = [call.args for call in hub.create_commit.call_args_list]
    return {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}


def test_an_upload_is_private_whole_and_exact(run: Path, hub: MagicMock) -> None:
    assert upload(plan_push(run, REPO)) == "https://hub/commit/1"
    hub.create_repo.assert_called_once_with(REPO, private=True, exist_ok=True)
    assert uploaded(hub) == {path.name: path.read_bytes() for path in (run / "unlearned").iterdir()}


def test_a_public_repository_and_a_branch_only_where_they_are_asked_for(run: Path, hub: MagicMock) -> None:
    hub.model_info.return_value.private = False
    with pytest.raises(OutputError, match="--public"):
        upload(plan_push(run, REPO))
    hub.create_commit.assert_not_called()
    upload(plan_push(run, REPO, "adapter", acknowledged=True), public=True, revision="v2")
    hub.create_branch.assert_called_once_with(REPO, branch="v2", exist_ok=True)
    assert hub.create_commit.call_args.kwargs["revision"] == "v2"
    assert "adapter_model.safetensors" in uploaded(hub)


def test_offline_and_without_a_token_nothing_is_asked(
    run: Path, hub: MagicMock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_push(run, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        upload(plan)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="hf auth login"):
        upload(plan)
    assert hub.mock_calls == []


def answer(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{TOKEN}\nis {status}", response=response)


def wrapped(error: Exception) -> Exception:
    """As the client wraps what happened to a weight file."""
    around = RuntimeError("error while uploading")
    around.__cause__ = error
    return around


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (answer(401), "hf auth login"), (answer(400), "400"), (wrapped(answer(500)), "the same command goes on"),
        (ConnectionError("reset"), "out of reach"), (ValueError("odd"), "odd"),
    ],
)  # fmt: skip
def test_refusals_of_the_hub_are_one_line(run: Path, hub: MagicMock, fault: Exception, message: str) -> None:
    hub.create_commit.side_effect = fault
    with pytest.raises(OutputError, match=message) as caught:
        upload(plan_push(run, REPO))
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_is_interrupted_and_done_again(run: Path, hub: MagicMock, command: Command) -> None:
    """Ctrl-C while the weights go out."""
    hub.create_commit.side_effect = KeyboardInterrupt
    code, out, err = command("push", run, REPO)
    assert (code, out) == (130, "")
    assert "interrupted" in err
    hub.create_commit.side_effect = None
    code, out, err = command("push", run, REPO)
    assert code == 0, err
    assert "https://hub/commit/1" in out
    assert TOKEN not in out + err


def test_a_dry_run_lists_files_and_asks_nobody(run: Path, hub: MagicMock, command: Command) -> None:
    code, out, _ = command("push", run, REPO, "--dry-run", "--json", "--adapter", "--i-know-this-is-the-bad-model")
    assert (code, json.loads(out)["url"]) == (0, None)
    size = (run / "negated_adapter" / "adapter_config.json").stat().st_size
    assert {"path": "adapter_config.json", "bytes": size} in json.loads(out)["files"]
    assert hub.mock_calls == []
