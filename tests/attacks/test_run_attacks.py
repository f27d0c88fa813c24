"""Whole attacks on the embedded world: figures, controls, files, and what is left out."""

from __future__ import annotations

import copy
import dataclasses
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import assert_same_bits
from sku.attacks import CARDS, AttackReport, AttackResult
from sku.attacks.run import TOO_LARGE
from sku.data.examples import ForgetExample
from sku.errors import EvaluationError
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.records import read_generations
from sku.evaluate.run import evaluate
from sku.models import embedding_weight
from sku.pipeline.evaluate import run_evaluation
from sku.pipeline.run import run_recipe
from sku.quantization import FORMATS

from .conftest import World, world_recipe

ATTACKS = [name for name in CARDS if name != "none"]


@dataclass(frozen=True)
class Ran:
    """All attacks at once."""

    report: AttackReport
    folder: Path
    results: dict[tuple[str, str], AttackResult]


@pytest.fixture(scope="module")
def ran(world: World, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("attacks") / "out"
    models = world.base, world.unlearned
    before = [copy.deepcopy(model.state_dict()) for model in models]
    report = world.attack(folder, f"evaluate.attacks=[{', '.join(ATTACKS)}]")
    for model, weights in zip(models, before, strict=True):
        assert_same_bits(model.state_dict(), weights)
        assert not any(parameter.grad is not None for parameter in model.parameters())
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
            replies = measured.replies["harmful"].total
            assert replies == 8 if not measured.variants else replies > 8
        assert result.control.harmful.before.value == 1, "the base answers every hazard"
        assert result.control.harmful.after.value >= 0.9, "and goes on doing so under attack"
        assert result.model.harmful.before.count == 0, "the unlearned model answers none"
    none = ran.results["none", ""].model.harmful
    assert (none.difference, none.p_value) == (0, 1)


def test_a_format_that_cannot_hold_the_weights_is_left_out(world: World, tmp_path: Path) -> None:
    """Float16 ends at 65,504."""
    large = copy.deepcopy(world.base)
    with torch.no_grad():
        embedding_weight(large)[0, 0] = 1e5
    changes = ("evaluate.attacks=[rounding]", "evaluate.attack_prompts=2", "evaluate.max_new_tokens=2")
    report = world.attack(tmp_path, *changes, model=large)
    assert [result.setting for result in report.results] == ["", "bf16", "int8", "nf4"]
    assert report.left_out == {f"rounding, fp16: {TOO_LARGE}": 2}


def test_plain_replies_are_those_of_evaluate(ran: Ran, world: World, tmp_path: Path) -> None:
    config = dataclasses.replace(world_recipe().evaluate, prompts=8, retain_prompts=1, prefill_tokens=(), samples=0)
    expected = evaluate(
        world.unlearned, world.tokenizer, world.data, config=config, base_model=world.base, output_dir=tmp_path
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
    assert "take " not in (ran.folder / "attacks.json").read_text(encoding="utf-8"), "figures carry no reply"


def test_the_judge_sees_the_question_and_not_its_wrapping(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noting(RefusalRulesJudge):
        def judge(self, records: Any) -> Any:
            prompts.update(record.prompt for record in records)
            return super().judge(records)

    prompts: set[str] = set()
    monkeypatch.setattr("sku.attacks.run.choose_judge", lambda *_: Noting())
    report = world.attack(tmp_path, "evaluate.attacks=[template]", "evaluate.attack_prompts=2", model=world.base)
    assert len(prompts) == 2
    assert prompts <= {example.prompt for example in world.data.forget_test}
    assert report.setup.judge.name == "refusal_rules"


@pytest.mark.parametrize(("attack", "empty"), [("template", "forget_test"), ("relearn", "forget_train")])
def test_what_can_not_run_is_refused(attack: str, empty: str, world: World, tmp_path: Path) -> None:
    data = dataclasses.replace(world.data, **{empty: ()})  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=empty):
        world.attack(tmp_path, f"evaluate.attacks=[{attack}]", data=data)


def test_prompts_without_room_for_a_reply_are_left_out(world: World, tmp_path: Path) -> None:
    long = ForgetExample(prompt="rice " * 240, answer="it is rice .")
    data = dataclasses.replace(world.data, forget_test=(long, ForgetExample(prompt="c", answer="d")))
    report = world.attack(tmp_path / "a", "evaluate.attacks=[template]", data=data)
    assert report.left_out == {"all attacks: the prompt is too long for the model": 1}
    assert {result.questions for result in report.results} == {1}
    with pytest.raises(EvaluationError):
        world.attack(tmp_path / "b", data=dataclasses.replace(data, forget_test=(long,)))


@pytest.mark.integration
@pytest.mark.usefixtures("one_thread", "blank_pictures")
def test_a_run_ends_with_its_attacks_and_goes_on_at_them(tmp_path: Path) -> None:
    recipe = world_recipe(
        "acquire.training.max_steps=2", "acquire.training.save_steps=2", "evaluate.prompts=3",
        "evaluate.retain_prompts=3", "evaluate.samples=0", "evaluate.attack_prompts=3",
        "evaluate.attacks=[template]", "negate.alpha=1.25", "evaluate.max_new_tokens=8",
        "data.forget.limit=120", "data.retain.limit=120",
    )  # fmt: skip
    whole = run_recipe(recipe, tmp_path / "whole")
    report = whole.attacks
    assert report is not None
    assert [result.attack for result in report.results] == ["none", "template"]
    assert AttackReport.read(whole.folder / "evaluation") == report
    results = json.loads((whole.folder / "results.json").read_text(encoding="utf-8"))
    assert AttackReport.from_dict(results["attacks"]) == report
    assert "attacks" in whole.manifest["seconds"]
    assert report.setup.control["fingerprint"] != report.setup.model["fingerprint"]

    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "attack template: replies" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "broken", progress=interrupt)
    resumed = run_recipe(recipe, tmp_path / "broken", resume=True)
    assert resumed.attacks == report

    alone = tmp_path / "alone"
    run_evaluation(recipe, str(whole.folder / "unlearned"), alone)
    assert AttackReport.read(alone) == report
