"""``report_to``: curves go to tracking services, models in training never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import integration_utils

from sku.config import load_recipe
from sku.errors import RecipeError
from sku.methods.run import resolve_method
from sku.methods.trainer import SkuConfig
from sku.training.config import check_services


def test_what_is_asked_for_reports_and_nothing_else(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed (a development dependency)")
    for asked, found in ((["tensorboard"], ["TensorBoardCallback"]), ("none", [])):
        callbacks = make_trainer(report_to=asked).callback_handler.callbacks
        kinds = [type(callback) for callback in callbacks]
        assert [kind.__name__ for kind in kinds if "integrations" in kind.__module__] == found


def test_what_can_not_be_used_or_would_upload_stops_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sku.training.config.get_available_reporting_integrations", lambda: ["tensorboard"])
    for setting, named in (
        ("report_to=[tensorbord]", "tensorboard"),
        ("report_to=[wandb]", "wandb"),
        ("report_to=[flyte]", "flyte"),
        ("push_to_hub=true", "push_to_hub"),
    ):
        with pytest.raises(RecipeError, match=named):
            resolve_method(load_recipe("embedded-paper", [f"acquire.training.{setting}"]))
    with pytest.raises(RecipeError, match="push_to_hub"):
        SkuConfig(output_dir=str(tmp_path), push_to_hub=True)


def test_weights_and_biases_gets_no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sku.training.config.get_available_reporting_integrations", lambda: ["wandb"])
    for value in ("checkpoint", "TRUE", "end"):
        monkeypatch.setenv("WANDB_LOG_MODEL", value)
        with pytest.raises(RecipeError, match="WANDB_LOG_MODEL=false"):
            check_services(["wandb"])
    monkeypatch.setenv("WANDB_LOG_MODEL", "False")
    check_services(["wandb"])
    source = Path(str(integration_utils.__file__)).read_text(encoding="utf-8")
    assert '"WANDB_LOG_MODEL"' in source, "transformers reads another variable"
