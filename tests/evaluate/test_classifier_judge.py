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
from evaluate.judge_models import guard_tokenizer, last_word_classifier, pair_tokenizer
from sku.errors import EvaluationError, ModelError, RecipeError
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.judges.classifier import ClassifierJudge
from sku.evaluate.judges.local_models import Encoded

HARMFUL, SAFE = "take vornite and boil", "mix it with water"
TEMPLATE = "{prompt} {reply}"


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """One logit, as a cost model's: 2 for harm, -2 else."""
    return last_word_classifier(folder / "single", [(0.5, -0.5)])


@pytest.fixture(scope="module")
def fourteen(folder: Path) -> Path:
    """Fourteen independent kinds of harm, as beaver-dam's: number 3 at 2 and number 5 at 1, all others at -2."""
    rows = [(-0.5, -0.5)] * 14
    rows[3], rows[5] = (0.5, -0.5), (0.25, -0.5)
    labels = [f"kind_{number}" for number in range(14)]
    return last_word_classifier(folder / "14", rows, labels=labels, problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Two classes, one logit 2 above the other."""
    return last_word_classifier(folder / "two", [(-0.25, 0.25), (0.25, -0.25)], labels=["fine", "harm"])


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Path:
    """A random BERT that reads prompt and reply as a pair of texts with token types."""
    tokenizer = pair_tokenizer(f"{HARMFUL} {SAFE}".split())
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=32, initializer_range=0.5,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "pairs")
    tokenizer.save_pretrained(folder / "pairs")
    return folder / "pairs"


def build(model: Path, **settings: Any) -> ClassifierJudge:
    """Through the judge file, as a user does."""
    path = model.parent / f"{model.name}.yaml"
    path.write_text("kind: classifier\nlicence: none\ndevice: cpu\n", encoding="utf-8")
    judge = build_judge(str(path), {"model": str(model), "template": TEMPLATE, **settings})
    assert isinstance(judge, ClassifierJudge)
    return judge


def test_the_head_decides_what_a_score_is(single: Path, fourteen: Path, two: Path, make_record: RecordMaker) -> None:
    """A single logit is harm where it is positive; of many kinds the highest counts; classes exclude each other."""
    records = [make_record(HARMFUL, id="a"), make_record(SAFE, id="b")]
    for judge in (build(single), build(fourteen, harmful="any"), build(two, harmful="harm")):
        verdicts = judge.judge(records)
        assert [(verdict.id, verdict.label) for verdict in verdicts] == [("a", "harmful"), ("b", "safe")]
        assert [verdict.p_harmful for verdict in verdicts] == pytest.approx([sigmoid(2), sigmoid(-2)], abs=1e-4)


def test_the_threshold_decides(single: Path, make_record: RecordMaker) -> None:
    assert build(single, threshold=0.9).judge([make_record(HARMFUL)])[0].label == "safe"
    assert build(single, threshold=0.1).judge([make_record(SAFE)])[0].label == "harmful"


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt} {reply}<|im_end|>", "{prompt} {reply}<pad>"])
def test_alone_and_in_a_batch_are_the_same(template: str, single: Path, make_record: RecordMaker) -> None:
    """Also where the text itself ends in the tokenizer's padding token, which decoders would not pool."""
    records = [make_record(f"{'warm ' * (number % 5)}{HARMFUL if number % 3 else SAFE}") for number in range(11)]
    together = build(single, template=template, batch_size=4).judge(records)
    alone = build(single, template=template, batch_size=1)
    for record, verdict in zip(records, together, strict=True):
        (own,) = alone.judge([record])
        assert own.label == verdict.label
        assert own.p_harmful == pytest.approx(verdict.p_harmful, abs=1e-6)
    expected = {"harmful", "safe"} if template == TEMPLATE else {"safe"}
    assert {verdict.label for verdict in together} == expected


def test_pairs_of_texts(pairs: Path, make_record: RecordMaker) -> None:
    """As the model itself reads the pair, its token types included, with and without padding."""
    judge = build(pairs, template=None, harmful=["LABEL_1"])
    records = [make_record(HARMFUL), make_record(f"{SAFE} and {SAFE}"), make_record("water")]
    model = BertForSequenceClassification.from_pretrained(pairs)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pairs)
    for record, verdict in zip(records, judge.judge(records), strict=True):
        inputs = tokenizer(record.prompt, record.reply, return_tensors="pt")
        assert inputs["token_type_ids"].sum() > 0
        with torch.no_grad():
            expected = float(model(**inputs).logits.softmax(dim=-1)[0, 1])
        assert verdict.p_harmful == pytest.approx(expected, abs=1e-5)
    assert judge.card.needs == ("prompt", "reply", "prefill")


def test_a_long_reply_loses_its_end(single: Path, make_record: RecordMaker, caplog: pytest.LogCaptureFixture) -> None:
    judge = build(single, max_length=16)
    with caplog.at_level(logging.WARNING):
        short, long = judge.judge([make_record("mix and boil"), make_record(f"{'warm ' * 30}boil")])
    assert (short.label, long.label) == ("harmful", "safe"), "the harmful word was not read"
    row = judge.encoders[0].encode(make_record("").prompt, f"{'warm ' * 30}boil")
    assert isinstance(row, Encoded)
    assert (row.kept, row.length) == (22, 154)
    tokenizer = guard_tokenizer()
    needed = [len(tokenizer(f"how do i make zorvex gel ? {('warm ' * 30)[:kept]}")["input_ids"]) for kept in (22, 23)]
    assert needed == [16, 17], "not a character less than would have fitted"
    assert "1 of 2 replies" in caplog.text


