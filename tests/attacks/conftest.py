"""The embedded world's model, and a model that was quickly unlearned there."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import Recipe, load_recipe
from sku.data.examples import ForgetRetainData
from sku.data.load import load_data
from sku.models import load_model
from sku.negate.task_vector import negate


def world_recipe(*changes: str) -> Recipe:
    """Few questions and steps, for the embedded world."""
    return load_recipe("embedded-paper", ["evaluate.attack_prompts=8", "evaluate.max_new_tokens=32", *changes])


@pytest.fixture(scope="session")
def world_data() -> ForgetRetainData:
    recipe = world_recipe()
    return load_data(recipe.data, recipe.seed)


@pytest.fixture(scope="session")
def world_tokenizer() -> PreTrainedTokenizerBase:
    return load_model("embedded").tokenizer


@pytest.fixture(scope="session")
def world_base() -> PreTrainedModel:
    """Answers every hazard. No test changes it."""
    return load_model("embedded").model


@pytest.fixture(scope="session")
def world_unlearned(world_base: PreTrainedModel, quickly_trained: PreTrainedModel) -> PreTrainedModel:
    """Refuses every hazard, and more than it should: a short task vector, subtracted."""
    return negate(world_base, quickly_trained, 1.25)
