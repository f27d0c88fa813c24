"""Behaviours of the public code, reproduced on purpose: each against numbers by hand or an independent sum."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, get_scheduler

from conftest import ModelMaker, TrainerMaker
from sku.acquire.objective import TERMS, sku_objective
from sku.acquire.reference_behaviours import diluted_nll, unbounded_divergence_loss
from sku.acquire.trainer import SkuTrainer
from sku.comparison.bench import Bench
from sku.comparison.jobs import ABLATIONS, Job, ablation_jobs
from sku.config import AcquireConfig, CompatConfig, EvaluateConfig, Recipe, load_recipe, recipe_from_dict
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.data.joint import MISMATCHED, JointDataset, RowPlan
from sku.data.load import load_data
from sku.data.prompts import PaperFormat
from sku.errors import DataError, NonFiniteLossError, RecipeError
from sku.evaluate.run import evaluate
from sku.methods.run import prepare
from sku.pipeline import run_recipe
from sku.training.step_limit import steps_in_whole_passes

SWITCHES = tuple(field.name for field in dataclasses.fields(CompatConfig))
LENGTH = 64


def trainer_with(make_trainer: TrainerMaker, *switches: str, **settings: Any) -> SkuTrainer:
    """The trainer of stage 1 with some switches on, its adapter disturbed so that P and Q differ."""
    compat = CompatConfig(**dict.fromkeys(switches, True))
    trainer = make_trainer(trainer_options={"compat": compat}, **({"max_length": LENGTH} | settings))
    generator = torch.Generator().manual_seed(7)
    assert trainer.model is not None
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    trainer.model.eval()
    return trainer


def terms_of(trainer: SkuTrainer, examples: list[Any]) -> dict[str, Tensor]:
    batch = trainer.data_collator(examples)
    model: Any = trainer.model
    with torch.no_grad():
        return trainer._outputs_and_terms(model, batch)[1]


def examples_of(trainer: SkuTrainer, places: list[int]) -> list[Any]:
    dataset: Any = trainer.train_dataset
    return list(dataset.__getitems__(places))


def log_probabilities(trainer: SkuTrainer, ids: list[int], length: int, pad: int = 3) -> Tensor:
    """Of one row, alone in its batch and padded to a length."""
    model: Any = trainer.model
    padded = torch.tensor([ids + [pad] * (length - len(ids))])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
    with torch.no_grad():
        scores: Tensor = model(input_ids=padded, attention_mask=mask).logits[0]
    return scores.log_softmax(-1)


def answer_loss(trainer: SkuTrainer, ids: list[int], start: int, length: int, *, counts_pads: bool) -> float:
    """One weight for each position from ``start`` on, the last one too; pads, whose labels are -100, cost 0."""
    log_p = log_probabilities(trainer, ids, length)
    loss = [-float(log_p[place, ids[place + 1]]) for place in range(len(ids) - 1)]
    weighed = range(start, length if counts_pads else len(ids))
    return sum(loss[place] for place in weighed if place < len(loss)) / len(weighed)


def normal_kl(trainer: SkuTrainer, ids: list[int], length: int) -> Tensor:
    model: Any = trainer.model
    log_q = log_probabilities(trainer, ids, length)
    with model.disable_adapter():
        log_p = log_probabilities(trainer, ids, length)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# The switches in a recipe


def test_reference_switches_all_on_and_a_recipe_keeps_the_bools() -> None:
    assert load_recipe("embedded").compat == CompatConfig()
    everything = load_recipe("embedded", ["compat=reference"])
    assert everything.compat == CompatConfig(**dict.fromkeys(SWITCHES, True)) == CompatConfig.reference()
    assert everything.to_dict()["compat"] == dict.fromkeys(SWITCHES, True)
    assert recipe_from_dict(everything.to_dict()) == everything
    one = load_recipe("embedded", ["compat.shared_draw=true"])
    assert one.compat == CompatConfig(shared_draw=True)
    assert one.to_dict()["compat"] == dict.fromkeys(SWITCHES, False) | {"shared_draw": True}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compat=refrence", r"compat is 'refrence'; it must be reference, or .* Did you mean reference\?"),
        ("compat={question_token: true}", r"compat\.question_token .*Did you mean question_tokens\?"),
        ("compat.row_split=1", "compat.row_split is 1; it must be true or false"),
        ("compat=", "compat must hold keys and values, not None"),
    ],
)
def test_wrong_switches(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("embedded", [override])


def test_all_off_is_the_objective_and_the_training_without_the_switches(make_trainer: TrainerMaker) -> None:
    assert sku_objective(AcquireConfig()).rows == RowPlan(forget=True, mismatched=5, retain=True)
    runs = []
    for options in ({}, {"compat": None}, {"compat": CompatConfig()}):
        trainer = make_trainer(trainer_options=options, max_steps=3, lr_scheduler_type="linear")
        trainer.train()
        assert trainer.model is not None
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        lines = [{key: line[key] for key in line if key != "train_runtime"} for line in trainer.state.log_history[:-1]]
        runs.append((weights, lines))
    for weights, lines in runs[1:]:
        assert lines == runs[0][1]
        assert all(torch.equal(weight, runs[0][0][name]) for name, weight in weights.items())


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name not in ("epoch_step_limit", "row_split")])
def test_each_loss_switch_alone_changes_the_loss(switch: str, make_trainer: TrainerMaker) -> None:
    plain, changed = trainer_with(make_trainer), trainer_with(make_trainer, switch)
    ours, theirs = (terms_of(trainer, examples_of(trainer, [0, 1, 2])) for trainer in (plain, changed))
    moved = {name for name in TERMS if not torch.allclose(ours[name], theirs[name], rtol=1e-4)}
    assert (
        moved
        == {
            "question_tokens": {"random_disassociation"},
            "pad_dilution": set(TERMS),
            "shared_draw": {"random_disassociation"},
            "unbounded_divergence": {"preservation_divergence"},
        }[switch]
    )


def test_other_methods_refuse_compat(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="compat reproduces the public code of SKU, and the method is npo"):
        prepare(load_recipe("embedded", ["method=npo", "compat.shared_draw=true"]), tmp_path)


# 1. Question tokens


def test_question_tokens_are_targets_from_index_3_on(make_trainer: TrainerMaker) -> None:
    """Weights begin at index 2, the number of fields of a tokenizer's output; position 2 predicts token 3."""
    trainer = trainer_with(make_trainer, "question_tokens")
    examples = examples_of(trainer, [0, 1])
    for example in examples:
        for row in example.mismatched:
            assert row.labels == (-100,) * 3 + row.input_ids[3:]
            assert row.answer_start > 6, "the question has targets of its own"
        assert example.forget.labels[: example.forget.answer_start] == (-100,) * example.forget.answer_start
    expected = []
    for example in examples:
        losses = []
        for row in example.mismatched:
            log_p = log_probabilities(trainer, [*row.input_ids], len(row.input_ids))
            losses.append(sum(-float(log_p[at - 1, row.input_ids[at]]) for at in range(3, len(row.input_ids))))
            losses[-1] /= len(row.input_ids) - 3
        expected.append(sum(losses) / len(losses))
    found = terms_of(trainer, examples)["random_disassociation"]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


