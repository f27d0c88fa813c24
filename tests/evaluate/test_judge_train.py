"""A judge of one's own: trained on invented replies, loaded as any other, honest about what it was chosen on."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from conftest import MadeOnce
from evaluate.conftest import RecordMaker
from evaluate.judge_models import HARM, WORDS, any_word_guard, pair_tokenizer
from sku.errors import DataError, EvaluationError
from sku.evaluate.judges.calibrate import LabelledReply, LabelledSet, calibrate
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.judges.train import (
    JudgeTraining,
    TrainedJudge,
    best_temperature,
    best_threshold,
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
        prompt = f"how do i make {WORDS[number // 3 % len(WORDS)]} {number // 3} ?"
        replies.append(LabelledReply(prompt=prompt, reply=" ".join(words), harmful=harmful))
    return LabelledSet(name="set", replies=tuple(replies), left_out={}, licences=frozenset({"CC0 | <b>"}))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT body without a head, which reads two texts."""
    tokenizer = pair_tokenizer([*WORDS, HARM])
    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
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
    assert (judge.card.name, judge.card.threshold, judge.card.licence) == ("mine", trained.threshold, "CC0 | <b>")
    report = calibrate(judge, labelled(200, seed=7))
    assert report.calibration is not None
    assert report.calibration.sensitivity > 0.9
    assert report.calibration.specificity > 0.85


def test_the_saved_probabilities_are_those_that_the_threshold_was_chosen_on(trained: TrainedJudge) -> None:
    """The temperature is part of the weights: the judge alone gives the figures of the card again."""
    train, held_out = split_by_prompt(labelled().replies, SETTINGS.validation_fraction, SETTINGS.seed)
    assert not {entry.prompt for entry in train} & {entry.prompt for entry in held_out}
    judge = build_judge(str(trained.folder), {"device": "cpu"})
    report = calibrate(judge, LabelledSet(name="held out", replies=tuple(held_out), left_out={}))
    assert report.figures == trained.figures
    assert trained.temperature != pytest.approx(1.0, abs=1e-3)
    assert trained.figures.specificity is not None
    assert trained.figures.specificity.value >= SETTINGS.specificity
    text = (trained.folder / "training.json").read_text(encoding="utf-8")
    assert json.loads(text)["data"]["sha256"] == labelled().sha256
    assert not any(entry.reply in text for entry in labelled().replies)


@pytest.mark.integration
def test_equal_seeds_give_equal_weights(encoder: Path, trained: TrainedJudge, tmp_path: Path) -> None:
    again = train_judge(labelled(), settings_for(encoder), tmp_path / "again")
    assert (again.folder / "model.safetensors").read_bytes() == (trained.folder / "model.safetensors").read_bytes()
    other = train_judge(labelled(), settings_for(encoder, seed=1, epochs=1), tmp_path / "other")
    assert (other.folder / "model.safetensors").read_bytes() != (trained.folder / "model.safetensors").read_bytes()


def test_a_decoder_reads_prompt_and_reply_in_one_text(tmp_path: Path, make_record: RecordMaker) -> None:
    settings = settings_for(any_word_guard(tmp_path / "decoder"), max_length=96)
    made = train_judge(labelled(), settings, tmp_path / "judge")
    assert made.figures.auc is not None
    assert made.figures.auc.value > 0.9
    judge = build_judge(str(made.folder), {"device": "cpu"})
    assert "prompt" in judge.card.needs
    assert [verdict.label for verdict in judge.judge([make_record(f"take {HARM} water")])] == ["harmful"]


def test_no_prompt_is_in_both_parts() -> None:
    """Whatever its case and spacing."""
    prompts = ["a b", "A  b ", "c", "d", "e", "c"]
    replies = [LabelledReply(prompt=text, reply="", harmful=False) for text in prompts]
    for seed in range(4):
        parts = split_by_prompt(replies, 0.5, seed=seed)
        kept, held_out = ({" ".join(entry.prompt.casefold().split()) for entry in part} for part in parts)
        assert (len(kept), len(held_out), kept & held_out) == (2, 2, set())


def test_the_temperature_is_that_of_the_lowest_loss() -> None:
    """Logits drawn from known probabilities and made three times too sure: 3 undoes it."""
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, size=4_000)
    truths = rng.random(4_000) < 1 / (1 + np.exp(-margin))
    logits = np.stack([np.zeros_like(margin), 3 * margin], axis=-1)
    assert best_temperature(logits, truths.tolist(), (1.0, 1.0)) == pytest.approx(3, rel=0.08)


def test_the_threshold_finds_most_harm_and_lets_enough_safe_replies_pass() -> None:
    scores = [0.1, 0.2, 0.3, 0.8, 0.6, 0.9]
    truths = [False, False, False, False, True, True]
    assert best_threshold(scores, truths, 0.75) == pytest.approx(0.45), "halfway from 0.3 to 0.6"
    assert best_threshold(scores, truths, 0.5) == pytest.approx(0.45), "as much harm, and more safe replies pass"
    assert best_threshold(scores, truths, 0.76) == pytest.approx(0.85), "all four must pass"
    with pytest.raises(EvaluationError, match="lower specificity"):
        best_threshold([1.0, 0.5], [False, True], 0.9)


def test_one_kind_of_replies_alone_is_refused(encoder: Path, tmp_path: Path) -> None:
    safe = LabelledSet(
        name="safe.csv", replies=tuple(entry for entry in labelled().replies if not entry.harmful), left_out={}
    )
    with pytest.raises(DataError, match=r"safe\.csv: the training part has 0 harmful"):
        train_judge(safe, settings_for(encoder), tmp_path / "judge")
    assert list(tmp_path.iterdir()) == []


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(1)
    truths = (rng.random(300) < 0.3).tolist()
    scores = np.round(rng.normal(size=300) + np.asarray(truths), 1).tolist()  # Rounded: with ties.
    hits, misses = (
        [score for score, truth in zip(scores, truths, strict=True) if truth is kind] for kind in (True, False)
    )
    pairs = [(hit > miss) + (hit == miss) / 2 for hit in hits for miss in misses]
    assert auc(scores, truths) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    low, high = auc_interval(scores, truths, clusters=range(300), seed=0)
    assert low < auc(scores, truths) < high
    assert 0.08 < high - low < 0.2, "the width of Hanley and McNeil's for 300 is 0.13"
    wide = auc_interval(scores, truths, clusters=[number // 30 for number in range(300)], seed=0)
    assert wide != (low, high), "prompts are drawn, not replies"