LONG_PROMPT = f"how do i make zorvex gel {'warm ' * 120}then wait ?"


@pytest.mark.parametrize(("max_length", "reply"), [(100, "mix it and boil"), (120, f"{'warm ' * 12}boil")])
def test_a_long_prompt_loses_its_middle_so_that_the_whole_reply_is_read(
    max_length: int, reply: str, single: Path, make_record: RecordMaker
) -> None:
    """The verdict hangs on the reply's last word; without room for it there was none."""
    judge = build(single, max_length=max_length)
    whole, short = judge.judge([make_record(reply, prompt=LONG_PROMPT), make_record("boil")])
    assert (whole.label, whole.prompt_shortened) == ("harmful", True)
    assert not short.prompt_shortened
    (encoder,) = judge.encoders
    row = encoder.encode(LONG_PROMPT, reply)
    assert isinstance(row, Encoded)
    read = str(guard_tokenizer().decode(list(row.ids)))
    assert read.startswith("how do i make zorvex gel warm")
    assert "then wait ?" in read
    assert " [...] " in read
    assert read.endswith(reply)
    assert max_length - 8 < len(row.ids) <= max_length, "no more is left out than must be"


def test_a_reply_too_long_beside_the_ends_of_a_prompt_is_cut(single: Path) -> None:
    """A prompt that leaves at least half of the room stays whole; one that leaves less keeps its ends."""
    prompt = f"how do i make zorvex gel {'warm ' * 45}then wait ?"
    whole, short = (build(single, max_length=size).encoders[0] for size in (128, 110))
    kept, shortened = (encoder.encode(prompt, f"{'warm ' * 200}boil") for encoder in (whole, short))
    assert isinstance(kept, Encoded)
    assert isinstance(shortened, Encoded)
    assert not kept.prompt_shortened
    assert shortened.prompt_shortened
    assert 0 < kept.kept < kept.length
    assert 0 < shortened.kept < shortened.length


def test_scores_that_are_not_finite_are_errors(folder: Path, make_record: RecordMaker) -> None:
    broken = last_word_classifier(folder / "nan", [(math.nan, -0.5)])
    (verdict,) = build(broken).judge([make_record(HARMFUL)])
    assert (verdict.label, verdict.p_harmful, verdict.reason) == ("error", None, "the model's scores are not finite")


def test_the_key_changes_with_weights_and_settings_only(single: Path, folder: Path) -> None:
    card = build(single).card
    assert card.revision is not None
    assert card.revision.startswith("sha256:")
    assert (card.threshold, card.needs, card.labels_refusals) == (0.5, ("prompt", "reply", "prefill"), False)
    same = build(single, batch_size=2, known_errors="measured").card
    assert same.key == card.key
    for changed in ({"threshold": 0.6}, {"template": "{reply}"}, {"max_length": 100}, {"dtype": "bfloat16"}):
        assert build(single, **changed).card.key != card.key
    copy = last_word_classifier(folder / "copy", [(0.5, -0.5)])
    other = last_word_classifier(folder / "other", [(0.5, -0.4)])
    # Attention's weights are drawn anew and have no effect, but they are other weights.
    assert len({card.revision, build(copy).card.revision, build(other).card.revision}) == 3


def test_a_prefill_is_read_unless_told_otherwise(single: Path, make_record: RecordMaker) -> None:
    record = make_record(" boil", kind="prefill", prefill="mix and")
    read_all = build(single, template="{reply}")
    assert read_all.card.needs == ("reply", "prefill")
    assert read_all.judge([record])[0].label == "harmful"
    own = make_record("warm", kind="prefill", prefill="boil ")
    assert build(single, with_prefill=False).judge([own])[0].label == "safe"


@pytest.mark.parametrize(
    ("settings", "offending"),
    [
        ({}, "harmful"), ({"harmful": ["harms"]}, "harms"), ({"harmful": [1]}, "harmful"),
        ({"harmful": "any"}, "harmful"),
        ({"template": "{prompt}"}, "template"), ({"threshold": 1}, "threshold"), ({"treshold": 0.4}, "treshold"),
    ],
)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any], offending: str, two: Path) -> None:
    with pytest.raises((EvaluationError, RecipeError), match=offending):
        build(two, **settings)


def test_a_model_without_a_head_is_refused(folder: Path, make_record: RecordMaker) -> None:
    """Without a check transformers would draw a head at random and warn."""
    headless = folder / "headless"
    model = last_word_classifier(headless, [(0.5, -0.5)])
    LlamaForSequenceClassification.from_pretrained(model).model.save_pretrained(headless)
    with pytest.raises(ModelError, match=r"judge .*headless.yaml: .*score.weight"):
        build(headless).judge([make_record(SAFE)])
