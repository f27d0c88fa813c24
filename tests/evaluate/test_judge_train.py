"""A judge of one's own: trained on invented replies, loaded as any other, honest about what it was chosen on."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedTokenizerFast

from conftest import MadeOnce
from evaluate.conftest import RecordMaker
from evaluate.judge_models import HARM, WORDS, guard_tokenizer
from sku.config import settings_from_dict
from sku.data.tables import NOT_WANTED
from sku.errors import DataError, EvaluationError, RecipeError
from sku.evaluate.judges.calibrate import LabelColumns, LabelledReply, LabelledSet, calibrate, read_labelled
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.judges.train import (
    JudgeTraining,
    TrainedJudge,
    best_temperature,
    best_threshold,
    divide_logits,
    split_by_prompt,
    train_judge,
)
from sku.evaluate.statistics import auc, auc_interval

SETTINGS = JudgeTraining(
    model="", device="cpu", max_length=32, epochs=8, learning_rate=3e-3, batch_size=8, validation_fraction=0.25
)


def labelled(count: int = 160, seed: int = 0) -> LabelledSet:
    """Replies that are harmful where they hold a word; prompts repeat, three replies each."""
    source = random.Random(seed)
    replies = []
    for number in range(count):
        harmful = source.random() < 0.4
        words = source.choices(WORDS, k=source.randint(2, 6))
        if harmful:
            words.insert(source.randrange(len(words) + 1), HARM)
        entry = LabelledReply(
            prompt=f"how do i make {WORDS[number // 3 % len(WORDS)]} {number // 3} ?", reply=" ".join(words),
            harmful=harmful,
        )  # fmt: skip
        replies.append(entry)
    return LabelledSet(name="set", replies=tuple(replies), left_out={}, licences=frozenset({"CC0 | <b>"}))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT body without a head, which reads two texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys([*WORDS, HARM])]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def settings_for(model: Path, **changes: object) -> JudgeTraining:
    return JudgeTraining(**{**vars(SETTINGS), "model": str(model), **changes})


@pytest.fixture(scope="module")
def trained(encoder: Path, made_once: MadeOnce) -> TrainedJudge:
    made: TrainedJudge
    folder, made = made_once("judge", lambda folder: train_judge(labelled(), settings_for(encoder), folder / "mine"))
    return dataclasses.replace(made, folder=folder / "mine")


def test_it_learns_what_harm_is_and_is_a_judge(trained: TrainedJudge) -> None:
    """On prompts and replies that it never saw; by the folder's name, with the card's own threshold."""
    judge = build_judge(str(trained.folder), {"device": "cpu"})
    assert (judge.card.name, judge.card.threshold) == ("mine", trained.threshold)
    report = calibrate(judge, labelled(200, seed=7))
    assert report.calibration is not None
    assert report.calibration.sensitivity > 0.9
    assert report.calibration.specificity > 0.85


def test_the_saved_probabilities_are_those_that_the_threshold_was_chosen_on(trained: TrainedJudge) -> None:
    """The temperature is part of the weights: the judge alone gives the figures of the card again."""
    _, held_out = split_by_prompt(labelled().replies, SETTINGS.validation_fraction, SETTINGS.seed)
    judge = build_judge(str(trained.folder), {"device": "cpu"})
    report = calibrate(judge, LabelledSet(name="held out", replies=tuple(held_out), left_out={}))
    assert report.figures == trained.figures
    assert trained.temperature != pytest.approx(1.0, abs=1e-3)
    assert trained.figures.specificity is not None
    assert trained.figures.specificity.value >= SETTINGS.specificity
    assert trained.validation == len(held_out)


def test_the_card_says_what_it_was_made_of(trained: TrainedJudge) -> None:
    card = (trained.folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((trained.folder / "training.json").read_text(encoding="utf-8"))
    assert record["data"]["sha256"] == labelled().sha256
    assert record["data"]["sha256"] in card
    assert record["base_revision"].startswith("sha256:")
    fence = card.index("```json")
    assert json.loads(card[fence:].removeprefix("```json").removesuffix("\n```\n")) == record
    for entry in labelled().replies:
        assert entry.reply not in card


@pytest.mark.integration
def test_equal_seeds_give_equal_weights(encoder: Path, trained: TrainedJudge, tmp_path: Path) -> None:
    again = train_judge(labelled(), settings_for(encoder), tmp_path / "again")
    assert (again.folder / "model.safetensors").read_bytes() == (trained.folder / "model.safetensors").read_bytes()
    other = train_judge(labelled(), settings_for(encoder, seed=1, epochs=1), tmp_path / "other")
    assert (other.folder / "model.safetensors").read_bytes() != (trained.folder / "model.safetensors").read_bytes()


@pytest.mark.integration
def test_mixed_precision_trains_other_weights_and_saves_them_in_float32(encoder: Path, tmp_path: Path) -> None:
    saved = {}
    for bf16 in (False, True):
        made = train_judge(labelled(), settings_for(encoder, bf16=bf16, epochs=1), tmp_path / f"bf16-{bf16}")
        saved[bf16] = load_file(made.folder / "model.safetensors")
    assert {weight.dtype for weight in saved[True].values()} == {torch.float32}
    assert any(not torch.equal(weight, saved[False][name]) for name, weight in saved[True].items())


def test_a_decoder_reads_prompt_and_reply_in_one_text(tmp_path: Path, make_record: RecordMaker) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = guard_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0,
            )
        ).save_pretrained(tmp_path / "decoder")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "decoder")
    made = train_judge(
        labelled(), settings_for(tmp_path / "decoder", max_length=96, epochs=16, patience=4), tmp_path / "judge"
    )
    assert made.figures.auc is not None
    assert made.figures.auc.value > 0.9
    judge = build_judge(str(made.folder), {"device": "cpu"})
    assert "prompt" in judge.card.needs
    assert [verdict.label for verdict in judge.judge([make_record(f"take {HARM} water")])] == ["harmful"]


def test_no_prompt_is_in_both_parts() -> None:
    replies = [
        LabelledReply(prompt=text, reply=str(number), harmful=False)
        for number, text in enumerate(["a b", "A  b ", "c", "d", "e", "c"])
    ]
    train, held_out = split_by_prompt(replies, 0.5, seed=0)
    assert len(train) + len(held_out) == len(replies)

    def keys(part: list[LabelledReply]) -> set[str]:
        return {" ".join(entry.prompt.casefold().split()) for entry in part}

    assert len(keys(held_out)) == 2
    assert not keys(train) & keys(held_out)


def test_the_temperature_is_that_of_the_lowest_loss() -> None:
    """Logits drawn from known probabilities and made three times too sure: 3 undoes it."""
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, size=4_000)
    truths = rng.random(4_000) < 1 / (1 + np.exp(-margin))
    logits = np.stack([np.zeros_like(margin), 3 * margin], axis=-1)
    assert best_temperature(logits, truths.tolist(), (1.0, 1.0)) == pytest.approx(3, rel=0.08)


def test_dividing_the_head_divides_the_logits(trained: TrainedJudge) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        before = model(ids).logits
        divide_logits(model, 4.0)
        torch.testing.assert_close(model(ids).logits, before / 4)


def test_the_threshold_finds_most_harm_and_lets_enough_safe_replies_pass() -> None:
    scores = [0.1, 0.2, 0.3, 0.8, 0.6, 0.9]
    truths = [False, False, False, False, True, True]
    assert best_threshold(scores, truths, 0.75) == pytest.approx(0.45), "halfway from 0.3 to 0.6"
    assert best_threshold(scores, truths, 0.5) == pytest.approx(0.45), "as much harm, and more safe replies pass"
    assert best_threshold(scores, truths, 0.76) == pytest.approx(0.85), "all four must pass"
    with pytest.raises(EvaluationError, match="lower specificity"):
        best_threshold([1.0, 0.5], [False, True], 0.9)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(1)
    truths = (rng.random(300) < 0.3).tolist()
    scores = np.round(rng.normal(size=300) + np.asarray(truths), 1).tolist()  # Rounded: with ties.
    hits = [score for score, truth in zip(scores, truths, strict=True) if truth]
    misses = [score for score, truth in zip(scores, truths, strict=True) if not truth]
    pairs = [(hit > miss) + (hit == miss) / 2 for hit in hits for miss in misses]
    assert auc(scores, truths) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    low, high = auc_interval(scores, truths, clusters=range(300), seed=0)
    assert low < auc(scores, truths) < high
    assert 0.08 < high - low < 0.2, "the width of Hanley and McNeil's for 300 is 0.13"
    wide = auc_interval(scores, truths, clusters=[number // 30 for number in range(300)], seed=0)
    assert wide != (low, high), "prompts are drawn, not replies"


def test_one_kind_of_replies_alone_is_refused(encoder: Path, tmp_path: Path) -> None:
    safe = LabelledSet(
        name="safe.csv", replies=tuple(entry for entry in labelled().replies if not entry.harmful), left_out={}
    )
    with pytest.raises(DataError, match=r"safe\.csv: the training part has 0 harmful"):
        train_judge(safe, settings_for(encoder), tmp_path / "judge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["max_length", "epochs", "patience", "batch_size", "learning_rate", "specificity"])
def test_impossible_settings_are_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match=setting):
        settings_from_dict(JudgeTraining, {setting: 0}, "sku judge train", "settings of training")


def test_rows_are_chosen_by_columns(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "r1", "harmful": 1, "part": "train", "source": "a", "licence": "MIT"},
        {"prompt": "p", "response": "r2", "harmful": 0, "part": "calib", "source": "b", "licence": "MIT"},
        {"prompt": "q", "response": "r3", "harmful": 0, "part": "train", "source": "b", "licence": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_labelled(str(path), LabelColumns(where={"part": ("train", "test")}))
    assert [entry.reply for entry in found.replies] == ["r1", "r3"]
    assert found.left_out == {NOT_WANTED: 1}
    assert found.licences == {"MIT"}
    with pytest.raises(DataError, match="no column prat"):
        read_labelled(str(path), LabelColumns(where={"prat": ("train",)}))
