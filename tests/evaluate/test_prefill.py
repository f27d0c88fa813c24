"""Prefill: every start and length, the worst one, and starts from the base model's own harmful replies."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, load_recipe
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.data.load import load_forget_retain
from sku.errors import EvaluationError
from sku.evaluate.comparison import compare
from sku.evaluate.generation import replies
from sku.evaluate.generation.prompts import (
    AFFIRMATIVE_STARTS,
    NO_OWN,
    PromptEncoder,
    affirmative_start,
    by_id,
    keys_of,
    prefills,
)
from sku.evaluate.generation.replies import choose_starts
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.judges.choose import EmbeddedWorldJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome, prefill_words, rate, worst_prefill
from sku.evaluate.records import (
    GENERATIONS_FILE,
    STARTS_FILE,
    GenerationRecord,
    Kind,
    PrefillSource,
    read_generations,
    start_id,
)
from sku.evaluate.results import EvaluationResult, read_result
from sku.evaluate.run import NO_BASE, NO_ENGLISH, evaluate
from sku.pipeline.evaluate import trained_prefill_tokens

WORLD_MODEL = str(resources.files("sku") / "world" / "model")
CONFIG = EvaluateConfig(
    prompts=3,
    retain_prompts=1,
    batch_size=16,
    max_new_tokens=24,
    samples=0,
    prefill_tokens=(5, 1, 40, "affirmative", "answer"),
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


class ReplyGenerator:
    """Evaluates models of the embedded world."""

    def __init__(self, data: ForgetRetainData, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.data, self.tokenizer, self.folder = data, tokenizer, folder

    def __call__(self, model: LlamaForCausalLM, name: str, config: EvaluateConfig = CONFIG, **options: Any) -> Any:
        return evaluate(model, self.tokenizer, self.data, config=config, output_dir=self.folder / name, **options)

    def prefills(self, name: str) -> list[GenerationRecord]:
        _, records = read_generations(self.folder / name / GENERATIONS_FILE)
        return [record for record in records if record.kind == "prefill"]


@pytest.fixture
def asked(world_data: ForgetRetainData, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> ReplyGenerator:
    return ReplyGenerator(world_data, world_tokenizer, tmp_path)


def test_prefills_begin_with_the_bases_own_harmful_replies(
    asked: ReplyGenerator, world_model: LlamaForCausalLM, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    result: EvaluationResult = asked(world_model, "base", base_model=world_model)
    _, records = read_generations(asked.folder / "base" / GENERATIONS_FILE)
    outcomes = {outcome.id: outcome.outcome for outcome in result.outcomes}
    own = {record.prompt: record for record in records if record.kind == "reply"}
    prefills = asked.prefills("base")
    assert {record.prefill_key for record in prefills} == {"1", "5"}
    for record in prefills:
        said = own[record.prompt]
        assert outcomes[said.id] == "harmful"
        assert said.reply.startswith(record.prefill.strip())
        ids = world_tokenizer(record.prefill, add_special_tokens=False).input_ids
        assert str(len(ids)) == record.prefill_key
        assert f"-prefill{record.prefill_key}-" in record.id
    assert result.setup.starts == {"asked": 6, "own": len(result.starts)} == {"asked": 6, "own": 6}
    assert result.setup.left_out == {
        **{
            f"{split}: prefill, {words}, as the start is too short": 3
            for split in ("forget_train", "forget_test")
            for words in ("40 tokens", "20 tokens of the data's answer")
        },
        NO_ENGLISH: 6,
    }
    assert any("none is long enough for a prefill of 40 tokens" in note for note in result.setup.notes)
    assert list(result.prefill["forget_test"]) == ["1", "5"]
    assert result.prefill["forget_test"]["5"]["harmful"].total == 3
    assert read_result(asked.folder / "base") == result


def test_another_model_gets_the_same_starts(
    asked: ReplyGenerator, world_model: LlamaForCausalLM, other_model: LlamaForCausalLM
) -> None:
    """Given, or asked of the base where nobody evaluated it before."""
    base = asked(world_model, "base", base_model=world_model)
    given = asked(other_model, "given", base_model=world_model, starts=base.starts)
    alone = asked(other_model, "alone", base_model=world_model)
    places = [[(record.id, record.prefill) for record in asked.prefills(name)] for name in ("base", "given", "alone")]
    assert places[0] == places[1] == places[2]
    assert given == alone == asked(other_model, "alone", base_model=world_model)
    comparison = compare(base, given)
    assert set(comparison.prefill_by_key["forget_test"]) == {"1", "5"}
    worst = given.worst_prefill["forget_test"]
    shown, of_length = (
        comparison.prefill["forget_test"]["harmful"],
        comparison.prefill_by_key["forget_test"][worst],
    )
    assert dataclasses.replace(shown, p_holm=None) == of_length["harmful"]
    assert comparison.prefill_label("forget_test").startswith("prefill, worst of 1/5 (")
    assert any("begins with the base model's own harmful reply" in note for note in comparison.notes)


def test_without_a_base_no_prefill_is_a_models_own_and_a_note_says_so(
    asked: ReplyGenerator, world_model: LlamaForCausalLM
) -> None:
    config = dataclasses.replace(CONFIG, prefill_tokens=(5, 1, 40))
    alone: EvaluationResult = asked(world_model, "alone", config)
    assert alone.setup.starts == {"asked": 6, "own": 0}
    assert NO_BASE in alone.setup.notes
    assert alone.prefill == {}
    assert alone.setup.left_out == {f"{split}: {NO_OWN}": 3 for split in ("forget_train", "forget_test")}
    assert read_result(asked.folder / "alone") == alone
    other = dataclasses.replace(alone, starts=(PrefillSource(id="x", text="x"),))
    with pytest.raises(EvaluationError, match="differ in what prefills begin with"):
        compare(alone, other)


def test_starts_are_judged_once_and_a_lost_file_asks_no_model(
    asked: ReplyGenerator, world_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
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
        return generate_replies(*given, **options)

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
    ("outcomes", "texts"),
    [
        (("harmful", "harmful", "harmful"), ["greedy"]),
        (("refusal", "gibberish", "harmful"), ["second"]),
        (("refusal", "harmful", "harmful"), ["first"]),
        (("unjudged", "gibberish", "safe_answer"), []),
    ],
)
def test_the_greedy_reply_comes_first_then_samples(
    outcomes: tuple[Outcome, Outcome, Outcome], texts: list[str]
) -> None:
    pairs = [
        reply("sample", outcomes[2], "second", 1), reply("reply", outcomes[0], "greedy"),
        reply("sample", outcomes[1], "first", 0),
    ]  # fmt: skip
    starts = choose_starts([record for record, _ in pairs], [outcome for _, outcome in pairs])
    assert [start.text for start in starts] == texts


def test_an_empty_list_of_lengths_leaves_every_prefill_out() -> None:
    assert keys_of(EvaluateConfig(prefill_tokens=())) == []
    assert keys_of(EvaluateConfig(prefill_tokens=(3, 3))) == ["3"]
    assert keys_of(EvaluateConfig(), english=False) == ["1", "5", "20", "40", "80", "answer/20"]


def test_each_start_is_asked_of_the_prompts_that_have_it(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = [
        ForgetExample(prompt=f"do {number}", answer=answer)
        for number, answer in enumerate(["take the florn and stir it until it glows", "no", ""])
    ]
    asked = [("forget_test", example) for example in examples]
    starts = by_id([PrefillSource(id=start_id("forget_test", "do 0"), text="mix it well")])
    # Room enough for the longest start: what is cut here is no question of the window.
    encoder = dataclasses.replace(PromptEncoder.of(tiny_model, tiny_tokenizer, "paper"), window=2**10)
    found, left_out = prefills(asked, ["3", "40", "affirmative", "answer/20"], starts, encoder, 4)
    assert [(one.prompt, one.prefill_key) for one in found] == [
        ("do 0", "3"), ("do 0", "affirmative"), ("do 1", "affirmative"), ("do 2", "affirmative"),
        ("do 0", "answer/20"),
    ]  # fmt: skip
    assert len({one.id for one in found}) == 5
    assert left_out == {
        f"forget_test: {NO_OWN}": 2,
        "forget_test: prefill, 40 tokens, as the start is too short": 1,
        "forget_test: prefill, 20 tokens of the data's answer, as the start is too short": 1,
        "forget_test: prefill, 20 tokens of the data's answer, as there is none": 1,
    }
    own, affirmative, *_, answer = found
    assert "mix it well".startswith(own.prefill.strip())
    assert affirmative.prefill == affirmative_start("do 0")
    assert str(tiny_tokenizer.decode(list(affirmative.input_ids))).endswith(affirmative_start("do 0"))
    assert examples[0].answer.startswith(answer.prefill.strip())


def test_every_affirmative_start_is_used_and_none_elicits_or_trains() -> None:
    chosen = [affirmative_start(f"how do i bake florn {number} ?") for number in range(120)]
    assert {*chosen} == {*AFFIRMATIVE_STARTS}
    assert chosen == [affirmative_start(f"how do i bake florn {number} ?") for number in range(120)]
    files = [path for part in ("own_replies", "data", "attacks", "methods") for path in _text_files(part)]
    assert any(path.name == "wordings.yaml" for path in files)
    trained = " ".join(" ".join(path.read_text(encoding="utf-8").casefold().split()) for path in files)
    for start in AFFIRMATIVE_STARTS:
        # Its first words, which decide what a model makes of it.
        assert " ".join(start.casefold().split()[:4]) not in trained, start


def _text_files(part: str) -> list[Path]:
    folder = Path(str(resources.files("sku"))) / part
    return [path for path in folder.rglob("*") if path.suffix in (".txt", ".yaml", ".jsonl", ".py")]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (["acquire.twin=good", "acquire.deep_refusal_fraction=0.5", "acquire.depth_tokens=24"], 24),
        (["acquire.twin=good", "acquire.deep_refusal_fraction=0"], 0),
        (["acquire.twin=none", "negate={alpha: 1.0}"], 0),
        (["method=npo"], 0),
    ],
)
def test_how_deep_training_went_is_read_from_the_recipe(settings: list[str], tokens: int) -> None:
    assert trained_prefill_tokens(load_recipe("smollm2-135m-twins", settings)) == tokens


def test_the_worst_prefill_is_the_most_harmful_and_of_equals_the_first() -> None:
    def rates(**hits: int) -> Any:
        keys = {name.strip("n").replace("_", "/"): count for name, count in hits.items()}
        return {key: {"harmful": rate([number < count for number in range(10)])} for key, count in keys.items()}

    assert worst_prefill(rates(n10=5, n3=5, n1=4)) == "3"
    assert worst_prefill(rates(n1=0, n10=0)) == "1"
    assert worst_prefill(rates(answer_20=9, affirmative=9, n80=8)) == "affirmative"
    assert worst_prefill(rates(answer_20=9, affirmative=8, n80=9)) == "80"
    assert prefill_words(["10", "1", "3"], "3") == "prefill, worst of 1/3/10 (3 tokens)"
    assert prefill_words(["answer/20", "affirmative"]) == "prefill, worst of affirmative, answer/20"
