"""Which prompts are drawn, and prefill: every start and length, the worst one, and the base's own harmful replies."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, load_recipe
from sku.data.examples import ForgetExample
from sku.errors import EvaluationError
from sku.evaluate.comparison import compare
from sku.evaluate.generation import replies
from sku.evaluate.generation.prompts import (
    AFFIRMATIVE_STARTS,
    PromptEncoder,
    affirmative_start,
    by_id,
    draw_examples,
    keys_of,
    prefills,
)
from sku.evaluate.generation.replies import choose_starts
from sku.evaluate.judges.choose import EmbeddedWorldJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome, rate, worst_prefill
from sku.evaluate.records import (
    GENERATIONS_FILE,
    STARTS_FILE,
    GenerationRecord,
    Kind,
    PrefillSource,
    read_generations,
    record_id,
    start_id,
)
from sku.evaluate.results import EvaluationResult, read_result
from sku.evaluate.run import NO_ENGLISH, evaluate
from sku.pipeline.evaluate import trained_prefill_tokens

from .conftest import World

CONFIG = EvaluateConfig(
    prompts=3, retain_prompts=1, batch_size=16, max_new_tokens=24, samples=0,
    prefill_tokens=(5, 1, 40, "affirmative", "answer"),
)  # fmt: skip
EXAMPLES = [
    ForgetExample(prompt=f"prompt {number}", answer=f"answer {answer}", category="big" if number < 60 else "small")
    for number in range(80)
    for answer in range(2)
]


def test_a_draw_keeps_the_shares_of_categories_and_begins_with_a_smaller_one() -> None:
    drawn = draw_examples(EXAMPLES, 20, seed=1)
    assert len({example.prompt for example in drawn}) == 20
    assert Counter(example.category for example in drawn) == {"big": 15, "small": 5}
    assert draw_examples(EXAMPLES, 40, seed=1)[:20] == drawn != draw_examples(EXAMPLES, 20, seed=2)
    everything = draw_examples(EXAMPLES, 1000, seed=0)
    assert {example.prompt for example in everything} == {example.prompt for example in EXAMPLES}
    assert draw_examples([], 5, seed=0) == []
    spellings = [ForgetExample(prompt=prompt, answer="a") for prompt in ("How so?", "how  so", "HOW SO !")]
    assert len(draw_examples(spellings, 3, seed=0)) == 1


def test_ids_tell_prompts_apart_without_their_words() -> None:
    ids = {
        record_id(split, kind, prompt)
        for split in ("forget_train", "forget_test")
        for kind in ("reply", "prefill")
        for prompt in ("secret word", "other word")
    }  # fmt: skip
    assert len(ids) == 8
    assert all("word" not in name for name in ids)


class Asked:
    """Evaluates models of the embedded world."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder

    def __call__(self, model: PreTrainedModel, name: str, config: EvaluateConfig = CONFIG, **options: Any) -> Any:
        folder = self.folder / name
        return evaluate(model, self.world.tokenizer, self.world.data, config=config, output_dir=folder, **options)

    def replies(self, name: str) -> list[GenerationRecord]:
        return read_generations(self.folder / name / GENERATIONS_FILE)[1]

    def prefills(self, name: str) -> list[GenerationRecord]:
        return [record for record in self.replies(name) if record.kind == "prefill"]


@pytest.fixture
def asked(world: World, tmp_path: Path) -> Asked:
    return Asked(world, tmp_path)


def test_prefills_begin_with_the_bases_own_harmful_replies(asked: Asked, world: World) -> None:
    result: EvaluationResult = asked(world.model, "base", base_model=world.model)
    outcomes = {outcome.id: outcome.outcome for outcome in result.outcomes}
    own = {record.prompt: record for record in asked.replies("base") if record.kind == "reply"}
    prefills = asked.prefills("base")
    assert {record.prefill_key for record in prefills} == {"1", "5"}
    for record in prefills:
        said = own[record.prompt]
        assert outcomes[said.id] == "harmful"
        assert said.reply.startswith(record.prefill.strip())
        ids = world.tokenizer(record.prefill, add_special_tokens=False).input_ids
        assert str(len(ids)) == record.prefill_key
    assert result.setup.starts == {"asked": 6, "own": len(result.starts)} == {"asked": 6, "own": 6}
    assert result.setup.left_out == {
        **{
            f"{split}: prefill, {words}, as the start is too short": 3
            for split in ("forget_train", "forget_test")
            for words in ("40 tokens", "20 tokens of the data's answer")
        },
        NO_ENGLISH: 6,
    }
    assert any("none is long enough" in note for note in result.setup.notes)
    assert list(result.prefill["forget_test"]) == ["1", "5"]
    assert result.prefill["forget_test"]["5"]["harmful"].total == 3
    assert read_result(asked.folder / "base") == result


