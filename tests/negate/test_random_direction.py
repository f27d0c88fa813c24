"""A random change as large as a task vector."""

from __future__ import annotations

import pytest
import torch

from conftest import ModelMaker
from sku.errors import TaskVectorError
from sku.negate.random_direction import random_direction
from sku.negate.task_vector import unique_weights


def test_norms_are_those_asked_for_and_nothing_else_is_changed(make_model: ModelMaker) -> None:
    model = make_model()
    names = sorted(unique_weights(model)[0])[:3]
    norms = {name: 0.5 + place for place, name in enumerate(names)}
    vector = random_direction(model, norms, seed=3)
    assert vector.norms() == pytest.approx(norms, rel=1e-5)


def test_equal_seeds_give_equal_directions(make_model: ModelMaker) -> None:
    model = make_model()
    name = sorted(unique_weights(model)[0])[0]
    first, again, other = (random_direction(model, {name: 1.0}, seed).deltas[name] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), other.flatten(), dim=0)
    assert abs(float(cosine)) < 0.2


def test_a_norm_of_0_is_no_change(make_model: ModelMaker) -> None:
    model = make_model()
    name = sorted(unique_weights(model)[0])[0]
    assert float(random_direction(model, {name: 0.0}, 0).deltas[name].abs().max()) == 0


def test_a_name_that_the_model_lacks(make_model: ModelMaker) -> None:
    with pytest.raises(TaskVectorError, match="the norms name a weight nowhere.weight"):
        random_direction(make_model(), {"nowhere.weight": 1.0}, seed=0)