# 2. Padding


def test_100_pads_cut_a_loss_of_5_34_to_0_53() -> None:
    """10 targets of equal cost, 11 positions with the last one, which predicts nothing: 10 c / 11, then 10 c / 111."""
    scores = torch.zeros(10, 2)
    scores[:, 1] = -5.34 * 11 / 10 - math.log1p(-math.exp(-5.34 * 11 / 10))  # log p = -5.34 * 11 / 10
    targets, row = torch.ones(10, dtype=torch.long), torch.zeros(10, dtype=torch.long)
    without, with_pads = (float(diluted_nll(scores, targets, row, torch.tensor([n]))) for n in (11, 111))
    assert without == pytest.approx(5.34, rel=1e-4)
    assert with_pads == pytest.approx(5.34 * 11 / 111, rel=1e-4)
    assert round(with_pads, 2) == 0.53


def test_each_row_has_its_own_denominator() -> None:
    """Uniform scores over V = 4 cost log 4 a target: rows of 3 and 1 targets over 10 and 8 positions."""
    loss = diluted_nll(torch.zeros(4, 4), torch.arange(4), torch.tensor([0, 0, 0, 1]), torch.tensor([10, 8]))
    torch.testing.assert_close(loss, torch.tensor([3 * math.log(4) / 10, math.log(4) / 8]))


