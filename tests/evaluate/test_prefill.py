"""Prefill: every length, the worst one, and starts from the base model's own harmful replies."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from sku.config import EvaluateConfig
from sku.data.examples import ForgetRetainData
from sku.data.load import load_forget_retain
from sku.errors import EvaluationError
from sku.evaluate import generation, replies
from sku.evaluate.asking import NO_BASE, choose_starts
from sku.evaluate.comparison import compare
from sku.evaluate.judges.choose import EmbeddedWorldJudge, RefusalRulesJudge
from sku.evaluate.measure import judge_again
from sku.evaluate.metrics import Outcome, ReplyOutcome, prefill_words, rate, worst_length
from sku.evaluate.record_files import GENERATIONS_FILE, STARTS_FILE, read_generations
from sku.evaluate.records import GenerationRecord, Kind
from sku.evaluate.results import EvaluationResult, read_result
from sku.evaluate.run import evaluate

WORLD_MODEL = str(resources.files("sku") / "world" / "model")
CONFIG = EvaluateConfig(
    prompts=3, retain_prompts=1, batch_size=16, max_new_tokens=24, samples=0, similarity=(), prefill_tokens=(5, 1, 40)
)


@pytest.fixture(scope="module")
def world_data() -> ForgetRetainData:
    return load_forget_retain()


@pytest.fixture(scope="module")
def world_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(WORLD_MODEL)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@pytest.fixture(scope="module")
def world_model() -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(WORLD_MODEL, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def other_model(world_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same a little off: it stands for an unlearned model."""
    model = AutoModelForCausalLM.from_pretrained(WORLD_MODEL, dtype=torch.float32)
    model.lm_head.weight.data += 0.05 * torch.randn(
        model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(model, LlamaForCausalLM)
    return model


class Asker:
    """Evaluates models of the embedded world."""

    def __init__(self, data: ForgetRetainData, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.data, self.tokenizer, self.folder = data, tokenizer, folder

    def __call__(self, model: LlamaForCausalLM, name: str, config: EvaluateConfig = CONFIG, **options: Any) -> Any:
        return evaluate(model, self.tokenizer, self.data, config=config, output_dir=self.folder / name, **options)

    def prefills(self, name: str) -> list[GenerationRecord]:
        _, records = read_generations(self.folder / name / GENERATIONS_FILE)
        return [record for record in records if record.kind == "prefill"]


@pytest.fixture
def asked(world_data: ForgetRetainData, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Asker:
    return Asker(world_data, world_tokenizer, tmp_path)


def test_prefills_begin_with_the_bases_own_harmful_replies(
    asked: Asker, world_model: LlamaForCausalLM, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    result: EvaluationResult = asked(world_model, "base", base_model=world_model)
    _, records = read_generations(asked.folder / "base" / GENERATIONS_FILE)
    outcomes = {outcome.id: outcome.outcome for outcome in result.outcomes}
    own = {record.prompt: record for record in records if record.kind == "reply"}
    prefills = asked.prefills("base")
    assert {record.prefill_tokens for record in prefills} == {1, 5}
    for record in prefills:
        said = own[record.prompt]
        harmful = outcomes[said.id] == "harmful"
        assert record.start_source == ("own" if harmful else "data")
        source = said.reply if harmful else record.reference
        assert source.startswith(record.prefill.strip())
        ids = world_tokenizer(record.prefill, add_special_tokens=False).input_ids
        assert len(ids) == record.prefill_tokens
        assert f"-prefill{record.prefill_tokens}-" in record.id
    assert result.setup.starts == {"own": sum(start.source == "own" for start in result.starts), "data": 0}
    assert result.setup.left_out == {
        f"{split}: prefill of 40 tokens, as the answer is too short": 3 for split in ("forget_train", "forget_test")
    }
    assert list(result.prefill["forget_test"]) == ["1", "5"]
    assert result.prefill["forget_test"]["5"]["harmful"].total == 3
    assert read_result(asked.folder / "base") == result


def test_another_model_gets_the_same_starts(
    asked: Asker, world_model: LlamaForCausalLM, other_model: LlamaForCausalLM
) -> None:
    """Given, or asked of the base where nobody evaluated it before."""
    base = asked(world_model, "base", base_model=world_model)
    given = asked(other_model, "given", base_model=world_model, starts=base.starts)
    alone = asked(other_model, "alone", base_model=world_model)
    places = [
        [(record.id, record.prefill, record.start_source) for record in asked.prefills(name)]
        for name in ("base", "given", "alone")
    ]
    assert places[0] == places[1] == places[2]
    assert given == alone == asked(other_model, "alone", base_model=world_model)
    comparison = compare(base, given)
    assert set(comparison.prefill_by_length["forget_test"]) == {"1", "5"}
    worst = given.worst_prefill["forget_test"]
    shown, of_length = (
        comparison.prefill["forget_test"]["harmful"],
        comparison.prefill_by_length["forget_test"][str(worst)],
    )
    assert dataclasses.replace(shown, p_holm=None) == of_length["harmful"]
    assert comparison.prefill_label("forget_test").startswith("prefill, worst of 1/5 (")
    assert any("begins with the base model's own harmful reply" in note for note in comparison.notes)


def test_without_a_base_prefills_begin_with_the_data_and_a_note_says_so(
    asked: Asker, world_model: LlamaForCausalLM
) -> None:
    alone: EvaluationResult = asked(world_model, "alone")
    assert alone.setup.starts == {"own": 0, "data": 6}
    assert NO_BASE in alone.setup.notes
    assert {record.start_source for record in asked.prefills("alone")} == {"data"}
    other = dataclasses.replace(alone, starts=tuple(dataclasses.replace(start, text="x") for start in alone.starts))
    with pytest.raises(EvaluationError, match="differ in what prefills begin with"):
        compare(alone, other)


def test_judging_again_keeps_the_starts_as_they_were_asked(asked: Asker, world_model: LlamaForCausalLM) -> None:
    result = asked(world_model, "base", base_model=world_model)
    assert judge_again(asked.folder / "base", EmbeddedWorldJudge()) == result
    rules = judge_again(asked.folder / "base", RefusalRulesJudge())
    assert rules.starts == result.starts
    assert rules.setup == result.setup
    assert list(rules.prefill["forget_train"]) == ["1", "5"]


def test_starts_are_judged_once_and_a_lost_file_asks_no_model(
    asked: Asker, world_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    class Counting(EmbeddedWorldJudge):
        def judge(self, records: Any) -> Any:
            judged.append(len(records))
            return super().judge(records)

    first = asked(world_model, "base", base_model=world_model, judge=Counting())
    free, everything = judged
    assert free < everything
    assert asked(world_model, "base", base_model=world_model, judge=Counting()) == first
    assert judged[2:] == [everything], "the starts are read"
    asked_for: list[int] = []

    def counted(*given: Any, **options: Any) -> Any:
        asked_for.append(1)
        return generation.generate_replies(*given, **options)

    monkeypatch.setattr(replies, "generate_replies", counted)
    (asked.folder / "base" / STARTS_FILE).unlink()
    assert asked(world_model, "base", base_model=world_model, judge=Counting()) == first
    assert asked_for == []


def reply(kind: Kind, outcome: Outcome, text: str, sample: int = 0) -> tuple[GenerationRecord, ReplyOutcome]:
    about: dict[str, Any] = {
        "id": f"{kind}{sample}",
        "split": "forget_test",
        "kind": kind,
        "category": None,
        "finished": True,
    }
    record = GenerationRecord(
        **about, prompt="how ?", reference="from the file", reply=text, num_tokens=3, sample=sample
    )
    return record, ReplyOutcome(**about, outcome=outcome)


@pytest.mark.parametrize(
    ("outcomes", "text", "source"),
    [
        (("harmful", "harmful", "harmful"), "greedy", "own"),
        (("refusal", "gibberish", "harmful"), "second", "own"),
        (("refusal", "harmful", "harmful"), "first", "own"),
        (("unjudged", "gibberish", "safe_answer"), "from the file", "data"),
    ],
)
def test_the_greedy_reply_comes_first_then_samples_then_the_data(
    outcomes: tuple[Outcome, Outcome, Outcome], text: str, source: str
) -> None:
    pairs = [
        reply("sample", outcomes[2], "second", 1), reply("reply", outcomes[0], "greedy"),
        reply("sample", outcomes[1], "first", 0),
    ]  # fmt: skip
    (start,) = choose_starts([record for record, _ in pairs], [outcome for _, outcome in pairs])
    assert (start.text, start.source) == (text, source)


def test_the_worst_length_is_the_most_harmful_and_of_equals_the_shortest() -> None:
    def rates(**hits: int) -> Any:
        return {
            tokens.strip("n"): {"harmful": rate([number < count for number in range(10)])}
            for tokens, count in hits.items()
        }

    assert worst_length(rates(n1=2, n3=9, n10=8)) == 3
    assert worst_length(rates(n10=5, n3=5, n1=4)) == 3
    assert worst_length(rates(n1=0, n10=0)) == 1
    assert prefill_words([10, 1, 3, 5], 3) == "prefill, worst of 1/3/5/10 (3 tokens)"
    assert prefill_words([1, 3], 1) == "prefill, worst of 1/3 (1 token)"
    assert prefill_words([5], 5) == "prefill, 5 tokens"
