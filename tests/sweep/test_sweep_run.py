"""A sweep on a tiny model: exact weights at every alpha, equal results, points that outlive a kill."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sku.config import Recipe
from sku.data.examples import Example, ForgetRetainData
from sku.errors import EvaluationError, NoAlphaError, RecipeError
from sku.evaluate.generation import prompts, replies
from sku.evaluate.generation.prompts import draw_examples
from sku.evaluate.judges import Calibration, write_calibration
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import PrefillSource, start_id
from sku.negate.task_vector import TaskVector, negate
from sku.sweep import BROKEN_COST, Sweep
from sku.sweep import evaluator as sweep_meter
from sku.sweep import run as sweep_run
from sku.sweep.evaluator import (
    AlphaEvaluator,
    Questions,
    check_judge,
    draw_questions,
    replies_of,
    validation_generator,
)
from sku.sweep.run import below, choose_alpha, sweep, unmeasurable


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a sweep needs but its folder."""

    base: PreTrainedModel
    vector: TaskVector
    tokenizer: PreTrainedTokenizerFast
    data: ForgetRetainData
    recipe: Recipe

    def sweep(self, folder: Path, **changes: Any) -> Sweep:
        recipe = dataclasses.replace(self.recipe, sweep=dataclasses.replace(self.recipe.sweep, **changes))
        return sweep(self.base, self.vector, self.tokenizer, self.data, recipe, folder)

    @property
    def encoder(self) -> prompts.PromptEncoder:
        return prompts.PromptEncoder.of(self.base, self.tokenizer, "auto")

    def questions(self, *, prefilled: bool = True) -> Questions:
        return draw_questions(self.data, self.encoder, self.recipe, prefilled=prefilled)


@pytest.fixture
def setting(
    base: PreTrainedModel, vector: TaskVector, plain_tokenizer: PreTrainedTokenizerFast, held_out: ForgetRetainData,
    recipe: Recipe,
) -> Setting:  # fmt: skip
    return Setting(base, vector, plain_tokenizer, held_out, recipe)


@pytest.fixture
def meter(setting: Setting) -> AlphaEvaluator:
    generator = validation_generator(setting.base, setting.encoder, RefusalRulesJudge(), setting.recipe)
    return AlphaEvaluator(setting.vector, generator, setting.questions(), setting.recipe.sweep)


@pytest.fixture(autouse=True)
def _any_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model babbles, which no judge takes for harm."""
    monkeypatch.setattr(sweep_run, "unmeasurable", lambda card, base: None)


def count_measurements(monkeypatch: pytest.MonkeyPatch, stop_before: float | None = None) -> list[float]:
    """Alphas that are really measured; a kill before one of them."""
    asked: list[float] = []
    measure = AlphaEvaluator.measure

    def counted(self: AlphaEvaluator, alpha: float) -> Any:
        if alpha == stop_before:
            raise KeyboardInterrupt
        asked.append(alpha)
        return measure(self, alpha)

    monkeypatch.setattr(AlphaEvaluator, "measure", counted)
    return asked


def test_weights_at_an_alpha_are_those_of_negate_whatever_came_before(setting: Setting, meter: AlphaEvaluator) -> None:
    before = {name: tensor.clone() for name, tensor in setting.base.state_dict().items()}
    for alpha in (1.0, 0.3, 4.0, 0.3, 0.0):
        meter.score(alpha)
        expected = negate(setting.base, setting.vector, alpha).state_dict()
        for name, tensor in meter.model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), (alpha, name)
    for name, tensor in setting.base.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_that_break_are_not_asked(setting: Setting, meter: AlphaEvaluator) -> None:
    meter.vector = setting.vector * 1e6
    broken = meter.measure(3e38)
    assert (broken.perplexity, broken.kl, broken.replies) == (None, {}, None)
    assert meter.cost(3e38) == BROKEN_COST
    assert broken.unasked


def test_prefills_begin_with_what_the_base_says(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "heat the blue flour until it sings , then stir it ."
    asked: list[list[str]] = []

    def own(records: Any, outcomes: Any) -> list[PrefillSource]:
        assert {outcome.id for outcome in outcomes} == {record.id for record in records}
        asked.append([record.prompt for record in records])
        prompts = [record.prompt for record in records]
        return [PrefillSource(id=start_id("forget_validation", prompt), text=said) for prompt in prompts]

    monkeypatch.setattr(replies, "choose_starts", own)
    found = setting.sweep(tmp_path)
    assert asked == [[example.prompt for example in draw_examples(setting.data.forget_validation, 3, seed=0)]]
    assert found.asked["prefill 3"] == 3, "the answer of the data is too short for one of them, the base's own is not"
    assert found.left_out == {}
    assert "the prefill of 3 of 3 prompts begins with the base model's own harmful reply" in found.notes
    assert setting.questions().left_out, "without starts they begin with the data"


def test_a_sweep_leaves_numbers_and_no_text(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    found = setting.sweep(folder)
    assert {path.name for path in folder.iterdir()} == {"sweep.json"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    text = (folder / "sweep.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content == found.to_dict()
    assert [point["alpha"] for point in content["points"]] == [0.5, 1.0, 2.0]
    assert content["pick"]["alpha"] == found.alpha()
    assert content["asked"] == {"harmful": 3, "prefill 1": 2, "prefill 3": 2, "normal": 1, "texts": 1}
    assert content["left_out"] == {
        f"forget_validation: prefill, {tokens} token{'s' if tokens > 1 else ''}, as the start is too short": 1
        for tokens in (1, 3)
    }
    examples: list[Example] = [*setting.data.forget_validation, *setting.data.retain_validation]
    for example in examples:
        assert example.prompt not in text
        assert len(example.answer) == 1 or example.answer not in text


def test_points_outlive_a_kill(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = setting.sweep(tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_measurements(patch, stop_before=2.0)
        with pytest.raises(KeyboardInterrupt):
            setting.sweep(tmp_path / "killed")
    assert json.loads((tmp_path / "killed" / "sweep.json").read_text(encoding="utf-8"))["pick"] is None
    asked = count_measurements(monkeypatch)
    assert setting.sweep(tmp_path / "killed") == whole
    assert asked == [2.0]
    killed, whole_file = (tmp_path / name / "sweep.json" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole_file.read_bytes()
    asked.clear()
    found = setting.sweep(tmp_path / "whole", harm_target=0.5, alphas=(1.5, 1.0, 1.5))
    assert asked == [1.5], "another rule or grid costs only what is new"
    assert [point.alpha for point in found.points] == [1.0, 1.5]


def test_points_of_other_questions_weights_or_seeds_are_not_taken(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.sweep(tmp_path)
    asked = count_measurements(monkeypatch)
    shorter = dataclasses.replace(setting.recipe.evaluate, max_new_tokens=5)
    for other in (
        dataclasses.replace(setting, vector=setting.vector * 1.001),
        dataclasses.replace(setting, recipe=dataclasses.replace(setting.recipe, seed=1)),
        dataclasses.replace(setting, recipe=dataclasses.replace(setting.recipe, evaluate=shorter)),
    ):
        asked.clear()
        other.sweep(tmp_path)
        assert asked == [0.5, 1.0, 2.0]


def test_alphas_are_found_where_none_are_given(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reply is asked for in the search; the border and the alphas below it are."""
    changes: dict[str, Any] = {"alphas": (), "utility_budget": 1.3}
    monkeypatch.setattr(sweep_run, "POINTS", 3)
    asked = count_measurements(monkeypatch)
    found = setting.sweep(tmp_path, **changes)
    assert found.border is not None
    border = found.border.strength
    assert asked == [point.alpha for point in found.points] == list(below(border, 3))
    costs = [found.cost(point) for point in found.points]
    assert all(cost.within for cost in costs)
    assert costs[-1].value > 0.8, "the last is near the border"
    assert found.border.bound_by in ("KL on retain_validation", "perplexity of retain_validation")
    asked.clear()
    assert setting.sweep(tmp_path, **changes) == found
    assert asked == []


