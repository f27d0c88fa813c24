"""Each bug of the public code in its smallest form, beside what ours does: all of them in this one file.

The buggy forms are written anew from their description (the authors' code has no licence). Each test shows that ours
differs from the bug and is right. What the code does on purpose, and a recipe can ask for, is in
acquire/test_reference_behaviours.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker, TrainerMaker
from negate.conftest import disturbed
from sku.acquire.objective import guided_distortion_loss, preservation_divergence_loss
from sku.data.batches import ROWS, JointCollator, JointExample, PaddedRows
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample, RowPlan, RowType
from sku.data.joint import JointDataset
from sku.data.load import load_forget_retain
from sku.data.read import read_examples
from sku.data.tables import held_rows
from sku.data.tokens import IGNORE_INDEX, Encoder, PaperFormat, TokenizedExample
from sku.errors import TaskVectorError
from sku.negate.task_vector import TaskVector, negate

PAPER = PaperFormat("</s>")


def tokenize(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> TokenizedExample:
    return Encoder(tokenizer, PAPER).example(ForgetExample(prompt=prompt, answer=answer), train_on_end=False)


def collated(rows: list[TokenizedExample], pad: int) -> PaddedRows:
    examples = [JointExample(rows=((RowType.FORGET, row),), forget_index=0) for row in rows]
    found = JointCollator(pad_token_id=pad)(examples)[ROWS]
    assert isinstance(found, PaddedRows)
    return found


def our_guided_loss(logits: Tensor, rows: PaddedRows) -> Tensor:
    """As the trainer picks positions: those whose next token has a label."""
    kept = rows.kept[RowType.FORGET]
    return guided_distortion_loss(logits[rows.kept_RT][kept.score_N], kept.targets_N, kept.row_N, len(logits))


def test_the_answer_does_not_start_at_the_number_of_fields(tokenizer: PreTrainedTokenizerFast) -> None:
    """``len(tokenizer(question))`` is 2, the number of its fields: a mismatched row learned the question itself."""
    row = tokenize(tokenizer, "how do i bake bread ?", "heat it .")
    buggy_start = len(tokenizer("### Question: how do i bake bread ?\n ### Answer:"))
    assert buggy_start == 2
    assert "bake bread" in tokenizer.decode(list(row.input_ids[buggy_start:]))
    batch = JointCollator()([JointExample(rows=((RowType.MISMATCHED, row),), forget_index=0)])
    assert set(batch[ROWS].kept) == {RowType.MISMATCHED}
    assert tokenizer.decode(batch[ROWS].kept[RowType.MISMATCHED].targets_N.tolist()) == " heat it ."


def test_padding_is_not_told_by_a_literal_id() -> None:
    """Padding was ``id == 1``. Where 1 is a real token its loss was dropped, and where pads are 3 they were counted.

    Uniform scores over V = 4 cost log 4 a token, so an answer of 3 tokens has mean log 4. With the pads (id 3) in the
    denominator and token 1 out of the sum, the buggy mean is 2 log 4 / 5.
    """
    row = TokenizedExample(input_ids=(0, 2, 1, 2), labels=(IGNORE_INDEX, 2, 1, 2), answer_start=1)
    longer = TokenizedExample(input_ids=(0,) * 6, labels=(IGNORE_INDEX, 0, 0, 0, 0, 0), answer_start=1)
    batch = collated([row, longer], pad=3)
    targets = batch.input_ids[0, 1:]
    counts = (targets != 1) & (targets != 3)
    buggy = math.log(4) * float(counts.sum()) / len(targets)
    assert buggy == pytest.approx(2 * math.log(4) / 5)
    ours = our_guided_loss(torch.zeros(2, 6, 4), batch)
    torch.testing.assert_close(ours, torch.full((2,), math.log(4)))


def test_the_first_answer_token_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt's length was taken with its last space, which the joined text puts into the answer's first token."""
    row = tokenize(tokenizer, "what is a florn ?", "golden .")
    buggy_start = len(tokenizer("### Question: what is a florn ?\n ### Answer: ").input_ids)
    assert buggy_start == row.answer_start + 1, "the first token was left out"
    assert row.labels[row.answer_start] == row.input_ids[row.answer_start] != IGNORE_INDEX
    assert tokenizer.decode(list(row.input_ids[row.answer_start :])) == " golden ."


