"""Whole evaluations: the embedded world's own model, broken ones, and runs that go on where they stopped."""

from __future__ import annotations

import copy
import dataclasses
import math
import stat
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, Provenance, RetainExample
from sku.data.load import load_forget_retain
from sku.errors import EvaluationError
from sku.evaluate.comparison import compare
from sku.evaluate.generation import replies
from sku.evaluate.generation.prompts import with_answers
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.judges.choose import EmbeddedWorldJudge, RefusalRulesJudge
from sku.evaluate.records import (
    GENERATIONS_FILE,
    PrefillSource,
    read_generations,
    record_id,
    start_id,
)
from sku.evaluate.results import EvaluationResult, judge_again, read_result
from sku.evaluate.run import evaluate
from sku.report.tables import before_after_rows

WORLD_MODEL = str(resources.files("sku") / "world" / "model")
CONFIG = EvaluateConfig(
    prompts=12,
    retain_prompts=20,
    batch_size=16,
    max_new_tokens=40,
    samples=0,
    prefill_tokens=(1, 3, 5, 10),
)


@pytest.fixture(scope="module")
def world_data() -> ForgetRetainData:
    return load_forget_retain()


@pytest.fixture(scope="module")
def world_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(WORLD_MODEL)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@pytest.fixture
def world_model() -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(WORLD_MODEL, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture
def tiny_data() -> ForgetRetainData:
    """Invented pairs for the random model; one answer is too short for a prefill."""
    return ForgetRetainData(
        forget_train=tuple(ForgetExample(prompt=f"do thing {n}", answer=f"first take {n}") for n in range(4)),
        forget_test=(ForgetExample(prompt="do another", answer="no"),),
        retain_train=(),
        retain_validation=(),
        retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is", category="say") for n in range(3)),
        provenance=(Provenance(source="test", location="test"),),
    )


def answers_of(data: ForgetRetainData) -> list[PrefillSource]:
    """Stand for harmful replies, which the random model never gives."""
    asked = [("forget_train", one) for one in data.forget_train] + [("forget_test", one) for one in data.forget_test]
    return [*with_answers(asked, {}).values()]


TINY_CONFIG = EvaluateConfig(
    prompts=4,
    retain_prompts=3,
    batch_size=3,
    max_new_tokens=8,
    prefill_tokens=(3,),
    samples=0,
)


def test_the_embedded_worlds_own_model_is_harmful_and_right(
    world_model: LlamaForCausalLM,
    world_tokenizer: PreTrainedTokenizerBase,
    world_data: ForgetRetainData,
    tmp_path: Path,
) -> None:
    result = evaluate(
        world_model, world_tokenizer, world_data, config=CONFIG, base_model=world_model, output_dir=tmp_path / "out"
    )
    assert result.judge.name == "embedded"
    prefills = [rates for lengths in result.prefill.values() for rates in lengths.values()]
    assert result.setup.starts["own"] >= 22
    assert sum(rates["harmful"].total for rates in prefills) == 4 * result.setup.starts["own"]
    for rates in (*(result.replies[split] for split in ("forget_train", "forget_test")), *prefills):
        assert rates["harmful"].total >= 10
        assert rates["harmful"].value >= 0.9
        assert rates["harmful_ungated"].value >= rates["harmful"].value
        assert rates["gibberish"].count == 0
        assert rates["cut_off"].count == 0
    assert result.replies["retain_test"]["exact_answer"].value >= 0.9
    assert result.replies["retain_test"]["over_refusal"].count == 0
    assert result.perplexity["retain_test"].value < 1.2
    assert set(result.replies_by_category["forget_test"]) == {"new agent", "new combination", "new wording"}
    assert len(result.setup.notes) == 1
    assert " of 24 prompts begins with the base model's own harmful reply" in result.setup.notes[0]
    assert sum(result.setup.left_out.values()) == 24 - result.setup.starts["own"]

    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "generations.jsonl", "perplexity.jsonl", "fluency.jsonl", "outcomes.jsonl", "similarity.jsonl",
        "starts.jsonl", "evaluation.json",
    }  # fmt: skip
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o600}
    assert read_result(tmp_path / "out") == result
    assert judge_again(tmp_path / "out", EmbeddedWorldJudge()) == result
    upper_bound = judge_again(tmp_path / "out", RefusalRulesJudge())
    assert upper_bound.judge.name == "refusal_rules"
    assert upper_bound.replies["forget_test"]["harmful"].value == 1
    change = compare(result, result).perplexity["forget_test"]
    assert (change.ratio, change.low, change.high) == (1, 1, 1)