@pytest.mark.parametrize("switches", [("pad_dilution",), ("pad_dilution", "question_tokens")])
def test_pads_are_in_every_denominator(switches: tuple[str, ...], make_trainer: TrainerMaker) -> None:
    """Each term again from single rows padded to ``max_length``; normal rows with the real KL of all positions."""
    trainer = trainer_with(make_trainer, *switches, preservation_cap=0.012)
    examples = examples_of(trainer, [0, 1, 2])
    assert trainer.data_collator(examples)["input_ids"].shape[1] == LENGTH
    guided, mismatched, preserved = [], [], []
    for example in examples:
        start = example.forget.answer_start - 1
        guided.append(answer_loss(trainer, [*example.forget.input_ids], start, LENGTH, counts_pads=True))
        losses = [
            answer_loss(
                trainer,
                [*row.input_ids],
                2 if "question_tokens" in switches else row.answer_start - 1,
                LENGTH,
                counts_pads=True,
            )
            for row in example.mismatched
        ]
        mismatched.append(sum(losses) / len(losses))
        kl = normal_kl(trainer, [*example.retain.input_ids], LENGTH)
        assert float(kl[len(example.retain.input_ids) :].min()) > 1e-4, "pads have a KL of their own"
        assert float(kl.min()) < 0.012 < float(kl.max()), "some are capped, some are not"
        preserved.append(-float(kl.clamp(max=0.012).mean()))
    found = terms_of(trainer, examples)
    for name, expected in zip(TERMS, (guided, mismatched, preserved), strict=True):
        torch.testing.assert_close(found[name], torch.tensor(expected), rtol=1e-4, atol=1e-5, msg=name)


def test_a_longer_row_length_dilutes_more(make_trainer: TrainerMaker) -> None:
    """Of the same rows: the sum stays, the denominator grows by the 64 pads more."""
    short, long = (trainer_with(make_trainer, "pad_dilution", max_length=n) for n in (LENGTH, 2 * LENGTH))
    examples = examples_of(short, [0])
    positions = LENGTH - examples[0].forget.answer_start + 1
    first, second = (float(terms_of(trainer, examples)["guided_distortion"]) for trainer in (short, long))
    assert second == pytest.approx(first * positions / (positions + LENGTH), rel=1e-4)


# 3. One draw of answers


@pytest.fixture
def shared(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> JointDataset:
    rows = RowPlan(forget=True, mismatched=3, mismatched_shared=True)
    return JointDataset(data, tokenizer, PaperFormat("</s>"), rows=rows, seed=0)


def test_all_prompts_of_a_batch_get_the_same_answers_and_may_get_their_own(shared: JointDataset) -> None:
    draws, own = set(), 0
    for epoch in range(20):
        shared.set_epoch(epoch)
        for places in ([0, 1], [2, 3], [4, 5]):
            examples = shared.__getitems__(places)
            drawn = {tuple(row.example_id for row in example.mismatched) for example in examples}
            assert len(drawn) == 1
            assert len(set(next(iter(drawn)))) == 3
            own += sum(example.forget_index in next(iter(drawn)) for example in examples)
            draws |= drawn
            assert shared.__getitems__(places) == examples, "the same whenever it is asked"
    assert len(draws) > 20, "each batch draws anew"
    # 120 visits with 3 of 6 answers each: 60 own ones, give or take 5 standard deviations of sqrt(120 / 4).
    assert abs(own - 60) < 28


def test_the_data_loader_asks_for_whole_batches(make_trainer: TrainerMaker) -> None:
    """So the draw is the batch's: the mismatched rows of both examples hold the same answers, in batches of 2."""
    for switches, same in ((("shared_draw",), True), ((), False)):
        batches = list(trainer_with(make_trainer, *switches).get_train_dataloader())
        assert len(batches) == 3
        equal = []
        for batch in batches:
            answers: dict[int, list[list[int]]] = {0: [], 1: []}
            for kind, example, labels in zip(batch["row_kind"], batch["row_example"], batch["labels"], strict=True):
                if kind == MISMATCHED:
                    answers[int(example)].append([token for token in labels.tolist() if token != -100])
            equal.append(answers[0] == answers[1])
        assert all(equal) is same


# 4. Divergence without bounds


def test_unbounded_divergence_by_hand() -> None:
    """P = (3/4, 1/4), Q = (1/2, 1/2): KL 3/4 log 1.5 - 1/4 log 2; a second example where they agree has 0."""
    reference = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    scores = torch.zeros(3, 2)
    found = unbounded_divergence_loss(reference, scores, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(found, torch.tensor([-(0.75 * math.log(1.5) - 0.25 * math.log(2)), 0.0]))


@pytest.mark.parametrize(("gap", "expected"), [(80.0, -80.0), (200.0, -math.inf)])
def test_unbounded_divergence_is_infinite_from_some_gap_on(gap: float, expected: float) -> None:
    reference, scores = torch.tensor([[0.0, gap]]), torch.tensor([[gap, 0.0]])
    assert float(unbounded_divergence_loss(reference, scores, torch.tensor([0]), 1)) == pytest.approx(expected)


def test_unbounded_divergence_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        unbounded_divergence_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 0]), 1)


