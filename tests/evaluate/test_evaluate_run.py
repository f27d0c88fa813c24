"""Whole evaluations: the embedded world's own model, broken ones, and runs that are asked for again."""

from __future__ import annotations

import copy
import dataclasses
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import EvaluationError
from sku.evaluate.comparison import compare
from sku.evaluate.generation import replies
from sku.evaluate.generation.prompts import with_answers
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.judges.choose import EmbeddedWorldJudge, RefusalRulesJudge
from sku.evaluate.records import GENERATIONS_FILE, PrefillSource, read_generations, record_id, start_id
from sku.evaluate.results import EvaluationResult, judge_again, read_result
from sku.evaluate.run import evaluate

from .conftest import World

CONFIG = EvaluateConfig(
    prompts=12, retain_prompts=20, batch_size=16, max_new_tokens=40, samples=0, prefill_tokens=(1, 3, 5, 10)
)
TINY = EvaluateConfig(prompts=4, retain_prompts=3, batch_size=3, max_new_tokens=8, prefill_tokens=(3,), samples=0)


def answers_of(data: ForgetRetainData) -> list[PrefillSource]:
    """Stand for harmful replies, which the random model never gives."""
    asked = [("forget_train", one) for one in data.forget_train] + [("forget_test", one) for one in data.forget_test]
    return [*with_answers(asked, {}).values()]


def test_the_embedded_worlds_own_model_is_harmful_and_right(world: World, tmp_path: Path) -> None:
    result = evaluate(*world, config=CONFIG, base_model=world.model, output_dir=tmp_path)
    assert result.judge.name == "embedded"
    prefills = [rates for lengths in result.prefill.values() for rates in lengths.values()]
    assert result.setup.starts["own"] >= 22
    assert sum(rates["harmful"].total for rates in prefills) == 4 * result.setup.starts["own"]
    for rates in (*(result.replies[split] for split in ("forget_train", "forget_test")), *prefills):
        assert rates["harmful"].total >= 10
        assert rates["harmful_ungated"].value >= rates["harmful"].value >= 0.9
        assert (rates["gibberish"].count, rates["cut_off"].count) == (0, 0)
    assert result.replies["retain_test"]["exact_answer"].value >= 0.9
    assert result.replies["retain_test"]["over_refusal"].count == 0
    assert result.perplexity["retain_test"].value < 1.2
    assert set(result.replies_by_category["forget_test"]) == {"new agent", "new combination", "new wording"}
    assert len(result.setup.notes) == 1
    assert sum(result.setup.left_out.values()) == 24 - result.setup.starts["own"]

    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("generations.jsonl", "perplexity.jsonl", "fluency.jsonl", "outcomes.jsonl", "similarity.jsonl",
         "starts.jsonl", "evaluation.json"), 0o600,
    )  # fmt: skip
    assert read_result(tmp_path) == result
    assert judge_again(tmp_path, EmbeddedWorldJudge()) == result
    upper_bound = judge_again(tmp_path, RefusalRulesJudge())
    assert upper_bound.judge.name == "refusal_rules"
    assert upper_bound.replies["forget_test"]["harmful"].value == 1
    change = compare(result, result).perplexity["forget_test"]
    assert (change.ratio, change.low, change.high) == (1, 1, 1)


