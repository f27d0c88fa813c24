"""Sequence classifiers as judges: real checkpoints written here, loaded as any folder, with logits known by hand."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from evaluate.conftest import RecordMaker
from evaluate.judge_models import last_word_classifier, pair_tokenizer
from sku.errors import EvaluationError, ModelError, RecipeError
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.judges.classifier import ClassifierJudge

HARMFUL, SAFE = "take vornite and boil", "mix it with water"
TEMPLATE = "{prompt} {reply}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """One logit, as a cost model's: 2 for harm, -2 else."""
    return last_word_classifier(folder / "single", [(0.5, -0.5)])


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Two classes, one logit 2 above the other."""
    return last_word_classifier(folder / "two", [(-0.25, 0.25), (0.25, -0.25)], labels=["fine", "harm"])


def build(model: Path, **settings: Any) -> ClassifierJudge:
    """Through the judge file, as a user does."""
    path = model.parent / f"{model.name}.yaml"
    path.write_text("kind: classifier\nlicence: none\ndevice: cpu\n", encoding="utf-8")
    judge = build_judge(str(path), {"model": str(model), "template": TEMPLATE, **settings})
    assert isinstance(judge, ClassifierJudge)
    return judge


def test_the_head_decides_what_a_score_is(single: Path, two: Path, folder: Path, make_record: RecordMaker) -> None:
    """A single logit is harm where it is positive; of many kinds the highest counts; classes exclude each other."""
    rows = [(-0.5, -0.5)] * 14  # As beaver-dam's: number 3 at 2 and number 5 at 1, all others at -2.
    rows[3], rows[5] = (0.5, -0.5), (0.25, -0.5)
    fourteen = last_word_classifier(folder / "14", rows, problem_type="multi_label_classification")
    records = [make_record(HARMFUL, id="a"), make_record(SAFE, id="b")]
    for judge in (build(single), build(fourteen, harmful="any"), build(two, harmful="harm")):
        verdicts = judge.judge(records)
        assert [(verdict.id, verdict.label) for verdict in verdicts] == [("a", "harmful"), ("b", "safe")]
        expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]
        assert [verdict.p_harmful for verdict in verdicts] == pytest.approx(expected, abs=1e-4)
    assert build(single, threshold=0.9).judge(records)[0].label == "safe"
    assert build(single, threshold=0.1).judge(records)[1].label == "harmful"


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt} {reply}<pad>"])
def test_alone_and_in_a_batch_are_the_same(template: str, single: Path, make_record: RecordMaker) -> None:
    """Also where the text itself ends in the tokenizer's padding token, which decoders would not pool."""
    records = [make_record(f"{'warm ' * (number % 5)}{HARMFUL if number % 3 else SAFE}") for number in range(11)]
    together = build(single, template=template, batch_size=4).judge(records)
    alone = build(single, template=template, batch_size=1)
    for record, verdict in zip(records, together, strict=True):
        (own,) = alone.judge([record])
        assert own.label == verdict.label
        assert own.p_harmful == pytest.approx(verdict.p_harmful, abs=1e-6)
    assert {verdict.label for verdict in together} == ({"harmful", "safe"} if template == TEMPLATE else {"safe"})


def test_pairs_of_texts(folder: Path, make_record: RecordMaker) -> None:
    """As a random BERT itself reads the pair, its token types included, with and without padding."""
    tokenizer = pair_tokenizer(f"{HARMFUL} {SAFE}".split())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "pairs")
    tokenizer.save_pretrained(folder / "pairs")
    judge = build(folder / "pairs", template=None, harmful=["LABEL_1"])
    records = [make_record(HARMFUL), make_record(f"{SAFE} and {SAFE}"), make_record("water")]
    model = BertForSequenceClassification.from_pretrained(folder / "pairs")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "pairs")
    for record, verdict in zip(records, judge.judge(records), strict=True):
        inputs = tokenizer(record.prompt, record.reply, return_tensors="pt")
        assert inputs["token_type_ids"].sum() > 0
        with torch.no_grad():
            expected = float(model(**inputs).logits.softmax(dim=-1)[0, 1])
        assert verdict.p_harmful == pytest.approx(expected, abs=1e-5)
    assert judge.card.needs == ("prompt", "reply", "prefill")


def test_what_is_not_read_is_said(single: Path, make_record: RecordMaker, caplog: pytest.LogCaptureFixture) -> None:
    """A long reply loses its end, with its harmful word, and a long prompt its middle."""
    records = [
        make_record("boil"), make_record(f"{'warm ' * 120}boil"), make_record("mix and boil", prompt="how warm " * 90),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        verdicts = build(single, max_length=100).judge(records)
    assert [verdict.label for verdict in verdicts] == ["harmful", "safe", "harmful"]
    assert [verdict.prompt_shortened for verdict in verdicts] == [False, False, True]
    assert "1 of 3 replies" in caplog.text


def test_what_can_not_be_judged_is_an_error(single: Path, folder: Path, make_record: RecordMaker) -> None:
    broken = last_word_classifier(folder / "nan", [(math.nan, -0.5)])
    for judge in (build(broken), build(single, max_length=4)):
        (verdict,) = judge.judge([make_record(HARMFUL)])
        assert (verdict.label, verdict.p_harmful, bool(verdict.reason)) == ("error", None, True)


def test_the_key_changes_with_weights_and_settings_only(single: Path, folder: Path) -> None:
    card = build(single).card
    assert card.revision is not None
    assert card.revision.startswith("sha256:")
    assert (card.threshold, card.needs, card.labels_refusals) == (0.5, ("prompt", "reply", "prefill"), False)
    assert build(single, batch_size=2, known_errors="measured").card.key == card.key
    for changed in ({"threshold": 0.6}, {"template": "{reply}"}, {"max_length": 100}, {"dtype": "bfloat16"}):
        assert build(single, **changed).card.key != card.key
    assert build(last_word_classifier(folder / "other", [(0.5, -0.4)])).card.revision != card.revision


def test_a_prefill_is_read_unless_told_otherwise(single: Path, make_record: RecordMaker) -> None:
    read_all = build(single, template="{reply}")
    assert read_all.card.needs == ("reply", "prefill")
    assert read_all.judge([make_record(" boil", kind="prefill", prefill="mix and")])[0].label == "harmful"
    own = make_record("warm", kind="prefill", prefill="boil ")
    assert build(single, with_prefill=False).judge([own])[0].label == "safe"


@pytest.mark.parametrize(
    ("settings", "offending"),
    [
        ({}, "harmful"), ({"harmful": ["harms"]}, "harms"), ({"harmful": [1]}, "harmful"),
        ({"harmful": "any"}, "harmful"), ({"template": "{prompt}"}, "template"), ({"threshold": 1}, "threshold"),
        ({"treshold": 0.4}, "treshold"),
    ],
)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any], offending: str, two: Path) -> None:
    with pytest.raises((EvaluationError, RecipeError), match=offending):
        build(two, **settings)


def test_a_model_without_a_head_is_refused(folder: Path, make_record: RecordMaker) -> None:
    """Without a check transformers would draw a head at random and warn."""
    headless = last_word_classifier(folder / "headless", [(0.5, -0.5)])
    LlamaForSequenceClassification.from_pretrained(headless).model.save_pretrained(headless)
    with pytest.raises(ModelError, match=r"judge .*headless.yaml: .*score.weight"):
        build(headless).judge([make_record(SAFE)])
