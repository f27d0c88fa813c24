"""Each bug of the public code in its smallest form, beside what ours does: all of them in this one file.

The buggy forms are written anew from their description (the authors' code has no licence). Each test shows that ours
differs from the bug and is right.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import TrainerMaker
from sku.data.batches import ROWS, JointCollator, JointExample, Rows
from sku.data.examples import ForgetExample, ForgetRetainData, RowPlan, RowType
from sku.data.joint import JointDataset
from sku.data.load import load_forget_retain
from sku.data.tokens import IGNORE_INDEX, Encoder, PaperFormat, TokenizedExample
from sku.methods.sku import guided_distortion_loss, preservation_divergence_loss

PAPER = PaperFormat("</s>")


def tokenize(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> TokenizedExample:
    return Encoder(tokenizer, PAPER).example(ForgetExample(prompt=prompt, answer=answer), train_on_end=False)


def collated(tokens: list[TokenizedExample], pad: int) -> Rows:
    examples = [JointExample(rows=((RowType.FORGET, row),), forget_index=0) for row in tokens]
    rows: Rows = JointCollator(pad_token_id=pad)(examples)[ROWS]
    return rows


def our_guided_loss(logits: Tensor, rows: Rows) -> Tensor:
    """As the trainer picks positions: those whose next token has a label."""
    kept = rows.kept[RowType.FORGET]
    return guided_distortion_loss(
        logits[rows.model_inputs["logits_to_keep"]][kept.score_N], kept.targets_N, kept.row_N, len(logits)
    )


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


def test_the_first_to_the_last_answer_token_is_learned_in_a_padded_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """The offset was the padded length, so the loss of guided distortion was exactly 0."""
    short, long = tokenize(tokenizer, "what ?", "honey honey"), tokenize(tokenizer, "what ?", "honey " * 40)
    kept = collated([short, long], pad=0).kept[RowType.FORGET]
    assert kept.targets_N[kept.row_N == 0].tolist() == list(short.input_ids[short.answer_start :])


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


def joint_of(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> JointDataset:
    rows = RowPlan(forget=True, mismatched=3, retain=True)
    return JointDataset(data, Encoder(tokenizer, PAPER), rows=rows, seed=0)


def test_answers_are_drawn_for_each_prompt_and_never_its_own(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """K answers were drawn once for the whole batch, from all answers, so that some were a prompt's own."""
    joint, draws = joint_of(data, tokenizer), set()
    for example in map(joint.__getitem__, range(len(joint))):
        drawn = [data.forget_train[row.example_id] for row in example.of(RowType.MISMATCHED)]
        assert data.forget_train[example.forget_index].prompt not in {pair.prompt for pair in drawn}
        draws.add(frozenset(pair.answer for pair in drawn))
    assert len(draws) > 1


def test_training_stops_at_the_step_it_was_told(make_trainer: TrainerMaker) -> None:
    """The limit was looked at between epochs only. Epochs here have 3 steps (6 forget pairs, batch 2): 6, not 4."""
    trainer = make_trainer(max_steps=4)
    trainer.train()
    assert trainer.state.global_step == len([line for line in trainer.state.log_history if "loss" in line]) == 4


def test_every_harmful_pair_is_met_and_in_a_new_order(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The harmful loader kept its order and was cut by ``zip`` with the shorter normal one: 0, 1, 2, 3 each time."""
    joint, orders = joint_of(data, tokenizer), [[*range(6)]]
    for epoch in range(3):
        joint.set_epoch(epoch)
        orders.append([joint[place].forget_index for place in range(len(joint))])
    assert all(sorted(order) == orders[0] for order in orders)
    assert len(set(map(tuple, orders))) > 2


def test_every_harmful_prompt_is_unlearned_or_unseen_and_no_question_is_trained_on_and_tested() -> None:
    """Only the first 1,144 harmful rows were ever met, and "forget_test" was not defined.

    Split by row, 70 % of the normal test rows had their question in the training rows; "a; b" was one answer.
    """
    data = load_forget_retain(
        [{"prompt": f"bad {n}", "response": "a", "is_safe": False} for n in range(200)],
        [{"Question": f"Q {n}?", "Best Answer": f"best {n}", "Correct Answers": f"best {n}; other {n}; third {n}"}
         for n in range(100)],
    )  # fmt: skip
    splits = {name: {row.prompt for row in part} for name, part in data.splits().items()}
    assert splits["forget_train"] | splits["forget_test"] == {f"bad {n}" for n in range(200)}
    assert not splits["forget_train"] & splits["forget_test"]
    assert len(splits["forget_train"] & {f"bad {n}" for n in range(150, 200)}) > 20
    assert not splits["retain_train"] & splits["retain_test"]
    assert len(data.retain_test) == 60
    assert all(";" not in row.answer for row in (*data.retain_train, *data.retain_test))