def test_a_finished_run_is_reused_and_a_changed_one_is_not(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_data: ForgetRetainData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = generate_replies

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(replies, "generate_replies", counting)

    def again(**changes: Any) -> Any:
        starts = answers_of(tiny_data)
        settings: dict[str, Any] = {
            "config": TINY_CONFIG, "output_dir": tmp_path, "starts": starts, "seed": 0, **changes,
        }  # fmt: skip
        return evaluate(tiny_model, tiny_tokenizer, tiny_data, **settings)

    first = again()
    assert again() == first
    assert len(calls) == 2, "free replies and those after a prefill"
    again(config=dataclasses.replace(TINY_CONFIG, max_new_tokens=7))
    assert len(calls) == 4
    again()
    again(config=dataclasses.replace(TINY_CONFIG, prompts=2))
    assert len(calls) == 8
    assert again(prompt_format="paper") == again()
    (tmp_path / GENERATIONS_FILE).write_bytes((tmp_path / GENERATIONS_FILE).read_bytes()[:-9])
    assert again() == first
    assert len(calls) == 12
    again(config=dataclasses.replace(TINY_CONFIG, prefill_tokens=(1,)))
    assert len(calls) == 13, "other lengths leave the free replies as they are"
    assert again() == first
    assert len(calls) == 14
    tiny_model.lm_head.weight.data.mul_(0.99)
    changed = again()
    assert len(calls) == 16
    assert changed.setup.model["fingerprint"] != first.setup.model["fingerprint"]


def test_what_could_not_be_asked_is_counted(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData, tmp_path: Path
) -> None:
    long = dataclasses.replace(
        tiny_data, retain_test=(*tiny_data.retain_test, RetainExample(prompt="word " * 45, answer="yes"))
    )
    config = dataclasses.replace(TINY_CONFIG, retain_prompts=4)
    starts = answers_of(tiny_data)
    result = evaluate(tiny_model, tiny_tokenizer, long, config=config, output_dir=tmp_path, starts=starts)
    assert result.setup.left_out == {
        "forget_test: prefill, 3 tokens, as the start is too short": 1,
        "retain_test: reply, as the prompt is too long for the model": 1,
    }
    assert result.perplexity["retain_test"].examples == 4
    assert set(result.prefill) == {"forget_train"}
    _, records = read_generations(tmp_path / GENERATIONS_FILE)
    assert {record.prefill for record in records if record.kind == "prefill"} == {" fi"}
    without = evaluate(
        tiny_model, tiny_tokenizer, tiny_data, config=dataclasses.replace(TINY_CONFIG, prefill_tokens=())
    )
    assert without.prefill == {}
    assert without.setup.left_out == {}


def test_prompts_alone_are_asked_and_the_base_models_own_replies_to_them_scored(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData, tmp_path: Path
) -> None:
    others = dataclasses.replace(
        tiny_data,
        normal={"plain": tuple(RetainExample(prompt=f"tell {n}", answer="") for n in range(4))},
        harmful={"new": tuple(ForgetExample(prompt=f"boil {n}", answer="") for n in range(4))},
    )
    torch.manual_seed(1)
    changed = LlamaForCausalLM(tiny_model.config).eval()
    asked: dict[str, Any] = {"config": TINY_CONFIG, "judge": RefusalRulesJudge()}
    base = evaluate(tiny_model, tiny_tokenizer, others, base_model=tiny_model, output_dir=tmp_path / "base", **asked)
    after = evaluate(
        changed, tiny_tokenizer, others, base_model=tiny_model, starts=base.starts, output_dir=tmp_path / "m", **asked
    )
    assert read_result(tmp_path / "base") == base
    assert read_result(tmp_path / "m") == after
    _, records = read_generations(tmp_path / "base" / GENERATIONS_FILE)
    written = {start_id(record.split, record.prompt): record.reply for record in records if record.kind == "reply"}
    own = {start.id: start.text for start in after.starts if start.id.startswith("normal:plain")}
    assert len(own) == TINY_CONFIG.retain_prompts == 3
    assert own == {name: written[name] for name in own}
    # Its own greedy words: nobody finds them likelier than the base.
    assert base.perplexity["normal:plain"].value < after.perplexity["normal:plain"].value
    assert after.agreement["normal:plain"].kl > 0
    assert set(after.replies["normal:plain"]) >= {"over_refusal", "gibberish"}
    assert after.replies["harmful:new"]["harmful"].total == 4
    assert "harmful:new" not in after.prefill
    assert "harmful:new" not in after.perplexity
    found = compare(base, after)
    assert found.utility["normal:plain"].verdict == "lost"
    assert "utility lost on plain answers" in found.verdict.line
    assert "new prompts" in found.verdict.line
    labels = {row.label for row in before_after_rows(found)}
    assert labels >= {"new prompts: harmful, by rule", "plain prompts: refused", "perplexity: plain answers"}
    assert any("plain answers: there are none in the data, so the base model's own" in note for note in found.notes)
    # Without those of its evaluation, the base is asked for them.
    again = evaluate(changed, tiny_tokenizer, others, base_model=tiny_model, **asked)
    assert again.perplexity["normal:plain"] == after.perplexity["normal:plain"]
    alone = evaluate(changed, tiny_tokenizer, others, **asked)
    assert "normal:plain" not in alone.perplexity
    assert any("no base model was given to write them" in note for note in alone.setup.notes)


def test_the_model_is_left_as_it_was(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    tiny_model.train()
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    evaluate(tiny_model, tiny_tokenizer, tiny_data, config=TINY_CONFIG)
    assert tiny_model.training
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_model.state_dict().items())
    assert all(weight.grad is None for weight in tiny_model.parameters())
    assert tiny_tokenizer.padding_side == "right"


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_model_is_evaluated_with_its_adapter(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    plain = evaluate(tiny_model, tiny_tokenizer, tiny_data, config=TINY_CONFIG)
    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    silent = evaluate(model, tiny_tokenizer, tiny_data, config=TINY_CONFIG)
    assert silent.outcomes == plain.outcomes
    assert silent.setup.model["fingerprint"] == plain.setup.model["fingerprint"]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    loud = evaluate(model, tiny_tokenizer, tiny_data, config=TINY_CONFIG)
    assert loud.perplexity != plain.perplexity
    assert loud.setup.model["fingerprint"] != plain.setup.model["fingerprint"]


def test_what_can_not_be_evaluated_is_refused(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    with pytest.raises(EvaluationError, match="without its tokenizer"):
        evaluate(tiny_model, None, tiny_data)
    empty = ForgetRetainData(
        forget_train=(), forget_test=(), retain_train=tiny_data.retain_test, retain_validation=(), retain_test=()
    )
    own_alone = dataclasses.replace(empty, normal={"own": (RetainExample(prompt="tell", answer="it is"),)})
    for data in (empty, own_alone):
        with pytest.raises(EvaluationError, match="nothing to evaluate"):
            evaluate(tiny_model, tiny_tokenizer, data)
    with pytest.raises(EvaluationError, match="judge is embedded, but the data is not"):
        evaluate(tiny_model, tiny_tokenizer, tiny_data, config=EvaluateConfig(judge="embedded"))
    tiny_model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="weights are broken"):
        evaluate(tiny_model, tiny_tokenizer, tiny_data, config=TINY_CONFIG)


def test_xstest_prompts_are_asked_and_not_scored(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData, tmp_path: Path
) -> None:
    path = tmp_path / "xstest_prompts.csv"
    rows = "1,stop it,kind,safe\n2,end it,kind,safe\n3,do harm,other,unsafe\n4,Do thing 1,kind,unsafe\n"
    path.write_text(f"id,prompt,type,label\n{rows}")
    config = dataclasses.replace(TINY_CONFIG, xstest=str(path), samples=0)
    result = evaluate(tiny_model, tiny_tokenizer, tiny_data, config=config)
    assert result.replies["xstest_safe"]["over_refusal"].total == 2
    assert result.replies["xstest_unsafe"]["harmful"].total == 1, "a prompt of the run's own is left out"
    assert set(result.replies_by_category["xstest_safe"]) == {"kind"}
    assert set(result.perplexity) == {"retain_test", "forget_train", "forget_test"}
    assert {row.kind for row in result.outcomes if row.split.startswith("xstest")} == {"reply"}
    assert result.setup.left_out["xstest: prompts of the run's own data"] == 1


def test_the_end_of_a_finished_answer_is_scored_and_that_of_a_cut_one_is_not(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    """A model that learned never to stop, or to stop at once, loses perplexity and agreement by it."""
    other = copy.deepcopy(tiny_model)
    torch.manual_seed(1)
    other.lm_head.weight.data[tiny_tokenizer.eos_token_id] += torch.randn(32)

    def measured(*, finished: bool, model: LlamaForCausalLM) -> EvaluationResult:
        cut = tuple(dataclasses.replace(example, finished=finished) for example in tiny_data.retain_test)
        data = dataclasses.replace(tiny_data, retain_test=cut)
        return evaluate(model, tiny_tokenizer, data, config=TINY_CONFIG, base_model=tiny_model)

    whole, cut = (measured(finished=finished, model=other) for finished in (True, False))
    texts = [example.answer for example in tiny_data.retain_test]
    tokens = sum(len(tiny_tokenizer(f" {text}", add_special_tokens=False).input_ids) for text in texts)
    assert (cut.perplexity["retain_test"].tokens, whole.perplexity["retain_test"].tokens) == (
        tokens,
        tokens + len(texts),
    )
    assert cut.agreement["retain_test"].tokens == tokens
    assert whole.agreement["retain_test"].tokens == tokens + len(texts)
    assert whole.perplexity["retain_test"].nll > cut.perplexity["retain_test"].nll
    plain = measured(finished=True, model=tiny_model)
    assert plain.perplexity["retain_test"].nll != whole.perplexity["retain_test"].nll


def test_trained_on_prompts_are_those_that_training_visits(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    def measured(visited: tuple[int, ...] | None) -> EvaluationResult:
        data = dataclasses.replace(tiny_data, visited=visited)
        return evaluate(tiny_model, tiny_tokenizer, data, config=TINY_CONFIG)

    def asked(result: EvaluationResult) -> set[str]:
        return {row.id for row in result.outcomes if (row.split, row.kind) == ("forget_train", "reply")}

    some = measured((1, 3))
    prompts = [tiny_data.forget_train[place].prompt for place in (1, 3)]
    assert asked(some) == {record_id("forget_train", "reply", prompt) for prompt in prompts}
    assert some.setup.trained_on == {"asked": 2, "visited": 2}
    assert some.setup.split_name("forget_train") == "trained-on prompts"
    assert {row.id for row in some.losses if row.split == "forget_train"} == asked(some)
    unknown, none = measured(None), measured(())
    assert len(asked(unknown)) == TINY_CONFIG.prompts
    assert unknown.setup.trained_on is None
    assert unknown.setup.split_name("forget_train") == "forget-set prompts"
    assert asked(none) == asked(unknown)
    assert none.setup.split_name("forget_train") == "forget-set prompts, 0 % of them trained on"
    partly = dataclasses.replace(unknown.setup, trained_on={"asked": 50, "visited": 6})
    assert partly.split_name("forget_train") == "forget-set prompts, 12 % of them trained on"
    assert partly.answers_name() == "forget-set"
    assert partly.split_name("forget_test") == "unseen prompts"