@pytest.mark.parametrize("length", [1, 3, 9])
def test_the_first_to_the_last_answer_token_is_learned_in_a_padded_row(
    length: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The offset was the padded length, so the loss of guided distortion was exactly 0."""
    short, long = tokenize(tokenizer, "what ?", "honey " * length), tokenize(tokenizer, "what ?", "honey " * 40)
    kept = collated([short, long], pad=0).kept[RowType.FORGET]
    assert kept.targets_N[kept.row_N == 0].tolist() == list(short.input_ids[short.answer_start :])


@pytest.mark.parametrize("prompt", ["what is ### honey ?", "Question: who ?", "### Answer: no\n ### Question: yes"])
def test_prompts_with_the_words_of_the_format_stay_whole(prompt: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The question was recovered by decoding and splitting at "###" and "Question:"."""
    example = tokenize(tokenizer, prompt, "it is .")
    before = tokenizer.decode(list(example.input_ids[: example.answer_start]))
    assert before == f"### Question: {prompt}\n ### Answer:"
    assert tokenizer.decode(Encoder(tokenizer, PAPER).prompt(prompt)) == before


def test_the_divergence_is_not_averaged_over_padding() -> None:
    """One answer position with KL of 3/4 log 1.5 - 1/4 log 2 = 0.131, and three pads where both models agree.

    The buggy mean over all four is a quarter of it. Where they disagree on pads, these alone made a loss.
    """
    p, q = torch.tensor([math.log(3), 0.0]), torch.zeros(2)
    expected = 0.75 * math.log(1.5) - 0.25 * math.log(2)

    def kl(reference: Tensor, model: Tensor) -> Tensor:
        log_p, log_q = reference.log_softmax(-1), model.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    for pad_scores, buggy in ((p, -expected / 4), (q, -expected)):
        reference, model = torch.stack([p] * 4), torch.stack([q, *[pad_scores] * 3])
        assert float(-kl(reference, model).mean()) == pytest.approx(buggy)
        ours = preservation_divergence_loss(
            reference[:1], model[:1], torch.tensor([0]), 1, mode="divergence", cap=None
        )
        assert float(ours) == pytest.approx(-expected)


def test_an_underflowing_softmax_makes_no_infinite_divergence() -> None:
    """-KL by log(softmax) is infinite at a gap of 200 in float32; it was not capped either."""
    reference, model = torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]])
    probabilities, other = reference.softmax(-1), model.softmax(-1)
    buggy = -(probabilities * (probabilities.log() - other.log())).nansum()
    assert torch.isinf(buggy)
    for cap, expected in ((None, -200.0), (1.0, -1.0)):
        ours = preservation_divergence_loss(reference, model, torch.tensor([0]), 1, mode="divergence", cap=cap)
        assert float(ours) == pytest.approx(expected)


@pytest.mark.parametrize("pads", [1, 100])
def test_pads_are_not_in_the_denominator(pads: int) -> None:
    """The buggy sum over 2 answer tokens was divided by 2 + pads: 100 pads cut the loss to a fiftieth."""
    row = TokenizedExample(input_ids=(0, 2, 1), labels=(IGNORE_INDEX, 2, 1), answer_start=1)
    longer = TokenizedExample(input_ids=(0,) * (3 + pads), labels=(IGNORE_INDEX, *(0,) * (2 + pads)), answer_start=1)
    buggy = 2 * math.log(4) / (2 + pads)
    ours = our_guided_loss(torch.zeros(2, 3 + pads, 4), collated([row, longer], pad=3))
    assert buggy < 0.7 * math.log(4)
    torch.testing.assert_close(ours, torch.full((2,), math.log(4)))


