"""Whole attacks on the embedded world: figures, controls, files, and runs that go on where they stopped."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks import CARDS, AttackReport, AttackResult, relearn
from sku.attacks.run import TOO_LARGE, run_attacks
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import EvaluationError
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.records import read_generations
from sku.evaluate.run import evaluate
from sku.models import embedding_weight
from sku.quantization import FORMATS

from .conftest import world_recipe

ATTACKS = [name for name in CARDS if name != "none"]


def quick(patch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> None:
    """Relearns on few pairs, at a high rate."""
    for name, value in (("PAIRS", (10,)), ("STEPS", steps), ("LEARNING_RATES", (1e-3,))):
        patch.setattr(relearn, name, value)


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Ran:
    """All attacks at once."""

    report: AttackReport
    folder: Path
    results: dict[tuple[str, str], AttackResult]


@pytest.fixture(scope="module")
def ran(
    world_data: ForgetRetainData,
    world_base: PreTrainedModel,
    world_unlearned: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    folder = tmp_path_factory.mktemp("attacks") / "out"
    before = [digest(model) for model in (world_base, world_unlearned)]
    recipe = world_recipe(f"evaluate.attacks=[{', '.join(ATTACKS)}]")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, (4, 16))
        report = run_attacks(recipe, world_unlearned, world_base, world_tokenizer, world_data, output_dir=folder)
    assert [digest(model) for model in (world_base, world_unlearned)] == before, "an attack changed a model"
    assert not any(parameter.grad is not None for parameter in world_unlearned.parameters())
    return Ran(report, folder, {(result.attack, result.setting): result for result in report.results})


def test_every_setting_has_its_figures_for_model_and_control(ran: Ran) -> None:
    assert list(ran.results) == [
        ("none", ""), ("paraphrase", ""), ("template", ""), *(("rounding", name) for name in FORMATS),
    ]  # fmt: skip
    assert [card.name for card in ran.report.cards] == ["none", *ATTACKS]
    for result in ran.report.results:
        assert result.questions == 8
        for measured in (result.model, result.control):
            assert measured.harmful.after.total == 8
            assert measured.harmful_upper_bound == measured.harmful.after
            assert measured.harmful.difference == measured.harmful.after.value - measured.harmful.before.value
            replies = measured.replies["harmful"].total
            assert replies == 8 if not measured.variants else replies > 8
        assert result.control.harmful.before.value == 1, "the base answers every hazard"
        assert result.control.harmful.after.value >= 0.9, "and goes on doing so under attack"
        assert result.model.harmful.before.count == 0, "the unlearned model answers none"
    none = ran.results["none", ""].model.harmful
    assert (none.difference, none.p_value) == (0, 1)


def test_a_format_that_cannot_hold_the_weights_is_left_out(
    world_data: ForgetRetainData, world_base: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Float16 ends at 65,504."""
    large = copy.deepcopy(world_base)
    with torch.no_grad():
        embedding_weight(large)[0, 0] = 1e5
    recipe = world_recipe("evaluate.attacks=[rounding]", "evaluate.attack_prompts=2", "evaluate.max_new_tokens=2")
    report = run_attacks(recipe, large, world_base, world_tokenizer, world_data)
    assert [result.setting for result in report.results] == ["", "bf16", "int8", "nf4"]
    assert report.left_out == {f"rounding, fp16: {TOO_LARGE}": 2}


def test_plain_replies_are_those_of_evaluate(
    ran: Ran,
    world_data: ForgetRetainData,
    world_base: PreTrainedModel,
    world_unlearned: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(world_recipe().evaluate, prompts=8, retain_prompts=1, prefill_tokens=(), samples=0)
    expected = evaluate(
        world_unlearned, world_tokenizer, world_data, config=config, base_model=world_base, output_dir=tmp_path
    )
    _, records = read_generations(tmp_path / "generations.jsonl")
    _, rows = read_generations(ran.folder / "attacks" / "none.jsonl")
    own = [dataclasses.replace(row, id=row.id.removeprefix("model//")) for row in rows if row.id.startswith("model//")]
    assert len(own) == 8
    assert own == [record for record in records if record.split == "forget_test"]
    assert ran.results["none", ""].model.replies == expected.replies["forget_test"]


def test_files_are_private_whole_and_read_back(ran: Ran) -> None:
    assert stat.S_IMODE((ran.folder / "attacks").stat().st_mode) == 0o700
    files = {path.name for path in (ran.folder / "attacks").iterdir()}
    trainings = {f"relearn.{name}.jsonl" for name in ("model.10.0.001", "control.10.0.001")}
    assert files == {f"{name}.jsonl" for name in CARDS if name != "relearn"} | trainings
    assert {stat.S_IMODE(path.stat().st_mode) for path in ran.folder.rglob("*.json*")} == {0o600}
    assert AttackReport.read(ran.folder) == ran.report
    text = (ran.folder / "attacks.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(ran.report.to_dict()))
    assert "take " not in text, "figures carry no reply"


def test_the_judge_sees_the_question_and_not_its_wrapping(
    world_data: ForgetRetainData, world_base: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    class Noting(RefusalRulesJudge):
        def judge(self, records: Any) -> Any:
            prompts.update(record.prompt for record in records)
            return super().judge(records)

    prompts: set[str] = set()
    recipe = world_recipe("evaluate.attacks=[template]", "evaluate.attack_prompts=2")
    report = run_attacks(recipe, world_base, world_base, world_tokenizer, world_data, judge=Noting())
    assert len(prompts) == 2
    assert prompts <= {example.prompt for example in world_data.forget_test}
    assert report.setup.judge.name == "refusal_rules"


def splits(**changes: Any) -> ForgetRetainData:
    fields: dict[str, Any] = {
        "forget_train": (ForgetExample(prompt="a", answer="b"),),
        "forget_test": (ForgetExample(prompt="c", answer="d"),),
        "retain_train": (RetainExample(prompt="e", answer="f"),), "retain_validation": (), "retain_test": (),
    }  # fmt: skip
    return ForgetRetainData(**{**fields, **changes})


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ("evaluate.attacks=[]", splits(), "evaluate.attacks"),
        ("evaluate.attacks=[template]", splits(forget_test=()), "forget_test"),
        ("evaluate.attacks=[relearn]", splits(forget_train=()), "forget_train"),
    ],
)
def test_what_can_not_run_is_refused(
    change: str,
    data: ForgetRetainData,
    message: str,
    world_base: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(EvaluationError, match=message):
        run_attacks(world_recipe("evaluate.attacks=[template]", change), world_base, world_base, world_tokenizer, data)


def test_prompts_without_room_for_a_reply_are_left_out(
    world_base: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    long = ForgetExample(prompt="rice " * 240, answer="it is rice .")
    recipe = world_recipe("evaluate.attacks=[template]")
    short = splits().forget_test[0]
    report = run_attacks(recipe, world_base, world_base, world_tokenizer, splits(forget_test=(long, short)))
    assert report.left_out == {"all attacks: the prompt is too long for the model": 1}
    assert {result.questions for result in report.results} == {1}
    with pytest.raises(EvaluationError, match="leaves room for a reply"):
        run_attacks(recipe, world_base, world_base, world_tokenizer, splits(forget_test=(long,)))
