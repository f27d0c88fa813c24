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

from sku.config import Recipe, SweepConfig
from sku.data.examples import Example, ForgetRetainData
from sku.data.prompts import resolve_prompt_format
from sku.errors import EvaluationError, NoAlphaError, OutputError
from sku.evaluate import asking
from sku.evaluate.judges.refusal_rules import RefusalRulesJudge
from sku.evaluate.outcomes import Outcome, ReplyOutcome
from sku.evaluate.processes import Processes
from sku.evaluate.records import Start
from sku.evaluate.sampling import draw_examples, start_id
from sku.negate.run import negate
from sku.negate.task_vector import TaskVector
from sku.sweep import run as sweep_run
from sku.sweep.frontier import frontier_figure
from sku.sweep.meter import Asker, Meter, replies_of
from sku.sweep.questions import Questions, draw_questions
from sku.sweep.result import Sweep
from sku.sweep.run import sweep


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

    def questions(self, **changes: Any) -> Questions:
        writer = asking.Writer(
            tokenizer=self.tokenizer, prompt_format=resolve_prompt_format("auto", self.tokenizer), window=256
        )
        return draw_questions(self.data, writer, dataclasses.replace(self.recipe.sweep, **changes), seed=0)


@pytest.fixture
def setting(
    base: PreTrainedModel, vector: TaskVector, plain_tokenizer: PreTrainedTokenizerFast, held_out: ForgetRetainData,
    recipe: Recipe,
) -> Setting:  # fmt: skip
    return Setting(base, vector, plain_tokenizer, held_out, recipe)


