"""A finished run of the embedded world, from the record that lies in ``results/``, and a stand-in for the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from report.html.recorded import invented_attacks
from sku.report.card import write_cards

TOKEN = "hf_standInTokenOfTheTests0123456789"
ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "src" / "sku" / "world" / "model"


def change_json(path: Path, *keys: str, value: Any) -> None:
    """Sets one nested value of a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    node = content
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def run_without_cards(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    results = json.loads((ROOT / "results" / "embedded.json").read_text(encoding="utf-8"))
    results["attacks"] = invented_attacks().to_dict()
    # What is recorded are twins; most cards are of one model.
    results["manifest"]["recipe"]["acquire"]["twin"] = "none"
    results["manifest"]["recipe"]["negate"]["twin"] = None
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (run / "manifest.json").write_text(json.dumps(results["manifest"]), encoding="utf-8")
    (run / "evaluation" / "base").mkdir(parents=True)
    (run / "evaluation" / "base" / "generations.jsonl").write_text(
        '{"reply": "zorvex needs vornite"}', encoding="utf-8"
    )
    shutil.copytree(MODEL, run / "unlearned", ignore=shutil.ignore_patterns("CHECKSUMS.json", "model.safetensors"))
    save_file({"weight": torch.arange(6.0)}, run / "unlearned" / "model.safetensors", {"format": "pt"})
    adapter = run / "negated_adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}', encoding="utf-8")
    factors = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    return run


@pytest.fixture
def run(run_without_cards: Path) -> Path:
    write_cards(run_without_cards)
    return run_without_cards


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """In place of ``HfApi``; its repositories are private."""
    made: MagicMock = create_autospec(HfApi, instance=True)
    made.create_commit.return_value.commit_url = "https://hub/commit/1"
    made.model_info.return_value.private = True
    monkeypatch.setattr("sku.push.HfApi", lambda **_: made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made