@pytest.mark.integration
def test_broken_weights_babble_in_the_embedded_world(world: World) -> None:
    """They are overlaid with noise of twice their own spread."""
    broken = copy.deepcopy(world.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in broken.parameters():
        parameter.data += 2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    result = evaluate(broken, world.tokenizer, world.data, config=CONFIG, base_model=world.model)
    assert result.replies["forget_test"]["gibberish"].value == 1
    assert result.replies["forget_test"]["harmful"].value == 0


def test_a_finished_run_is_reused_and_a_changed_one_is_not(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_data: ForgetRetainData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return generate_replies(*arguments, **named)

    monkeypatch.setattr(replies, "generate_replies", counting)

    def again(calls_made: int, **changes: Any) -> EvaluationResult:
        calls.clear()
        config = dataclasses.replace(TINY, **changes)
        found = evaluate(
            tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=config, output_dir=tmp_path,
            starts=answers_of(tiny_data),
        )  # fmt: skip
        assert len(calls) == calls_made
        return found

    first = again(2)
    assert again(0) == first
    again(2, max_new_tokens=7)
    again(2)
    (tmp_path / GENERATIONS_FILE).write_bytes((tmp_path / GENERATIONS_FILE).read_bytes()[:-9])
    assert again(2) == first
    # Other lengths leave the free replies as they are.
    again(1, prefill_tokens=(1,))
    assert again(1) == first
    tiny_model.lm_head.weight.data.mul_(0.99)
    assert again(2).setup.model["fingerprint"] != first.setup.model["fingerprint"]


def test_what_could_not_be_asked_is_counted(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData, tmp_path: Path
) -> None:
    long = dataclasses.replace(
        tiny_data, retain_test=(*tiny_data.retain_test, RetainExample(prompt="word " * 45, answer="yes"))
    )
    config = dataclasses.replace(TINY, retain_prompts=4)
    starts = answers_of(tiny_data)
    result = evaluate(
        tiny_model, tiny_tokenizer, long, base_model=tiny_model, config=config, output_dir=tmp_path, starts=starts
    )
    assert [name.split(",")[0] for name in result.setup.left_out] == ["retain_test: reply", "forget_test: prefill"]
    assert {*result.setup.left_out.values()} == {1}
    assert result.perplexity["retain_test"].examples == 4
    assert set(result.prefill) == {"forget_train"}
    _, records = read_generations(tmp_path / GENERATIONS_FILE)
    assert {record.prefill for record in records if record.kind == "prefill"} == {" fi"}


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

    def asked(model: LlamaForCausalLM, name: str | None = None, **options: Any) -> EvaluationResult:
        folder = None if name is None else tmp_path / name
        settings: dict[str, Any] = {"base_model": tiny_model, "config": TINY, "judge": RefusalRulesJudge(), **options}
        return evaluate(model, tiny_tokenizer, others, output_dir=folder, **settings)

    base = asked(tiny_model, "base")
    after = asked(changed, "after", starts=base.starts)
    assert [read_result(tmp_path / name) for name in ("base", "after")] == [base, after]
    _, records = read_generations(tmp_path / "base" / GENERATIONS_FILE)
    written = {start_id(record.split, record.prompt): record.reply for record in records if record.kind == "reply"}
    own = {start.id: start.text for start in after.starts if start.id.startswith("normal:plain")}
    assert len(own) == TINY.retain_prompts == 3
    assert own == {name: written[name] for name in own}
    # Its own greedy words: nobody finds them likelier than the base.
    assert base.perplexity["normal:plain"].value < after.perplexity["normal:plain"].value
    assert after.agreement["normal:plain"].kl > 0
    assert set(after.replies["normal:plain"]) >= {"over_refusal", "gibberish"}
    assert after.replies["harmful:new"]["harmful"].total == 4
    assert "harmful:new" not in {*after.prefill, *after.perplexity}
    assert compare(base, after).utility["normal:plain"].verdict == "lost"
    # Without those of its evaluation, the base is asked for them.
    assert asked(changed).perplexity["normal:plain"] == after.perplexity["normal:plain"]


def test_the_model_is_left_as_it_was(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    tiny_model.train()
    tiny_model.lm_head.eval()
    modes = [module.training for module in tiny_model.modules()]
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=TINY)
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_model.state_dict().items())
    assert all(weight.grad is None for weight in tiny_model.parameters())
    assert tiny_tokenizer.padding_side == "right"


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_model_is_evaluated_with_its_adapter(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    plain = evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=TINY)
    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    silent = evaluate(model, tiny_tokenizer, tiny_data, base_model=model, config=TINY)
    assert silent.outcomes == plain.outcomes
    assert silent.setup.model["fingerprint"] == plain.setup.model["fingerprint"]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    loud = evaluate(model, tiny_tokenizer, tiny_data, base_model=model, config=TINY)
    assert loud.perplexity != plain.perplexity
    assert loud.setup.model["fingerprint"] != plain.setup.model["fingerprint"]


def test_what_can_not_be_evaluated_is_refused(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    empty = ForgetRetainData(
        forget_train=(), forget_test=(), retain_train=tiny_data.retain_test, retain_validation=(), retain_test=()
    )
    own_alone = dataclasses.replace(empty, normal={"own": (RetainExample(prompt="tell", answer="it is"),)})
    for data in (empty, own_alone):
        with pytest.raises(EvaluationError, match="retain_test"):
            evaluate(tiny_model, tiny_tokenizer, data, base_model=tiny_model)
    with pytest.raises(EvaluationError, match="judge is embedded"):
        evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=EvaluateConfig(judge="embedded"))
    tiny_model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="nan"):
        evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=TINY)