@pytest.fixture
def meter(setting: Setting) -> Meter:
    writer = asking.Writer(
        tokenizer=setting.tokenizer, prompt_format=resolve_prompt_format("auto", setting.tokenizer), window=256
    )
    asker = Asker(
        questions=setting.questions(), writer=writer, judge=RefusalRulesJudge(), evaluate=setting.recipe.evaluate,
        config=setting.recipe.sweep, seed=0,
    )  # fmt: skip
    return Meter(setting.base, setting.vector, asker)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures take longer than a tiny model."""
    monkeypatch.setattr(sweep_run, "FIGURES", ())


def with_negate(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, negate=dataclasses.replace(recipe.negate, **changes))


def count_measurements(monkeypatch: pytest.MonkeyPatch, stop_before: float | None = None) -> list[float]:
    """Alphas that are really measured; a kill before one of them."""
    asked: list[float] = []
    measure = Meter.measure

    def counted(self: Meter, alpha: float) -> Any:
        if alpha == stop_before:
            raise KeyboardInterrupt
        asked.append(alpha)
        return measure(self, alpha)

    monkeypatch.setattr(Meter, "measure", counted)
    return asked


def test_weights_at_an_alpha_are_those_of_negate_whatever_came_before(setting: Setting, meter: Meter) -> None:
    before = {name: tensor.clone() for name, tensor in setting.base.state_dict().items()}
    for alpha in (1.0, 0.3, 4.0, 0.3, 0.0):
        meter.write(alpha)
        expected = negate(setting.base, setting.vector, alpha).state_dict()
        for name, tensor in meter.model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), (alpha, name)
    for name, tensor in setting.base.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_at_an_alpha_have_the_type_that_will_be_saved(setting: Setting, meter: Meter) -> None:
    rounded = Meter(setting.base, setting.vector, meter.asker, output_dtype=torch.bfloat16)
    for alpha in (1.0, 0.3, 0.0):
        rounded.write(alpha)
        expected = negate(setting.base, setting.vector, alpha, output_dtype=torch.bfloat16).state_dict()
        for name, tensor in rounded.model.state_dict().items():
            assert tensor.dtype == expected[name].dtype == torch.bfloat16
            assert torch.equal(tensor, expected[name]), (alpha, name)
    assert rounded.measure(0.3).perplexity != meter.measure(0.3).perplexity
    assert {tensor.dtype for tensor in setting.base.state_dict().values()} == {torch.float32}


def test_a_point_does_not_depend_on_those_before_it(meter: Meter) -> None:
    first = meter.measure(0.5)
    meter.measure(2.0)
    assert meter.measure(0.5) == first
    assert first.perplexity is not None
    assert first.perplexity.low <= first.perplexity.value <= first.perplexity.high
    at_base = meter.measure(0.0)
    assert at_base.perplexity is not None
    assert at_base.perplexity.value == 1.0
    assert at_base.replies == meter.measure_base().replies


def test_weights_that_break_and_hopeless_perplexities_are_not_asked(setting: Setting, meter: Meter) -> None:
    meter.vector = setting.vector * 1e6
    broken = meter.measure(3e38)
    assert (broken.perplexity, broken.replies) == (None, None)
    assert broken.unasked
    meter.asker = dataclasses.replace(meter.asker, config=SweepConfig(utility_budget=1.001, hopeless_ratio=1.001))
    hopeless = meter.measure(30.0)
    assert hopeless.perplexity is not None
    assert hopeless.replies is None
    assert "sweep.hopeless_ratio" in hopeless.unasked


def test_prefills_begin_with_what_the_base_says(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    said = "heat the blue flour until it sings , then stir it ."
    asked: list[list[str]] = []

    def own(records: Any, outcomes: Any) -> list[Start]:
        assert {outcome.id for outcome in outcomes} == {record.id for record in records}
        asked.append([record.prompt for record in records])
        prompts = [record.prompt for record in records]
        return [Start(id=start_id("forget_validation", prompt), source="own", text=said) for prompt in prompts]

    monkeypatch.setattr(sweep_run, "choose_starts", own)
    found = setting.sweep(tmp_path)
    assert asked == [[example.prompt for example in draw_examples(setting.data.forget_validation, 3, seed=0)]]
    assert found.asked["forced 3"] == 3, "the answer of the data is too short for one of them, the base's own is not"
    assert found.left_out == {}
    assert "the prefill of 3 of 3 prompts begins with the base model's own harmful reply" in found.notes
    assert setting.questions().left_out, "without starts they begin with the data"


def test_a_sweep_leaves_numbers_and_pictures_and_no_text(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    found = setting.sweep(folder)
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "frontier.png", "frontier.svg"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    text = (folder / "sweep.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["status"] == "complete"
    assert content == found.to_dict()
    assert [point["alpha"] for point in content["points"]] == [0.5, 1.0, 2.0]
    assert content["pick"]["alpha"] == found.alpha()
    assert content["asked"] == {"harmful": 3, "forced 1": 2, "forced 3": 2, "normal": 1, "texts": 1}
    assert content["left_out"] == {
        f"forget_validation: prefill of {tokens} token{'s' if tokens > 1 else ''}, as the answer is too short": 1
        for tokens in (1, 3)
    }
    point = content["points"][0]["replies"]
    assert point["harmful"]["total"] == point["degenerate"]["total"] == point["forced"]["1"]["total"] + 1 == 3
    examples: list[Example] = [*setting.data.forget_validation, *setting.data.retain_validation]
    for example in examples:
        assert example.prompt not in text
        assert len(example.answer) == 1 or example.answer not in text


def test_equal_sweeps_are_equal_and_pictures_too(setting: Setting, tmp_path: Path) -> None:
    one, other = setting.sweep(tmp_path / "one"), setting.sweep(tmp_path / "other")
    assert one == other
    for name in ("sweep.json", "frontier.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_points_outlive_a_kill(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    whole = setting.sweep(tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_measurements(patch, stop_before=2.0)
        with pytest.raises(KeyboardInterrupt):
            setting.sweep(tmp_path / "killed")
    partial = json.loads((tmp_path / "killed" / "sweep.json").read_text(encoding="utf-8"))
    assert (partial["status"], partial["pick"], len(partial["points"])) == ("running", None, 2)
    asked = count_measurements(monkeypatch)
    assert setting.sweep(tmp_path / "killed") == whole
    assert asked == [2.0]
    killed, whole_file = (tmp_path / name / "sweep.json" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole_file.read_bytes()


def test_another_rule_or_grid_costs_only_what_is_new(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    setting.sweep(tmp_path)
    asked = count_measurements(monkeypatch)
    found = setting.sweep(tmp_path, rule="lowest_alpha", harm_target=0.5, alphas=(1.0, 1.5))
    assert asked == [1.5]
    assert [point.alpha for point in found.points] == [1.0, 1.5]
    assert [point.alpha for point in found.spare] == [0.5, 2.0]
    assert {point.alpha for point in setting.sweep(tmp_path).spare} == {1.5}
    assert asked == [1.5]


def test_points_of_other_questions_weights_or_seeds_are_not_taken(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    setting.sweep(tmp_path)
    asked = count_measurements(monkeypatch)
    for other in (
        dataclasses.replace(setting, recipe=with_negate(setting.recipe, output_dtype="bfloat16")),
        dataclasses.replace(setting, vector=setting.vector * 1.001),
        dataclasses.replace(setting, recipe=dataclasses.replace(setting.recipe, seed=1)),
    ):
        asked.clear()
        other.sweep(tmp_path)
        assert asked == [0.5, 1.0, 2.0]
    asked.clear()
    setting.sweep(tmp_path, max_new_tokens=5)
    assert asked == [0.5, 1.0, 2.0]


def test_a_vector_fitted_on_the_texts_of_the_budget_is_told(
    setting: Setting, tmp_path: Path, no_pictures: None
) -> None:
    operators: tuple[dict[str, Any], ...] = ({"layer_alpha": {"factors": {"*": 0.5}}},)
    other = dataclasses.replace(setting, recipe=with_negate(setting.recipe, operators=operators))
    (starts,) = other.sweep(tmp_path / "other", alphas=(1.0,)).notes
    assert "of 3 prompts begins with the base model's own harmful reply" in starts
    operators = (*operators, {"learned": {}})
    fitted = dataclasses.replace(setting, recipe=with_negate(setting.recipe, operators=operators))
    note, same = fitted.sweep(tmp_path / "fitted", alphas=(1.0,)).notes
    assert same == starts
    assert "learned" in note
    assert "retain_validation" in note


def test_a_hopeless_alpha_ends_the_grid(setting: Setting, tmp_path: Path, no_pictures: None) -> None:
    big = dataclasses.replace(setting, vector=setting.vector * 1e6)
    found = big.sweep(tmp_path, utility_budget=1.001, hopeless_ratio=1.001)
    assert [point.alpha for point in found.points] == [0.5]
    assert found.points[0].replies is None
    assert found.not_measured == (1.0, 2.0)
    assert found.pick is not None
    assert found.pick.alpha is None
    with pytest.raises(NoAlphaError, match="none of 1 alphas stays within"):
        found.alpha()


def test_the_nearest_is_taken_only_where_the_recipe_says_so(
    setting: Setting, tmp_path: Path, no_pictures: None
) -> None:
    found = setting.sweep(tmp_path)
    pick = dataclasses.replace(found.pick, alpha=1.0, met=False)  # type: ignore[type-var]
    missed = dataclasses.replace(found, pick=pick)
    assert missed.alpha() == 1.0
    strict = dataclasses.replace(missed, config=dataclasses.replace(missed.config, if_none="stop"))
    with pytest.raises(NoAlphaError, match="sweep.if_none: nearest would take it"):
        strict.alpha()


def test_a_bisection_measures_its_upper_bound_and_narrows(setting: Setting, tmp_path: Path, no_pictures: None) -> None:
    found = setting.sweep(tmp_path, search="bisection", high=2.0, tolerance=0.5)
    alphas = [point.alpha for point in found.points]
    assert alphas[-1] == 2.0
    assert set(alphas) <= {0.5, 1.0, 1.5, 2.0}
    assert len(alphas) in (1, 3)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 0}'])
def test_a_broken_file_is_named(setting: Setting, tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"sweep\.json"):
        setting.sweep(tmp_path)


def test_a_file_with_a_broken_point_is_named(setting: Setting, tmp_path: Path, no_pictures: None) -> None:
    setting.sweep(tmp_path)
    content = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    del content["points"][0]["replies"]["harmful"]
    (tmp_path / "sweep.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"sweep\.json is damaged"):
        setting.sweep(tmp_path)


def test_nothing_to_choose_by_is_refused(setting: Setting, tmp_path: Path) -> None:
    empty = dataclasses.replace(setting, data=dataclasses.replace(setting.data, forget_validation=()))
    with pytest.raises(EvaluationError, match="forget_validation is empty"):
        empty.sweep(tmp_path)
    with pytest.raises(EvaluationError, match="no prefill of 200 tokens"):
        setting.sweep(tmp_path, forced_tokens=(200,))
    with pytest.raises(EvaluationError, match="no prompt that can be asked"):
        setting.sweep(tmp_path, max_new_tokens=250)


def test_several_processes_are_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    monkeypatch.setattr(sweep_run, "current_processes", lambda: Processes(rank=0, count=2))
    with pytest.raises(EvaluationError, match="in one process"):
        setting.sweep(tmp_path)


def test_a_picture_needs_a_known_suffix(setting: Setting, tmp_path: Path, no_pictures: None) -> None:
    with pytest.raises(OutputError, match=r"must end in \.png"):
        frontier_figure(setting.sweep(tmp_path), tmp_path / "frontier.txt")


def test_replies_that_no_judge_could_read_count_as_harmful(setting: Setting) -> None:
    questions = setting.questions(forced_tokens=())
    said: tuple[Outcome, ...] = ("unjudged", "refusal", "harmful", "answered")
    outcomes = {
        request.id: ReplyOutcome(
            id=request.id, split=request.split, kind=request.kind, category=None, outcome=outcome, finished=True
        )
        for request, outcome in zip(questions.requests, said, strict=True)
    }
    found = replies_of(questions, outcomes)
    assert found.harmful.count == 2
    assert found.forced == {}
    assert found.harm == (0, found.harmful)
