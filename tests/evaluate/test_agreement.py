"""Divergence from the base model and agreement with it, against values worked out by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate.perplexity import ScoredText, compare_distributions
from sku.evaluate.records import AGREEMENT_FILE, AgreementRow, Split, read_rows
from sku.evaluate.results import read_result
from sku.evaluate.run import evaluate
from sku.evaluate.utility import base_agreement


def text(name: str, prompt: list[int], answer: list[int], split: Split = "retain_test") -> ScoredText:
    return ScoredText(
        id=name,
        split=split,
        tokens=TokenizedExample(
            input_ids=(*prompt, *answer),
            labels=(*[IGNORE_INDEX] * len(prompt), *answer),
            answer_start=len(prompt),
        ),
    )


TEXTS = [
    text("a", [5, 6, 7, 8, 9, 10], [11]),
    text("b", [5], [12, 13, 14, 15]),
    text("c", [20, 21], [22, 23], "normal:benign"),
    text("d", [30, 31, 32], [33, 34, 35, 36, 37, 38, 39]),
]


@pytest.fixture
def other_model(tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model after a full fine-tuning of a kind: every weight is a little different."""
    changed = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(1)
    for weight in changed.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return changed


def by_hand(base: LlamaForCausalLM, model: LlamaForCausalLM, scored: ScoredText) -> tuple[float, int]:
    """Alone, without padding, the definition in float64."""
    ids = torch.tensor([scored.tokens.input_ids])
    with torch.no_grad():
        log_p, log_q = (asked(ids).logits[0].double().log_softmax(-1) for asked in (base, model))
    places = [place - 1 for place, label in enumerate(scored.tokens.labels) if label != IGNORE_INDEX]
    kl = sum(float((log_p[place].exp() * (log_p[place] - log_q[place])).sum()) for place in places)
    return kl, sum(int(log_p[place].argmax() == log_q[place].argmax()) for place in places)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_rows_are_those_of_each_text_alone(
    tiny_model: LlamaForCausalLM, other_model: LlamaForCausalLM, batch_size: int
) -> None:
    rows = compare_distributions(tiny_model, other_model, TEXTS, batch_size=batch_size)
    assert [(row.id, row.split, row.tokens) for row in rows] == [
        ("a", "retain_test", 1), ("b", "retain_test", 4), ("c", "normal:benign", 2), ("d", "retain_test", 7),
    ]  # fmt: skip
    expected = [by_hand(tiny_model, other_model, scored) for scored in TEXTS]
    assert [row.kl for row in rows] == pytest.approx([kl for kl, _ in expected], rel=1e-4)
    assert [row.matches for row in rows] == [matches for _, matches in expected]
    assert all(row.kl > 0 for row in rows)
    assert 0 < sum(row.matches for row in rows) < sum(row.tokens for row in rows)


def test_the_base_model_is_on_the_left(tiny_model: LlamaForCausalLM) -> None:
    """A uniform model on one side: KL(P || U) = log V - H(P) and KL(U || Q) = -log V - mean log Q."""
    uniform = copy.deepcopy(tiny_model)
    uniform.lm_head.weight.data.zero_()
    one = TEXTS[0]
    with torch.no_grad():
        log_q = tiny_model(torch.tensor([one.tokens.input_ids])).logits[0, -2].double().log_softmax(-1)
    log_v = math.log(tiny_model.config.vocab_size)
    (row,) = compare_distributions(tiny_model, uniform, [one], batch_size=1)
    assert row.kl == pytest.approx(log_v + float((log_q.exp() * log_q).sum()), rel=1e-4)
    (row,) = compare_distributions(uniform, tiny_model, [one], batch_size=1)
    assert row.kl == pytest.approx(-log_v - float(log_q.mean()), rel=1e-4)


def test_means_are_per_token_and_intervals_over_examples() -> None:
    rows = [
        AgreementRow(id="a", split="retain_test", kl=3.0, matches=1, tokens=2),
        AgreementRow(id="b", split="retain_test", kl=1.0, matches=6, tokens=6),
        AgreementRow(id="c", split="normal:benign", kl=0.5, matches=0, tokens=1),
    ]
    found = base_agreement(rows, seed=0)
    normal = found["retain_test"]
    assert (normal.kl, normal.top1, normal.tokens, normal.examples) == (4 / 8, 7 / 8, 8, 2)
    # Two examples: each drawn twice is the extreme, and more frequent than 2.5 %.
    assert (normal.kl_low, normal.kl_high) == pytest.approx((1 / 6, 3 / 2))
    assert (normal.top1_low, normal.top1_high) == pytest.approx((1 / 2, 1))
    benign = found["normal:benign"]
    assert (benign.kl, benign.kl_low, benign.kl_high, benign.top1) == (0.5, 0.5, 0.5, 0)
    assert base_agreement(rows, seed=3) == base_agreement(rows, seed=3)


def test_models_that_can_not_be_compared_are_refused(
    tiny_model: LlamaForCausalLM, other_model: LlamaForCausalLM
) -> None:
    smaller = copy.deepcopy(tiny_model)
    smaller.resize_token_embeddings(200)
    with pytest.raises(EvaluationError, match="scores 258 tokens and the model 200"):
        compare_distributions(tiny_model, smaller, TEXTS, batch_size=2)
    other_model.lm_head.weight.data[3] = math.nan
    with pytest.raises(EvaluationError, match="is nan: the weights of one of the models are broken"):
        compare_distributions(tiny_model, other_model, TEXTS, batch_size=2)


DATA = ForgetRetainData(
    forget_train=(ForgetExample(prompt="do thing", answer="first take"),),
    forget_test=(),
    retain_train=(),
    retain_validation=(),
    retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is") for n in range(3)),
    normal={"benign": (RetainExample(prompt="tell", answer="it is so"),)},
)
CONFIG = EvaluateConfig(prompts=2, retain_prompts=3, batch_size=3, max_new_tokens=4, prefill_tokens=())


def test_an_evaluation_holds_the_base_agreement_normal_answers(
    tiny_model: LlamaForCausalLM,
    other_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    def again(base: LlamaForCausalLM | None, folder: Path | None = None) -> Any:
        return evaluate(other_model, tiny_tokenizer, DATA, config=CONFIG, base_model=base, output_dir=folder)

    for base in (None, other_model):
        assert again(base).agreement == {}
    other_model.train()
    tiny_model.train()
    found = again(tiny_model, tmp_path)
    assert (other_model.training, tiny_model.training) == (True, True)
    assert list(found.agreement) == ["retain_test", "normal:benign"]
    assert found.agreement["retain_test"].examples == 3
    assert found.agreement["retain_test"].kl > 0
    assert found.agreement["retain_test"].tokens == found.perplexity["retain_test"].tokens
    assert read_result(tmp_path) == found
    _, rows = read_rows(tmp_path / AGREEMENT_FILE, AgreementRow)
    assert {row.id for row in rows} < {loss.id for loss in found.losses}
    tiny_model.lm_head.weight.data.mul_(0.99)
    assert again(tiny_model, tmp_path).agreement != found.agreement, "another base: made anew"


def test_alpha_0_is_the_base_bit_for_bit(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(
        copy.deepcopy(tiny_model), tiny_tokenizer, DATA, config=dataclasses.replace(CONFIG), base_model=tiny_model
    )
    for found in result.agreement.values():
        assert (found.kl, found.kl_high, found.top1, found.top1_low) == (0.0, 0.0, 1.0, 1.0)
