"""The embedded world, its model, and a model that was quickly unlearned there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks import AttackReport, relearn
from sku.attacks.run import run_attacks
from sku.config import Recipe, load_recipe
from sku.data.examples import ForgetRetainData
from sku.data.load import load_data
from sku.models import load_model
from sku.negate.task_vector import negate


def world_recipe(*changes: str) -> Recipe:
    """Few questions and steps, for the embedded world."""
    return load_recipe("embedded-paper", ["evaluate.attack_prompts=8", "evaluate.max_new_tokens=32", *changes])


@dataclass(frozen=True)
class World:
    """No test changes it."""

    data: ForgetRetainData
    base: PreTrainedModel
    """Answers every hazard."""
    unlearned: PreTrainedModel
    """Refuses every hazard, and more than it should: a short task vector, subtracted."""
    tokenizer: PreTrainedTokenizerBase

    def attack(
        self, folder: Path, *changes: str, model: PreTrainedModel | None = None, base: PreTrainedModel | None = None,
        data: ForgetRetainData | None = None, relearning: tuple[Any, Any, Any] = ((10,), (4, 16), (1e-3,)),
        **options: Any,
    ) -> AttackReport:  # fmt: skip
        """Attacks the unlearned model; relearns on few pairs, for few steps, at a high rate."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in zip(("PAIRS", "STEPS", "LEARNING_RATES"), relearning, strict=True):
                patch.setattr(relearn, name, value)
            return run_attacks(
                world_recipe(*changes), model or self.unlearned, base or self.base, self.tokenizer, data or self.data,
                folder, **options,
            )  # fmt: skip


@pytest.fixture(scope="session")
def world_data() -> ForgetRetainData:
    recipe = world_recipe()
    return load_data(recipe.data, recipe.seed)


@pytest.fixture(scope="session")
def world(world_data: ForgetRetainData, quickly_trained: PreTrainedModel) -> World:
    loaded = load_model("embedded")
    return World(world_data, loaded.model, negate(loaded.model, quickly_trained, 1.25), loaded.tokenizer)