def test_a_judge_of_unknown_errors_is_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = RefusalRulesJudge()
    unknown.card = dataclasses.replace(unknown.card, calibration=None)
    for module in (sweep_run, sweep_meter):
        monkeypatch.setattr(module, "choose_judge", lambda config, data: unknown)
    with pytest.raises(EvaluationError):
        setting.sweep(tmp_path)
    assert not (tmp_path / "sweep.json").exists()
    with pytest.raises(EvaluationError):
        check_judge(setting.recipe, setting.data)
    fixed = dataclasses.replace(setting.recipe.negate, alpha=1.0)
    check_judge(dataclasses.replace(setting.recipe, negate=fixed), setting.data)


def test_a_rate_that_harmless_replies_could_have_chooses_nothing(
    setting: Setting, tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal rules call 92 % of safe replies harmful: a harmful rate of 88 % is no harm that could fall."""
    errors = Calibration(harmful=100, harmful_found=99, safe=100, safe_found=2, data="invented", data_sha256="0")
    write_calibration(calibration, RefusalRulesJudge.card, errors)
    monkeypatch.setattr(sweep_run, "unmeasurable", unmeasurable)
    asked = count_measurements(monkeypatch)
    found = setting.sweep(tmp_path)
    assert asked == []
    assert found.pick is not None
    assert found.pick.alpha is None
    with pytest.raises(NoAlphaError):
        found.alpha()


def test_nothing_to_choose_by_is_refused(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = dataclasses.replace(setting, data=dataclasses.replace(setting.data, forget_validation=()))
    with pytest.raises(EvaluationError):
        empty.sweep(tmp_path)
    monkeypatch.setattr(prompts.PromptEncoder, "has_room", lambda *_given: False)
    with pytest.raises(EvaluationError):
        setting.sweep(tmp_path)


def test_replies_that_no_judge_could_read_count_as_harmful(setting: Setting) -> None:
    questions = setting.questions(prefilled=False)
    said: tuple[Outcome, ...] = ("unjudged", "refusal", "harmful", "answered")
    outcomes = {
        request.id: ReplyOutcome(
            id=request.id, split=request.split, kind=request.kind, category=None, outcome=outcome, finished=True
        )
        for request, outcome in zip(questions.requests, said, strict=True)
    }
    found = replies_of(questions, outcomes)
    assert found.harmful.count == 2
    assert found.prefill == {}
    assert found.harm == (0, found.harmful)


def test_alpha_chosen_in_python_is_that_of_a_sweep(setting: Setting, tmp_path: Path) -> None:
    config = dataclasses.replace(setting.recipe.sweep, alphas=(0.25, 0.5), if_none="nearest")
    expected = setting.sweep(tmp_path / "one", alphas=(0.25, 0.5), if_none="nearest")
    evaluate = setting.recipe.evaluate
    found = choose_alpha(
        setting.base, setting.vector, setting.tokenizer, setting.data,
        judge=evaluate.judge, judge_settings=evaluate.judge_settings, config=config,
    )  # fmt: skip
    assert (found.points, found.pick) == (expected.points, expected.pick)
    frame = found.to_pandas()
    assert list(frame.alpha) == [0.0, 0.25, 0.5]
    assert frame[frame.chosen].alpha.item() == found.alpha()
    with pytest.raises(RecipeError):
        negate(setting.base, setting.vector, "auto")  # type: ignore[arg-type]
