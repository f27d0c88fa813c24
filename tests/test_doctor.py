"""``sku doctor``: what it finds, and what it advises."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest

from sku.cli import doctor
from sku.cli.doctor import SUPPORTED, TESTED, Check, examine, numbers, usable
from sku.cli.main import main
from sku.storage import mark_hazardous

ROOT = Path(__file__).resolve().parent.parent


def checks(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(folder)}


def test_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in TESTED} == dict(TESTED)


def test_supported_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, (lowest, below) in SUPPORTED.items():
        assert f"{name}>={lowest}{f',<{below}' if below else ''}" in project["dependencies"]


def test_this_machine_can_run(tmp_path: Path) -> None:
    found = examine(tmp_path / "runs")
    assert usable(found), [check for check in found if check.status == "problem"]
    names = [check.name for check in found]
    assert len(names) == len(set(names))
    assert {"python", "torch", "device", "threads", "disk", "hub", "hub token", "embedded model"} <= set(names)
    assert all(check.advice for check in found if check.status != "ok")
    assert not (tmp_path / "runs").exists(), "looking changes nothing"


@pytest.mark.parametrize(
    ("version", "status", "advice"),
    [
        (None, "problem", "pip install 'peft==0.21.2'"),
        ("0.18.9", "problem", "pip install 'peft>=0.19,<1'"),
        ("1.0.0", "problem", "pip install 'peft>=0.19,<1'"),
        ("0.20.1", "warning", "tested with 0.21.2"),
        ("0.21.2+local", "ok", ""),
    ],
)
def test_versions(
    version: str | None, status: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def pretend(name: str) -> str:
        if name != "peft":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretend)
    check = checks(tmp_path)["peft"]
    assert check.status == status
    assert advice in check.advice


def test_numbers_of_versions() -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("3.0rc1") == (3, 0)
    assert numbers("") == ()


@pytest.mark.parametrize(("free", "status"), [(10, "problem"), (5 * 2**30, "warning"), (500 * 2**30, "ok")])
def test_space(free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert checks(tmp_path)["disk"].status == status


def test_folders_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    found = checks(tmp_path / "file" / "runs")
    assert (found["run folder"].status, found["run folder"].advice) == ("problem", "choose another --out")
    assert (found["hub cache"].status, found["hub cache"].advice) == ("problem", "set HF_HOME to a folder of yours")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "switched off by HF_HUB_OFFLINE" in checks(tmp_path)["hub"].found
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub = checks(tmp_path)["hub"]
    assert hub.status == "warning"
    assert "out of reach" in hub.found
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked although it was told not to"))
    assert {check.name: check for check in examine(tmp_path, ask_hub=False)}["hub"].found.endswith("not asked")


def test_a_token_is_told_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretOfThisTest0123456789")
    found = checks(tmp_path)
    assert found["hub token"].found == "there is one (not shown)"
    assert "secretOfThisTest" not in repr(found)


def test_threads_beyond_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert checks(tmp_path)["threads"].advice.startswith("export OMP_NUM_THREADS=")


def test_bad_models_that_were_left_behind(tmp_path: Path) -> None:
    mark_hazardous(tmp_path / "run" / "bad")
    check = checks(tmp_path)["bad models"]
    assert check.status == "warning"
    assert str(tmp_path / "run" / "bad") in check.found
    assert "sku wipe" in check.advice


def test_a_changed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "world" / "model"
    shutil.copytree(ROOT / "src" / "sku" / "world" / "model", model)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert checks(tmp_path)["embedded model"].status == "ok"
    (model / "config.json").write_text("{}", encoding="utf-8")
    assert checks(tmp_path)["embedded model"].found == "changed: config.json"
    (model / "config.json").unlink()
    assert checks(tmp_path)["embedded model"].status == "problem"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_the_command(
    status: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [Check(name="disk", status=status, found="1 byte", advice="" if status == "ok" else "buy another")]
    monkeypatch.setattr(doctor, "examine", lambda folder, ask_hub: listed)
    for as_json in (False, True):
        monkeypatch.setattr(sys, "argv", ["sku", "doctor", *(["--json"] if as_json else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        out = capsys.readouterr().out
        if as_json:
            assert json.loads(out)["ready"] == (code == 0)
            assert json.loads(out)["checks"][0]["name"] == "disk"
        else:
            assert "1 byte" in out
            assert ("buy another" in out) == (status != "ok")
            assert ("not ready" in out) == (code == 1)
