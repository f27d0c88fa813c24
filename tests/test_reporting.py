"""``report_to``: curves go to tracking services, models in training never."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from sku.acquire.trainer import SkuConfig
from sku.config import load_recipe
from sku.errors import RecipeError
from sku.methods.run import resolve_method
from sku.training.config import MODEL_UPLOADS, check_no_uploads


def scalars(folder: Path) -> dict[str, list[float]]:
    """Tag -> values, from the event files of TensorBoard (records with their length before and checksums around)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        rest = path.read_bytes()
        while rest:
            (length,) = struct.unpack_from("<Q", rest)
            event = Event.FromString(rest[12 : 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append(value.simple_value)
            rest = rest[16 + length :]
    return found


def test_tensorboard_gets_every_loss_term(make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed (a development dependency)")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    trainer = make_trainer(report_to=["tensorboard"], logging_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = scalars(tmp_path / "curves")
    terms = {name for entry in logged for name in entry if name.rpartition("/")[2] in {"guided_distortion", "loss"}}
    assert len(terms) >= 2
    for name in terms:
        assert curves[f"train/{name}"] == pytest.approx([entry[name] for entry in logged], rel=1e-6)


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("tensorbord", "tensorbord is not a service that transformers knows. Did you mean tensorboard"),
        ("wandb", "wandb needs a package that is missing: pip install wandb"),
        ("flyte", "flyte uploads every checkpoint"),
    ],
)
def test_services_that_can_not_be_used_stop_before_anything_is_loaded(
    service: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sku.training.config.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(RecipeError, match=f"acquire.training: .*{message}|{message}"):
        resolve_method(load_recipe("embedded", [f"acquire.training.report_to=[{service}]"]), tmp_path)


def test_the_model_in_training_is_never_uploaded(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="push_to_hub must be False: a model in training is never uploaded"):
        resolve_method(load_recipe("embedded", ["acquire.training.push_to_hub=true"]), tmp_path)
    with pytest.raises(RecipeError, match="push_to_hub must be False"):
        SkuConfig(output_dir=str(tmp_path), push_to_hub=True)


@pytest.mark.parametrize("service", sorted(MODEL_UPLOADS))
def test_services_that_would_take_checkpoints_are_refused(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, default = MODEL_UPLOADS[service]
    monkeypatch.delenv(variable, raising=False)
    if default == "true":
        with pytest.raises(RecipeError, match=f"set {variable}=false"):
            check_no_uploads([service], push_to_hub=False)
    else:
        check_no_uploads([service], push_to_hub=False)
    for value in ("checkpoint", "TRUE", "end", "1", "all"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(RecipeError, match=f"{variable} is {value}"):
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