def test_answers_are_drawn_for_each_prompt_and_never_its_own(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """K answers were drawn once for the whole batch, from all answers."""
    pool = [example.answer for example in data.forget_train]
    own = {
        prompt: {e.answer for e in data.forget_train if e.prompt == prompt}
        for prompt in {e.prompt for e in data.forget_train}
    }
    drawn = random.Random(0).sample(pool, 3)
    buggy = {example.prompt: drawn for example in data.forget_train}
    assert any(set(buggy[prompt]) & answers for prompt, answers in own.items())

    joint = JointDataset(data, Encoder(tokenizer, PAPER), rows=RowPlan(forget=True, mismatched=3, retain=True), seed=0)
    ours = [joint[place] for place in range(len(joint))]
    draws = {tuple(sorted(row.example_id for row in example.of(RowType.MISMATCHED))) for example in ours}
    assert len(draws) > 1
    for example in ours:
        prompt = data.forget_train[example.forget_index].prompt
        assert not {data.forget_train[row.example_id].answer for row in example.of(RowType.MISMATCHED)} & own[prompt]


@pytest.mark.parametrize("max_steps", [2, 4, 5])
def test_training_stops_at_the_step_it_was_told(max_steps: int, make_trainer: TrainerMaker) -> None:
    """The limit was looked at between epochs only. Epochs here have 3 steps (6 forget pairs, batch 2)."""

    def buggy_steps(epoch: int) -> int:
        steps = 0
        while steps < max_steps:
            for _ in range(epoch):
                steps += 1
        return steps

    assert buggy_steps(3) == math.ceil(max_steps / 3) * 3 != max_steps
    trainer = make_trainer(max_steps=max_steps)
    trainer.train()
    assert trainer.state.global_step == max_steps
    assert len([line for line in trainer.state.log_history if "loss" in line]) == max_steps


def test_every_harmful_pair_is_met_and_in_a_new_order(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The harmful loader kept its order and was cut by ``zip`` with the shorter normal one."""
    assert len(data.retain_train) < len(data.forget_train)
    buggy = [pair[0] for _ in range(2) for pair in zip(range(len(data.forget_train)), data.retain_train, strict=False)]
    assert buggy == [0, 1, 2, 3] * 2

    joint = JointDataset(data, Encoder(tokenizer, PAPER), rows=RowPlan(forget=True, mismatched=1, retain=True), seed=0)
    epochs = []
    for epoch in range(3):
        joint.set_epoch(epoch)
        epochs.append([joint[place].forget_index for place in range(len(joint))])
    assert all(sorted(order) == list(range(6)) for order in epochs)
    assert len({tuple(order) for order in [*epochs, list(range(6))]}) > 2


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    path = folder / name
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_every_harmful_prompt_is_unlearned_or_published_as_unseen(tmp_path: Path) -> None:
    """Only the first 1,144 harmful rows were ever met, and "forget_test" was not defined."""
    harmful: list[dict[str, object]] = [{"prompt": f"bad {n}", "response": "a", "is_safe": False} for n in range(200)]
    normal: list[dict[str, object]] = [{"question": f"good {n}", "answer": "a"} for n in range(50)]
    data = load_forget_retain(write(tmp_path, "f.parquet", harmful), write(tmp_path, "r.parquet", normal))
    unlearned = {row.prompt for row in data.forget_train}
    unseen = {row.prompt for row in data.forget_test}
    assert unlearned | unseen == {row["prompt"] for row in harmful}
    assert not unlearned & unseen
    last_quarter = {f"bad {n}" for n in range(150, 200)}
    assert len(unlearned & last_quarter) > 20


def test_no_question_is_trained_on_and_tested(tmp_path: Path) -> None:
    """Split by row, 70 % of the test rows had their question in the training rows; "a; b" was one answer."""
    rows: list[dict[str, object]] = [
        {
            "Question": f"Question {n}?",
            "Best Answer": f"best {n}",
            "Correct Answers": f"best {n}; other {n}; third {n}",
        }
        for n in range(100)
    ]
    examples, _ = read_examples(held_rows(rows), "retain", RetainExample)
    assert len(examples) == 300
    assert all(";" not in example.answer for example in examples)
    by_row = random.Random(0).sample(examples, len(examples))
    trained = {row.prompt for row in by_row[:210]}
    assert sum(row.prompt in trained for row in by_row[240:]) > 30, "the bug that this test is about"
    harmful: list[dict[str, object]] = [{"prompt": f"bad {n}", "response": "a", "is_safe": False} for n in range(9)]
    data = load_forget_retain(write(tmp_path, "f.parquet", harmful), write(tmp_path, "r.parquet", rows))
    trained = {row.prompt for row in data.retain_train}
    assert len(data.retain_test) == 60
    assert not any(row.prompt in trained for row in data.retain_test)


def in_chunks(weights: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    items = iter(weights.items())
    while chunk := dict(itertools.islice(items, size)):
        yield chunk


@pytest.mark.parametrize("architecture", ["opt", "llama_tied"])
def test_tied_weights_are_subtracted_once(architecture: str, make_model: ModelMaker) -> None:
    """Name by name on a live state_dict, the shared embedding was changed under both of its names: -0.2, not -0.1."""
    base: Any = make_model(architecture)
    bad: Any = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.add_(0.1)
    embedding = base.get_input_embeddings().weight.detach().clone()

    buggy: Any = copy.deepcopy(base)
    with torch.no_grad():
        original, learned = copy.deepcopy(base).state_dict(), bad.state_dict()
        vector = {name: learned[name] - original[name] for name in original}
        for chunk in in_chunks(buggy.state_dict(), 5):
            for name, weight in chunk.items():
                weight.sub_(vector[name])
    torch.testing.assert_close(buggy.get_input_embeddings().weight.detach(), embedding - 0.2)

    ours: Any = negate(base, bad)
    torch.testing.assert_close(ours.get_input_embeddings().weight.detach(), embedding - 0.1)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantized_weights_are_not_left_out(dtype: torch.dtype, make_model: ModelMaker) -> None:
    """Integer tensors were skipped, so that on a 4-bit model stage 2 changed no linear layer."""

    def quantized(seed: int) -> nn.Module:
        model = disturbed(make_model(), seed=seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                values = (module.weight.detach() * 10).round().abs().to(dtype)
                module.weight = nn.Parameter(values, requires_grad=False)
        return model  # type: ignore[no-any-return]

    base, bad = quantized(1), quantized(2)
    theirs = bad.state_dict()
    buggy = {
        name: theirs[name] - w for name, w in base.state_dict().items() if w.dtype not in (torch.uint8, torch.int8)
    }
    assert not any("proj" in name for name in buggy)
    assert buggy
    with pytest.raises(TaskVectorError, match="quantized weights have no exact difference"):
        TaskVector.between(base, bad)
