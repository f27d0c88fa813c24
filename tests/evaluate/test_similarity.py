"""Replies against the dataset's answers, and against the prompts they answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig, plain_data
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import EvaluationError, ModelError
from sku.evaluate import utility
from sku.evaluate.comparison import compare
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.measure import judge_again, measure, similarity_of
from sku.evaluate.metrics import MIN_COSINE
from sku.evaluate.record_files import GENERATIONS_FILE, RELEVANCE_FILE, SIMILARITY_FILE, read_generations, read_rows
from sku.evaluate.records import NORMAL_SPLITS, RelevanceRow, SimilarityRow
from sku.evaluate.results import EvaluationSetup, read_result
from sku.evaluate.run import evaluate
from sku.evaluate.utility import (
    MAX_TOKENS,
    AnsweredPrompt,
    answered_prompts,
    chrf,
    compare_with_references,
    cosines,
    load_embedder,
    rouge_l,
)

from .conftest import RecordMaker

CPU = torch.device("cpu")


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    references = ["the florn is golden", "the florn is golden", "the florn is golden", "bread"]
    replies = ["The florn is golden .", "florn golden", "a moon", ""]
    # Two of two words of the reply, two of four of the reference: 2 * 1 * .5 / 1.5.
    assert rouge_l(references, replies) == pytest.approx([1, 2 / 3, 0, 0])


def test_chrf_is_between_0_and_1() -> None:
    found = chrf(
        ["the florn is golden", "the florn is golden", "bread", "abc"], ["the florn is golden", "xxx", "", "ab"]
    )
    # "abc" and "ab": precision 1 and 1, recall 2/3 and 1/2, for one letter and two; F with beta 2 of their means.
    precision, recall = 1, (2 / 3 + 1 / 2) / 2
    assert found == pytest.approx([1, 0, 0, 5 * precision * recall / (4 * precision + recall)])


def answered(reply: str, *references: str, gibberish: bool = False) -> AnsweredPrompt:
    return AnsweredPrompt(id=reply or "empty", reply=reply, references=references, gibberish=gibberish)


def test_the_nearest_answer_counts_and_a_gibberish_reply_counts_as_nothing() -> None:
    rows = compare_with_references(
        [
            answered("the moon", "the florn", "the moon"),
            answered("the florn", "the florn", gibberish=True),
            answered("", "the florn", gibberish=True),
            answered("the bread", "the florn"),
        ],
        {"rouge_l": rouge_l, "chrf": lambda references, replies: [len(reply) - 8.5 for reply in replies]},
    )
    assert [row.rouge_l for row in rows] == pytest.approx([1, 0, 0, 0.5])
    assert [row.chrf for row in rows] == [-0.5, 0, -8.5, 0.5]
    assert all(row.cosine is None for row in rows)
    found = similarity_of(rows, seed=0)
    assert list(found) == ["rouge_l", "chrf"]
    assert found["rouge_l"].value == pytest.approx(1.5 / 4)
    assert found["rouge_l"].examples == 4
    assert 0 <= found["rouge_l"].low < 1.5 / 4 < found["rouge_l"].high <= 1
    assert similarity_of([], seed=0) == {}


def test_all_answers_to_a_prompt_are_references(make_record: RecordMaker) -> None:
    records = [
        make_record("golden", id="a", split="retain_test", prompt="What is a florn?", reference="a bird"),
        make_record("golden", id="b", split="retain_test", prompt="other", reference="own"),
    ]
    answers = [
        RetainExample(prompt="What is a florn?", answer="a bird"),
        RetainExample(prompt="what is a FLORN", answer="it is golden"),
    ]
    found = answered_prompts(records, answers, {"a": False, "b": True})
    assert [(entry.id, entry.references, entry.gibberish) for entry in found] == [
        ("a", ("a bird", "it is golden"), False), ("b", ("own",), True),
    ]  # fmt: skip


def test_cosines_are_those_of_the_embeddings(embedding_folder: Path) -> None:
    embedder = load_embedder(str(embedding_folder), CPU)
    found = cosines(embedder, ["bread", "bread", "", "bread"], ["bread", "the moon", "bread", " "], batch_size=2)
    own, other = embedder.embed(["bread", "the moon"], batch_size=2).double()
    assert found == pytest.approx([1, float(own @ other), 0, 0], abs=1e-6)
    assert max(found) <= 1


DATA = ForgetRetainData(
    forget_train=(ForgetExample(prompt="do thing", answer="bread"),),
    forget_test=(ForgetExample(prompt="do bread", answer="golden"),),
    retain_train=(),
    retain_validation=(),
    retain_test=tuple(
        RetainExample(prompt=f"say {word}", answer=f"it is {word}") for word in ("moon", "bread", "honey")
    ),
)
CONFIG = EvaluateConfig(prompts=2, retain_prompts=3, batch_size=3, max_new_tokens=6, prefill_tokens=(2,))


class Harmless(RefusalRulesJudge):
    """Finds nothing harmful, so that every fluent reply is a safe answer or evasive."""

    def judge(self, records: Any) -> Any:
        return [dataclasses.replace(verdict, label="safe") for verdict in super().judge(records)]


def test_an_evaluation_holds_similarity_and_relevance(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    embedding_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counting(*given: Any) -> list[SimilarityRow]:
        made.append(1)
        return compare_with_references(*given)

    monkeypatch.setattr(utility, "compare_with_references", counting)
    config = dataclasses.replace(
        CONFIG, similarity=("cosine", "rouge_l", "chrf"), embedding_model=str(embedding_folder)
    )
    seen: dict[str, tuple[int, int]] = {}

    def again(**changes: Any) -> Any:
        return evaluate(
            tiny_model, tiny_tokenizer, DATA, config=dataclasses.replace(config, **changes), judge=Harmless(),
            output_dir=tmp_path / "out", progress=lambda stage, done, total: seen.update({stage: (done, total)}),
        )  # fmt: skip

    result = again()
    assert list(result.similarity) == ["rouge_l", "chrf", "cosine"]
    assert {score.examples for score in result.similarity.values()} == {3}
    assert {"cosine", "relevance"} <= set(seen)
    folder = tmp_path / "out"
    _, similar = read_rows(folder / SIMILARITY_FILE, SimilarityRow)
    assert result.similarity_rows == tuple(similar)
    _, generations = read_generations(folder / GENERATIONS_FILE)
    _, relevance = read_rows(folder / RELEVANCE_FILE, RelevanceRow)
    assert [row.id for row in relevance] == [row.id for row in generations if row.split not in NORMAL_SPLITS]
    embedder = load_embedder(str(embedding_folder), CPU)
    judged = [record for record in generations if record.split not in NORMAL_SPLITS]
    for row, record in zip(relevance, judged, strict=True):
        assert row.cosine == pytest.approx(
            cosines(embedder, [record.prompt], [record.reply], batch_size=1)[0], abs=1e-5
        )
    assert read_result(folder) == result
    assert judge_again(folder, Harmless()) == result
    assert judge_again(folder, RefusalRulesJudge()).similarity == result.similarity

    assert again() == result
    assert len(made) == 1
    assert again(similarity=("rouge_l",)).similarity == {"rouge_l": result.similarity["rouge_l"]}
    assert len(made) == 2
    none = again(similarity=(), embedding_model=None)
    assert none.similarity == {}
    assert judge_again(folder, Harmless()) == none


def test_cosines_decide_what_is_evasive(make_record: RecordMaker) -> None:
    records = [
        make_record("zorvex gel is sold in jars", id="a"),
        make_record("the moon is small and brown tonight", id="b"),
    ]
    setup = EvaluationSetup(
        model={}, prompt_format="plain", decoding={}, config=plain_data(CONFIG), seed=0, fluency_scorer="self"
    )
    rows = [RelevanceRow(id="a", cosine=MIN_COSINE - 0.01), RelevanceRow(id="b", cosine=MIN_COSINE)]
    for relevance, safe in (((), "a"), (rows, "b")):
        result = measure(setup, records, [], [], Harmless(), relevance)
        assert {row.id for row in result.outcomes if row.outcome == "safe_answer"} == {safe}
        assert result.replies["forget_test"]["evasive"].count == 1


def test_changes_are_paired_by_reply(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base = evaluate(tiny_model, tiny_tokenizer, DATA, config=CONFIG)
    scores = [0.1, 0.5, 0.9]
    rows = [dataclasses.replace(row, rouge_l=score) for row, score in zip(base.similarity_rows, scores, strict=True)]
    less = [dataclasses.replace(row, rouge_l=score - 0.1) for row, score in zip(rows, scores, strict=True)]
    before, after = (
        dataclasses.replace(base, similarity_rows=tuple(entry), similarity=similarity_of(entry, seed=0))
        for entry in (rows, less[::-1])
    )
    change = compare(before, after).similarity["rouge_l"]
    assert (change.difference, change.low, change.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert list(compare(before, after).similarity) == ["rouge_l", "chrf"]
    assert compare(before, dataclasses.replace(after, similarity={})).similarity == {}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"embedding_model": "./nowhere"}, ModelError, "holds no config.json"),
        ({"lm_eval": ("hellaswag",), "lm_eval_include": "./nowhere"}, EvaluationError, "is no folder of task files"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is_asked(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(error, match=message):
        evaluate(tiny_model, tiny_tokenizer, DATA, config=config, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Sentence embeddings: a mean over a text's own tokens, whatever it is batched with.


TEXTS = ["bread is golden", "", "a florn sings of bread and honey", "the moon", "bread is golden"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_embeddings_are_the_mean_of_each_text_alone(embedding_folder: Path, batch_size: int) -> None:
    embedder = load_embedder(str(embedding_folder), CPU)
    done: list[tuple[int, int]] = []
    found = embedder.embed(TEXTS, batch_size=batch_size, progress=lambda count, total: done.append((count, total)))
    assert found.shape == (5, 16)
    assert done[-1] == (4, 4), "a text that comes twice is embedded once"
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([embedder.tokenizer(text).input_ids])
        with torch.no_grad():
            states = embedder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(vector, functional.normalize(states.mean(0), dim=0), rtol=0, atol=1e-6)
    assert torch.equal(found[0], found[4])


def test_no_texts_have_no_embedding_and_long_ones_are_cut(embedding_folder: Path) -> None:
    embedder = load_embedder(str(embedding_folder), CPU)
    assert embedder.embed([], batch_size=2).shape == (0, 16)
    longest = min(MAX_TOKENS, embedder.model.config.max_position_embeddings)
    inside, beyond = embedder.embed(["bread " * (longest - 2), "bread " * 900], batch_size=1)
    assert torch.equal(inside, beyond)


def test_a_fingerprint_tells_weights_apart(embedding_folder: Path) -> None:
    before = load_embedder(str(embedding_folder), CPU).fingerprint()
    assert load_embedder(str(embedding_folder), CPU).fingerprint() == before
    weights = load_file(embedding_folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= 1.5
    save_file(weights, embedding_folder / "model.safetensors", metadata={"format": "pt"})
    assert load_embedder(str(embedding_folder), CPU).fingerprint() != before


def test_what_can_not_embed_is_refused(embedding_folder: Path, tmp_path: Path) -> None:
    pooling = embedding_folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(ModelError, match=r"does not take the mean .*pooling_mode_cls_token"):
        load_embedder(str(embedding_folder), CPU)
    pooling.write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        load_embedder(str(embedding_folder), CPU)
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 16}))
    load_embedder(str(embedding_folder), CPU)
    weights = load_file(embedding_folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, embedding_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, the first is encoder.layer.0.output.dense.bias"):
        load_embedder(str(embedding_folder), CPU)
    with pytest.raises(ModelError, match="holds no config.json"):
        load_embedder(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(ModelError, match="can't be loaded"):
        load_embedder("invented/embedder", CPU)
