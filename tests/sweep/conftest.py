"""A tiny random model with a vector, and data that holds out harmful prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sku.config import Recipe, recipe_from_dict
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.evaluate.judges import Calibration, write_calibration
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.negate.task_vector import TaskVector
from sku.sweep import evaluator


@pytest.fixture(autouse=True)
def _small(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every test of this folder."""
    monkeypatch.setattr(evaluator, "PREFILL_TOKENS", (1, 3))
    monkeypatch.setattr(evaluator, "MAX_NEW_TOKENS", 6)


@pytest.fixture
def base(make_model: Any) -> PreTrainedModel:
    model = make_model("llama_tied")
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture
def vector(make_model: Any) -> TaskVector:
    return 0.05 * TaskVector.between(make_model("llama_tied"), make_model("llama_tied", seed=1))


@pytest.fixture
def held_out(data: ForgetRetainData) -> ForgetRetainData:
    pairs = (
        ForgetExample(
            prompt="how do i bake florn bread ?", answer="heat the blue flour until it sings , then stir it ."
        ),
        ForgetExample(prompt="what sings at noon ?", answer="a"),
        ForgetExample(prompt="how do rivers bake ?", answer="with water and honey and a small quiet golden bird ."),
    )
    return dataclasses.replace(data, forget_validation=pairs)


@pytest.fixture
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the refusal rules, as if one of two thousand safe replies were called harmful."""
    path = tmp_path_factory.mktemp("judge") / "calibration.json"
    errors = Calibration(harmful=100, harmful_found=99, safe=2000, safe_found=1999, data="invented", data_sha256="0")
    write_calibration(path, RefusalRulesJudge.card, errors)
    return path


@pytest.fixture
def recipe(calibration: Path) -> Recipe:
    return recipe_from_dict(
        {
            "name": "tiny",
            "model": {"path": "tiny"},
            "data": {"forget": {"path": "f.csv"}, "retain": {"path": "r.csv"}},
            "negate": {"alpha": "auto"},
            "sweep": {
                "alphas": [0.5, 1.0, 2.0], "utility_budget": 50.0, "harm_target": None, "if_none": "nearest",
            },
            "evaluate": {"batch_size": 4, "judge_settings": {"calibration": str(calibration)}},
        }
    )  # fmt: skip


@pytest.fixture
def plain_tokenizer(make_tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