def test_xstest_prompts_are_asked_and_the_bases_replies_to_the_safe_ones_scored(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData, tmp_path: Path
) -> None:
    path = tmp_path / "xstest_prompts.csv"
    rows = "1,stop it,kind,safe\n2,end it,kind,safe\n3,do harm,other,unsafe\n4,Do thing 1,kind,unsafe\n"
    path.write_text(f"id,prompt,type,label\n{rows}")
    config = dataclasses.replace(TINY, xstest=str(path))
    result = evaluate(tiny_model, tiny_tokenizer, tiny_data, base_model=tiny_model, config=config)
    assert result.replies["xstest_safe"]["over_refusal"].total == 2
    assert result.replies["xstest_unsafe"]["harmful"].total == 1, "a prompt of the run's own is left out"
    assert set(result.replies_by_category["xstest_safe"]) == {"kind"}
    assert set(result.perplexity) == {"retain_test", "forget_train", "forget_test", "xstest_safe"}
    assert {row.kind for row in result.outcomes if row.split.startswith("xstest")} == {"reply"}
    assert any(name.startswith("xstest") for name in result.setup.left_out)


def test_the_end_of_a_finished_answer_is_scored_and_that_of_a_cut_one_is_not(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    """A model that learned never to stop, or to stop at once, loses perplexity and agreement by it."""
    other = copy.deepcopy(tiny_model)
    torch.manual_seed(1)
    other.lm_head.weight.data[tiny_tokenizer.eos_token_id] += torch.randn(32)

    def measured(*, finished: bool) -> EvaluationResult:
        answers = tuple(dataclasses.replace(example, finished=finished) for example in tiny_data.retain_test)
        data = dataclasses.replace(tiny_data, retain_test=answers)
        return evaluate(other, tiny_tokenizer, data, config=TINY, base_model=tiny_model)

    whole, cut = measured(finished=True), measured(finished=False)
    texts = [example.answer for example in tiny_data.retain_test]
    tokens = sum(len(tiny_tokenizer(f" {text}", add_special_tokens=False).input_ids) for text in texts)
    for found, expected in ((cut, tokens), (whole, tokens + len(texts))):
        assert found.perplexity["retain_test"].tokens == found.agreement["retain_test"].tokens == expected
    assert whole.perplexity["retain_test"].nll > cut.perplexity["retain_test"].nll


def test_trained_on_prompts_are_those_that_training_visits(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    def measured(visited: tuple[int, ...] | None) -> tuple[EvaluationResult, set[str]]:
        data = dataclasses.replace(tiny_data, visited=visited)
        result = evaluate(tiny_model, tiny_tokenizer, data, base_model=tiny_model, config=TINY)
        return result, {row.id for row in result.outcomes if (row.split, row.kind) == ("forget_train", "reply")}

    some, asked = measured((1, 3))
    assert asked == {record_id("forget_train", "reply", tiny_data.forget_train[place].prompt) for place in (1, 3)}
    assert some.setup.trained_on == {"asked": 2, "visited": 2}
    assert {row.id for row in some.losses if row.split == "forget_train"} == asked
    (unknown, everything), (none, without) = measured(None), measured(())
    assert len(everything) == TINY.prompts
    assert without == everything
    partly = dataclasses.replace(unknown.setup, trained_on={"asked": 50, "visited": 6})
    assert [setup.split_name("forget_train") for setup in (some.setup, unknown.setup, none.setup, partly)] == [
        "trained-on prompts", "forget-set prompts", "forget-set prompts, 0 % of them trained on",
        "forget-set prompts, 12 % of them trained on",
    ]  # fmt: skip