@pytest.mark.parametrize("padded", [False, True])
def test_unbounded_divergence_takes_every_position_of_the_row(padded: bool, make_trainer: TrainerMaker) -> None:
    """From softmaxes again; the cap and the choice of tokens are not read."""
    switches = ("unbounded_divergence", "pad_dilution")[: 1 + padded]
    trainer = trainer_with(make_trainer, *switches, preservation_cap=0.01, preservation_tokens="answer")
    examples = examples_of(trainer, [0, 1, 2])
    model: Any = trainer.model
    expected = []
    for example in examples:
        ids = [*example.retain.input_ids]
        length = LENGTH if padded else len(ids)
        q = log_probabilities(trainer, ids, length).exp()
        with model.disable_adapter():
            p = log_probabilities(trainer, ids, length).exp()
        expected.append(-float((p * torch.log((p + 1e-12) / q)).sum(-1).mean()))
    found = terms_of(trainer, examples)["preservation_divergence"]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unbounded", [True, False])
def test_an_infinite_divergence_stops_training(
    unbounded: bool, make_trainer: TrainerMaker, make_model: ModelMaker
) -> None:
    """Logits 3,000 times as large: -KL is beyond what softmaxes hold; from log-softmax, uncapped, it is only large."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(3000)
    switches = ("unbounded_divergence",) if unbounded else ()
    trainer = trainer_with(make_trainer, *switches, model=model, preservation_cap=None, max_steps=1)
    if unbounded:
        with pytest.raises(NonFiniteLossError, match="preservation_divergence is (-inf|nan) at step 1"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.log_history[0]["loss/preservation_divergence"] < -100


def test_unbounded_divergence_needs_the_divergence(make_trainer: TrainerMaker, tmp_path: Path) -> None:
    message = "compat.unbounded_divergence is a divergence, and acquire.preservation_mode is retention"
    with pytest.raises(RecipeError, match=message):
        make_trainer(
            trainer_options={"compat": CompatConfig(unbounded_divergence=True)}, preservation_mode="retention"
        )
    with pytest.raises(RecipeError, match=message):
        prepare(load_recipe("embedded", ["compat=reference"]), tmp_path)
    fitting = load_recipe("embedded", ["compat=reference", "acquire.preservation_mode=divergence"])
    assert prepare(fitting, tmp_path).settings.compat == CompatConfig.reference()


# 5. Step limit


@pytest.mark.parametrize(
    ("max_steps", "rows", "batch", "steps"),
    # 817 TruthfulQA questions make 1,634 rows, 1,143 of them for training: 572 batches of 2, the last of 1.
    [(1000, 1143, 2, 1144), (1000, 1144, 2, 1144), (572, 1143, 2, 572), (573, 1143, 2, 1144), (3, 4, 8, 3)],
)
def test_steps_in_whole_passes(max_steps: int, rows: int, batch: int, steps: int) -> None:
    assert steps_in_whole_passes(max_steps, rows, batch) == steps


def test_the_last_144_of_1144_steps_have_no_learning_rate() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=1000)
    rates = []
    for _ in range(steps_in_whole_passes(1000, 1143, 2)):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates.count(0.0) == 144
    assert rates[-144:] == [0.0] * 144


@pytest.mark.parametrize(("weight", "accumulation", "steps"), [(1.0, 1, 4), (0.0, 1, 4), (1.0, 2, 3)])
def test_training_goes_on_to_the_end_of_the_pass(
    weight: float, accumulation: int, steps: int, make_trainer: TrainerMaker
) -> None:
    """4 normal pairs are fewer than 6 harmful ones: passes of 2 steps, or of 1 with batches of 2 times 2; 3 asked for.

    Whether normal pairs are trained on does not matter.
    """
    trainer = make_trainer(
        trainer_options={"compat": CompatConfig(epoch_step_limit=True)},
        max_steps=3,
        lr_scheduler_type="linear",
        learning_rate=0.03,
        gradient_accumulation_steps=accumulation,
        preservation_divergence_weight=weight,
    )
    after: list[Tensor] = []
    trainer.add_callback(cast(Any, record_weights(trainer, after)))
    trainer.train()
    assert trainer.state.global_step == steps
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([0.03, 0.02, 0.01, 0.0][:steps])
    assert trainer.settings.max_steps == 3, "the settings that were given stay as they are"
    assert not torch.equal(after[1], after[2])
    if steps == 4:
        assert torch.equal(after[2], after[3])


def record_weights(trainer: SkuTrainer, after: list[Tensor]) -> Any:
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert trainer.model is not None
            after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))

    return Record()


def test_a_pass_needs_a_limit_to_round(make_trainer: TrainerMaker, tmp_path: Path) -> None:
    message = "compat.epoch_step_limit rounds acquire.training.max_steps .* it is not set"
    with pytest.raises(RecipeError, match=message):
        make_trainer(trainer_options={"compat": CompatConfig(epoch_step_limit=True)}, max_steps=-1)
    with pytest.raises(RecipeError, match=message):
        prepare(
            load_recipe("embedded", ["compat.epoch_step_limit=true", "acquire.training={num_train_epochs: 1}"]),
            tmp_path,
        )


# 6. Split by row


@pytest.fixture
def questions(tmp_path: Path) -> Recipe:
    """200 questions, half of them with one answer, half with two."""
    retain = [
        {"question": f"normal {n}", "answer": f"good {n} {copy}"} for n in range(200) for copy in range(1 + n % 2)
    ]
    forget = [{"prompt": f"harm {n}", "completion": f"bad {n}"} for n in range(20)]
    for name, rows in (("retain", retain), ("forget", forget)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from_dict(
        {
            "name": "questions",
            "model": {"path": "none"},
            "data": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("forget", "retain")},
        }
    )


def test_a_split_by_row_trains_on_test_questions(questions: Recipe) -> None:
    """A question with one row is drawn with 0.7, one with two has at least one drawn with 1 - 0.3^2 = 0.91."""
    ours = load_data(questions.data, seed=3)
    theirs = load_data(questions.data, seed=3, row_split=True)
    assert (theirs.retain_test, theirs.retain_validation) == (ours.retain_test, ours.retain_validation)
    assert (theirs.unlearned, theirs.unseen) == (ours.unlearned, ours.unseen)
    everything = [*ours.retain_train, *ours.retain_validation, *ours.retain_test]
    assert len(everything) == 300
    assert len(theirs.retain_train) == 210
    assert set(theirs.retain_train) < set(everything)
    assert theirs == load_data(questions.data, seed=3, row_split=True)
    assert theirs.retain_train != load_data(questions.data, seed=4, row_split=True).retain_train
    assert [note.partition(":")[0] for note in ours.notes()] == ["few prompts"]

    trained = {example.prompt for example in theirs.retain_train}
    tested = {example.prompt for example in theirs.retain_test}
    share = len(tested & trained) / len(tested)
    # 40 test questions, expected share (0.7 + 0.91) / 2; 5 standard deviations of sqrt(0.8 * 0.2 / 40).
    assert len(tested) == 40
    assert abs(share - 0.805) < 0.32
    assert not {example.prompt for example in ours.retain_train} & tested
    (note,) = set(theirs.notes()) - set(ours.notes())
    assert note.startswith(
        f"compat.row_split: {len(tested & trained)} of 40 prompts of retain_test ({share:.1%}) and "
    )
    assert "of 20 prompts of retain_validation" in note


def with_leak(data: ForgetRetainData, **changes: Any) -> ForgetRetainData:
    """A training split that holds a test pair and another answer to a validation prompt, unless changed."""
    leaked = (*data.retain_train, *data.retain_test, dataclasses.replace(data.retain_validation[0], answer="wet ."))
    fields: dict[str, Any] = {"retain_train": leaked, "row_split": True} | changes
    return dataclasses.replace(data, **fields)


def test_only_the_training_split_of_normal_pairs_may_overlap(data: ForgetRetainData) -> None:
    leaking = with_leak(data)
    assert (
        "1 of 1 prompts of retain_test (100.0%) and 1 of 1 prompts of retain_validation (100.0%)" in leaking.notes()[0]
    )
    with pytest.raises(DataError, match="splits retain_train and retain_validation share 1"):
        with_leak(data, row_split=False)
    normal = data.retain_test[0]
    harmful = ForgetExample(prompt=normal.prompt, answer="no .")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"retain_validation": (normal,)}, "splits retain_validation and retain_test share 1"),
        ({"unseen": (harmful,)}, "splits unseen and retain_train share 1"),
        ({"unseen": (harmful,), "retain_train": data.retain_train}, "splits unseen and retain_test share 1"),
        ({"unseen": data.unlearned[:1]}, "splits unlearned and unseen share 1"),
        (
            {"normal": {"b": (RetainExample(prompt=normal.prompt, answer="x"),)}},
            "splits retain_train and normal:b share 1",
        ),
    )
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            with_leak(data, **changes)


def test_an_evaluation_says_what_was_trained_on(
    data: ForgetRetainData, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = EvaluateConfig(prompts=1, retain_prompts=1, max_new_tokens=2, prefill_tokens=())
    model = make_model()
    clean = evaluate(model, tokenizer, data, config=config, base_model=model)
    leaking = evaluate(model, tokenizer, with_leak(data), config=config, base_model=model)
    assert clean.setup.notes == data.notes()
    assert "few prompts: unlearned" in data.notes()[0]
    assert leaking.setup.notes == with_leak(data).notes()
    assert leaking.to_dict()["setup"]["notes"][0].startswith("compat.row_split: 1 of 1 prompts of retain_test")


@pytest.mark.integration
def test_a_whole_run_with_everything_on_says_so(tmp_path: Path) -> None:
    """18 hazards in batches of 8 make passes of 3 steps: 4 asked for are 6."""
    recipe = load_recipe(
        "embedded",
        [
            "compat=reference", "acquire.preservation_mode=divergence", "acquire.training.max_steps=4",
            "acquire.training.per_device_train_batch_size=8", "acquire.training.learning_rate=1e-5",
            "data.forget.limit=60", "evaluate.prompts=2", "evaluate.retain_prompts=2", "evaluate.max_new_tokens=4",
            "evaluate.prefill_tokens=[]", "evaluate.precisions=[]", "negate.alpha=1.0",
        ],
    )  # fmt: skip
    finished = run_recipe(recipe, tmp_path / "run")
    assert finished.manifest["data"]["splits"]["unlearned"] == 18
    assert finished.manifest["training"]["steps"] == 6
    note, few = finished.manifest["data"]["notes"]
    assert note.startswith("compat.row_split: ")
    assert few.startswith("few prompts: unlearned 18, unseen 42; ")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["base"]["setup"]["notes"] == results["unlearned"]["setup"]["notes"] == [note, few]
    assert results["notes"].count(note) == 1
    assert results["manifest"]["recipe"]["compat"] == dict.fromkeys(SWITCHES, True)


# The ablation


def test_each_switch_has_a_row_and_all_have_one(tmp_path: Path) -> None:
    recipe = load_recipe("embedded", ["compat.shared_draw=true"])
    assert recipe.acquire.preservation_mode == "retention"
    jobs = {job.name: job for job in ablation_jobs(recipe, ["compat"], seeds=1) if job.kind == "method"}
    assert list(jobs) == ["sku", *(f"compat_{name}" for name in SWITCHES), "compat_reference"]
    for name in SWITCHES:
        job = jobs[f"compat_{name}"]
        assert job.recipe.compat == CompatConfig(**{name: True})
        assert (job.recipe.acquire.preservation_mode == "divergence") is (name == "unbounded_divergence")
    assert jobs["compat_reference"].recipe.compat == CompatConfig.reference()
    for name in ("compat_reference", "compat_unbounded_divergence"):
        assert "with preservation_mode divergence" in jobs[name].title
    for job in jobs.values():
        prepare(job.recipe, tmp_path)


def test_rows_of_other_ablations_go_with_all_switches(tmp_path: Path) -> None:
    recipe = load_recipe("embedded", ["compat=reference", "acquire.preservation_mode=divergence"])
    for job in ablation_jobs(recipe, list(ABLATIONS), seeds=1):
        prepare(job.recipe, tmp_path)


def test_a_record_is_not_taken_for_that_of_another_switch() -> None:
    bench = cast(Bench, SimpleNamespace(_inputs={}))
    jobs = ablation_jobs(load_recipe("embedded"), ["compat"], seeds=1)
    keys = [Bench.key(bench, job) for job in jobs if job.kind == "method"]
    assert len(set(keys)) == len(keys) == 8
    base = next(job for job in jobs if job.kind == "base")
    assert Bench.key(bench, base) != Bench.key(bench, with_rows(base))


def with_rows(job: Job) -> Job:
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, compat=CompatConfig(row_split=True)))
