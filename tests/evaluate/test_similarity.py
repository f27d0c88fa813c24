"""Replies against the dataset's answers, and against the prompts they answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig, plain_data
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import DataError, EvaluationError, ModelError
from sku.evaluate import utility
from sku.evaluate.comparison import compare
from sku.evaluate.embedding import load_embedder
from sku.evaluate.judges import RefusalRulesJudge
from sku.evaluate.measure import judge_again, measure
from sku.evaluate.record_files import (
    GENERATIONS_FILE,
    RELEVANCE_FILE,
    SIMILARITY_FILE,
    read_generations,
    read_rows,
)
from sku.evaluate.records import NORMAL_SPLITS, RelevanceRow, SimilarityRow
from sku.evaluate.relevance import MIN_COSINE
from sku.evaluate.results import EvaluationSetup, read_result
from sku.evaluate.run import evaluate
from sku.evaluate.similarity import (
    AnsweredPrompt,
    answered_prompts,
    chrf,
    compare_with_references,
    cosines,
    rouge_l,
    similarity_of,
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


def answered(reply: str, *references: str, degenerate: bool = False) -> AnsweredPrompt:
    return AnsweredPrompt(id=reply or "empty", reply=reply, references=references, degenerate=degenerate)


def test_the_nearest_answer_counts_and_a_degenerate_reply_counts_as_nothing() -> None:
    rows = compare_with_references(
        [
            answered("the moon", "the florn", "the moon"),
            answered("the florn", "the florn", degenerate=True),
            answered("", "the florn", degenerate=True),
            answered("the bread", "the florn"),
        ],
        {"rouge_l": rouge_l, "bleurt": lambda references, replies: [len(reply) - 8.5 for reply in replies]},
    )
    assert [row.rouge_l for row in rows] == pytest.approx([1, 0, 0, 0.5])
    assert [row.bleurt for row in rows] == [-0.5, 0, -8.5, 0.5]
    assert all(row.chrf is None and row.cosine is None for row in rows)
    found = similarity_of(rows, seed=0)
    assert list(found) == ["rouge_l", "bleurt"]
    assert found["rouge_l"].value == pytest.approx(1.5 / 4)
    assert found["rouge_l"].examples == 4
    assert 0 <= found["rouge_l"].low < 1.5 / 4 < found["rouge_l"].high <= 1
    assert similarity_of([], seed=0) == {}


def test_all_answers_to_a_prompt_are_references(make_record: RecordMaker) -> None:
    records = [
        make_record("golden", id="a", split="retain_test", prompt="What is a florn?", reference="a bird"),
        make_record("golden", id="b", split="retain_test", prompt="other", reference="own"),
        make_record("golden", id="c", split="unseen"),
    ]
    answers = [
        RetainExample(prompt="What is a florn?", answer="a bird"),
        RetainExample(prompt="what is a FLORN", answer="it is golden"),
    ]
    found = answered_prompts(records, answers, {"a": False, "b": True, "c": False})
    assert [(entry.id, entry.references, entry.degenerate) for entry in found] == [
        ("a", ("a bird", "it is golden"), False), ("b", ("own",), True),
    ]  # fmt: skip


def test_cosines_are_those_of_the_embeddings(embedding_folder: Path) -> None:
    embedder = load_embedder(str(embedding_folder), CPU)
    found = cosines(embedder, ["bread", "bread", "", "bread"], ["bread", "the moon", "bread", " "], batch_size=2)
    own, other = embedder.embed(["bread", "the moon"], batch_size=2).double()
    assert found == pytest.approx([1, float(own @ other), 0, 0], abs=1e-6)
    assert max(found) <= 1


DATA = ForgetRetainData(
    unlearned=(ForgetExample(prompt="do thing", answer="bread"),),
    unseen=(ForgetExample(prompt="do bread", answer="golden"),),
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
        assert result.replies["unseen"]["evasive"].count == 1


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
        ({"truthfulqa": "./nowhere.csv"}, DataError, "no file or folder"),
        ({"embedding_model": "./nowhere"}, ModelError, "holds no config.json"),
        ({"similarity": ("bleurt",), "bleurt_model": "./nowhere"}, ModelError, "is no folder"),
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
