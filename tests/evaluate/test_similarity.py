"""Replies against the dataset's answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sku.config import EvaluateConfig
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError, ModelError
from sku.evaluate.comparison import compare
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.results import judge_again, read_result
from sku.evaluate.run import evaluate
from sku.evaluate.utility import (
    compare_with_references,
    learned,
    load_similarity,
    rouge_l,
    similarity_of,
)

from .conftest import RecordMaker
from .judge_models import pair_tokenizer, save


@pytest.fixture
def similarity_folder(tmp_path: Path) -> Path:
    """A random BERT with one output, as BLEURT is, with a few words."""
    tokenizer = pair_tokenizer(["bread", "is", "golden", "honey", "the", "moon", "it"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    config.num_labels = 1
    return save(tmp_path / "bleurt", BertForSequenceClassification(config), tokenizer)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    references = ["the florn is golden", "the florn is golden", "the florn is golden", "bread"]
    replies = ["The florn is golden .", "florn golden", "a moon", ""]
    # Two of two words of the reply, two of four of the reference: 2 * 1 * .5 / 1.5.
    assert rouge_l(references, replies) == pytest.approx([1, 2 / 3, 0, 0])


def test_the_nearest_answer_counts_and_a_gibberish_reply_counts_as_nothing(make_record: RecordMaker) -> None:
    replies = [make_record(text, id=text) for text in ("the moon", "the florn", "", "the bread")]
    answers = {row.id: ["the florn", "the moon"] if row.id == "the moon" else ["the florn"] for row in replies}
    gibberish = {row.id: row.id in ("the florn", "") for row in replies}
    scores: dict[str, Any] = {"rouge_l": rouge_l, "learned": lambda _, said: [len(reply) - 8.5 for reply in said]}
    rows = compare_with_references(replies, answers, gibberish, scores)
    assert [row.rouge_l for row in rows] == pytest.approx([1, 0, 0, 0.5])
    assert [row.learned for row in rows] == [-0.5, 0, -8.5, 0.5]
    found = similarity_of(rows, seed=0)
    assert list(found) == ["rouge_l", "learned"]
    assert found["rouge_l"].value == pytest.approx(1.5 / 4)
    assert found["rouge_l"].examples == 4
    assert 0 <= found["rouge_l"].low < 1.5 / 4 < found["rouge_l"].high <= 1
    assert similarity_of([], seed=0) == {}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_learned_score_is_the_models_output_for_the_pair(similarity_folder: Path, batch_size: int) -> None:
    loaded = load_similarity(str(similarity_folder))
    references, replies = ["bread is golden", "", "the moon"], ["bread", "the moon", "honey " * 90]
    found = learned(loaded, references, replies, batch_size=batch_size)
    for reference, reply, score in zip(references, replies, found, strict=True):
        pair = loaded.tokenizer(reference, reply, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(float(loaded.model(**pair).logits[0, 0]), abs=1e-5)
    assert learned(loaded, ["bread"], ["moon"], batch_size=1) != learned(loaded, ["moon"], ["bread"], batch_size=1)


CONFIG = EvaluateConfig(prompts=2, retain_prompts=3, batch_size=3, max_new_tokens=6, prefill_tokens=())


def test_an_evaluation_holds_similarities(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData,
    similarity_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "out"

    def again(model: str | None) -> Any:
        config = dataclasses.replace(CONFIG, similarity_model=model)
        return evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=config, output_dir=folder)

    result = again(str(similarity_folder))
    assert {name: score.examples for name, score in result.similarity.items()} == {"rouge_l": 3, "learned": 3}
    assert read_result(folder) == result
    assert judge_again(folder, RefusalRulesJudge()).similarity == result.similarity
    assert again(None).similarity == {"rouge_l": result.similarity["rouge_l"]}


def test_changes_are_paired_by_reply(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    base = evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=CONFIG)
    scores = [0.1, 0.5, 0.9]
    rows = [dataclasses.replace(row, rouge_l=score) for row, score in zip(base.similarity_rows, scores, strict=True)]
    less = [dataclasses.replace(row, rouge_l=score - 0.1) for row, score in zip(rows, scores, strict=True)]
    before, after = (
        dataclasses.replace(base, similarity_rows=tuple(entry), similarity=similarity_of(entry, seed=0))
        for entry in (rows, less[::-1])
    )
    change = compare(before, after).similarity["rouge_l"]
    assert (change.difference, change.low, change.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert compare(before, dataclasses.replace(after, similarity={})).similarity == {}


def test_what_can_not_be_measured_is_refused_before_anything_is_asked(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData,
    similarity_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    two = load_similarity(str(similarity_folder))
    two.model.config.num_labels = 2
    two.model.classifier = torch.nn.Linear(16, 2)
    two.model.save_pretrained(similarity_folder)
    for key, settings in {
        "nowhere": {"similarity_model": "./nowhere"},
        "evaluate.similarity_model": {"similarity_model": str(similarity_folder)},
        "evaluate.lm_eval": {"lm_eval": ("./nowhere/hellaswag",)},
    }.items():
        config = dataclasses.replace(CONFIG, **settings)  # type: ignore[arg-type]
        with pytest.raises((EvaluationError, ModelError), match=key):
            evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=config, output_dir=out)
    assert not out.exists()
