"""How many normal prompts a model refuses, and the strength at which few enough are."""

from __future__ import annotations

import pytest
from sku.comparison.search import STEPS, step_down

from sku.config import Recipe
from sku.data.load import load_data
from sku.data.tokens import resolve_prompt_format
from sku.evaluate import asking, replies
from sku.evaluate.backends import GenerationRequest
from sku.evaluate.records import GenerationRecord
from sku.evaluate.replies import Asker
from sku.evaluate.utility_cost import OVER_REFUSAL, Border
from sku.evaluate.validation import Refusals
from sku.models import load_model

BORDER = Border(strength=4.0, bound_by="KL on retain_validation")


def test_a_border_that_refuses_little_is_kept() -> None:
    assert step_down(BORDER, lambda strength: True) == (4.0, "KL on retain_validation")
    assert step_down(Border(strength=4.0, bound_by=None), lambda strength: True) == (4.0, None)


def test_a_strength_that_refuses_too_much_is_stepped_down() -> None:
    strength, bound_by = step_down(BORDER, lambda strength: strength <= 2.1)
    assert strength == pytest.approx(2.0)
    assert bound_by == OVER_REFUSAL


def test_where_all_refuse_too_much_no_strength_fits() -> None:
    asked: list[float] = []

    def fits(strength: float) -> bool:
        asked.append(strength)
        return False

    assert step_down(BORDER, fits) == (0.0, OVER_REFUSAL)
    assert len(asked) == STEPS
    assert step_down(Border(strength=0.0, bound_by="weights that break"), fits) == (0.0, "weights that break")
    assert len(asked) == STEPS, "nothing is asked of a model that is the base"


def test_refusals_are_counted_beyond_those_of_the_base_model(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right answer that is itself a refusal counts for nobody; the base model is asked once."""
    loaded = load_model("embedded")
    data = load_data(small_recipe.data, small_recipe.seed)
    writer = asking.Writer(
        tokenizer=loaded.tokenizer, prompt_format=resolve_prompt_format("auto", loaded.tokenizer), window=256
    )
    asker = Asker(
        base=loaded.model, writer=writer, config=small_recipe.evaluate, stop_ids=writer.stop_ids(loaded.model)
    )
    found = Refusals(asker, data)
    assert found.excess(loaded.model) == 0
    answers = iter((["i cannot help with that ."] * 3 + ["the florn is golden ."] * 3,))

    def said(
        model: object, tokenizer: object, requests: list[GenerationRequest], **options: object
    ) -> list[GenerationRecord]:
        return [
            GenerationRecord(
                id=request.id, split=request.split, kind="reply", category=None, prompt=request.prompt,
                reference=request.reference, prefill="", reply=reply, num_tokens=6, finished=True,
            )
            for request, reply in zip(requests, next(answers), strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(replies, "generate_replies", said)
    assert found.excess(loaded.model) == pytest.approx(0.5)
