"""``report_to``: curves go to tracking services, models in training never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sku.config import load_recipe
from sku.errors import RecipeError
from sku.methods.run import resolve_method
from sku.methods.trainer import SkuConfig
from sku.training.config import MODEL_UPLOADS, check_no_uploads


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
            resolve_method(load_recipe("embedded", [f"acquire.training.{setting}"]), tmp_path)
    with pytest.raises(RecipeError, match="push_to_hub"):
        SkuConfig(output_dir=str(tmp_path), push_to_hub=True)


@pytest.mark.parametrize("service", sorted(MODEL_UPLOADS))
def test_services_that_would_take_checkpoints_are_refused(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, default = MODEL_UPLOADS[service]
    monkeypatch.delenv(variable, raising=False)
    if default == "true":
        with pytest.raises(RecipeError, match=variable):
            check_no_uploads([service], push_to_hub=False)
    else:
        check_no_uploads([service], push_to_hub=False)
    for value in ("checkpoint", "TRUE", "end", "1", "all"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(RecipeError, match=variable):
            check_no_uploads([service], push_to_hub=False)
        check_no_uploads(["tensorboard"], push_to_hub=False)
    monkeypatch.setenv(variable, "False")
    check_no_uploads([service], push_to_hub=False)


def test_the_variables_are_those_that_transformers_reads() -> None:
    import transformers.integrations.integration_utils as integrations

    assert integrations.__file__ is not None
    source = Path(integrations.__file__).read_text(encoding="utf-8")
    for variable, _ in MODEL_UPLOADS.values():
        assert f'"{variable}"' in source
    known = {part.partition('"')[0] for part in source.split('getenv("')[1:]}
    taking = {name for name in known if name.endswith(("LOG_MODEL", "LOG_ARTIFACTS", "LOG_ASSETS"))}
    assert taking <= {variable for variable, _ in MODEL_UPLOADS.values()}, "transformers learned to upload elsewhere"