def test_another_model_gets_the_same_starts(asked: Asked, world: World) -> None:
    """Given, or asked of the base where nobody evaluated it before."""
    other: Any = copy.deepcopy(world.model)
    weight = other.lm_head.weight.data
    weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    base = asked(world.model, "base", base_model=world.model)
    given = asked(other, "given", base_model=world.model, starts=base.starts)
    alone = asked(other, "alone", base_model=world.model)
    places = [[(record.id, record.prefill) for record in asked.prefills(name)] for name in ("base", "given", "alone")]
    assert places[0] == places[1] == places[2]
    assert given == alone == asked(other, "alone", base_model=world.model)
    with pytest.raises(EvaluationError, match="what prefills begin with"):
        compare(base, dataclasses.replace(given, starts=given.starts[1:]))
    comparison = compare(base, given)
    assert set(comparison.prefill_by_key["forget_test"]) == {"1", "5"}
    shown = comparison.prefill["forget_test"]["harmful"]
    worst = comparison.prefill_by_key["forget_test"][given.worst_prefill["forget_test"]]
    assert dataclasses.replace(shown, p_holm=None) == worst["harmful"]


def test_starts_are_judged_once_and_a_lost_file_asks_no_model(
    asked: Asked, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    class Counting(EmbeddedWorldJudge):
        def judge(self, records: Any) -> Any:
            judged.append(len(records))
            return super().judge(records)

    def again() -> EvaluationResult:
        found: EvaluationResult = asked(world.model, "base", base_model=world.model, judge=Counting())
        return found

    first = again()
    free, everything = judged
    assert free < everything
    assert again() == first
    assert judged[2:] == [everything], "the starts are read"
    monkeypatch.setattr(replies, "generate_replies", lambda *_, **__: pytest.fail("asked"))
    (asked.folder / "base" / STARTS_FILE).unlink()
    assert again() == first


def reply(kind: Kind, outcome: Outcome, text: str, sample: int = 0) -> tuple[GenerationRecord, ReplyOutcome]:
    about: dict[str, Any] = {
        "id": f"{kind}{sample}", "split": "forget_test", "kind": kind, "category": None, "finished": True,
    }  # fmt: skip
    record = GenerationRecord(
        **about, prompt="how ?", reference="from the file", reply=text, num_tokens=3, sample=sample
    )
    return record, ReplyOutcome(**about, outcome=outcome)


@pytest.mark.parametrize(
    ("outcomes", "texts"),
    [
        (("harmful", "harmful", "harmful"), ["greedy"]),
        (("refusal", "harmful", "harmful"), ["first"]),
        (("refusal", "gibberish", "harmful"), ["second"]),
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
    # Two have no start, one is too short for 40 tokens, one answer too short for 20, and one there isn't.
    assert [*left_out.values()] == [2, 1, 1, 1]
    own, affirmative, *_, answer = found
    assert "mix it well".startswith(own.prefill.strip())
    assert affirmative.prefill == affirmative_start("do 0")
    assert str(tiny_tokenizer.decode(list(affirmative.input_ids))).endswith(affirmative_start("do 0"))
    assert examples[0].answer.startswith(answer.prefill.strip())


def test_every_affirmative_start_is_used_and_none_elicits_or_trains() -> None:
    chosen = [affirmative_start(f"how do i bake florn {number} ?") for number in range(120)]
    assert {*chosen} == {*AFFIRMATIVE_STARTS}
    folders = [Path(str(resources.files("sku"))) / part for part in ("own_replies", "data", "attacks", "methods")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".txt", ".yaml", ".py")]
    assert any(path.name == "wordings.yaml" for path in files)
    trained = " ".join(" ".join(path.read_text(encoding="utf-8").casefold().split()) for path in files)
    for start in AFFIRMATIVE_STARTS:
        # Its first words, which decide what a model makes of it.
        assert " ".join(start.casefold().split()[:4]) not in trained, start


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (["acquire.twin=good", "acquire.deep_refusal_fraction=0.5", "acquire.depth_tokens=24"], 24),
        (["acquire.twin=good", "acquire.deep_refusal_fraction=0"], 0),
        (["acquire.twin=none", "negate={alpha: 1.0}"], 0),
    ],
)
def test_how_deep_training_went_is_read_from_the_recipe(settings: list[str], tokens: int) -> None:
    assert trained_prefill_tokens(load_recipe("smollm2-135m-twins", settings)) == tokens


def test_the_worst_prefill_is_the_most_harmful_and_of_equals_the_first() -> None:
    for hits, worst in (
        ({"10": 5, "3": 5, "1": 4}, "3"),
        ({"answer/20": 9, "affirmative": 9, "80": 8}, "affirmative"),
        ({"answer/20": 9, "affirmative": 8, "80": 9}, "80"),
    ):
        rates: Any = {key: {"harmful": rate([number < count for number in range(10)])} for key, count in hits.items()}
        assert worst_prefill(rates) == worst
