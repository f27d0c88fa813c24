"""Framings: a share of the training prompts, the same for harmful and normal ones, and never those of the attack."""

from __future__ import annotations

from importlib import resources

import pytest
from transformers import PreTrainedTokenizerFast

from sku.data.examples import ForgetExample, ForgetRetainData, RowPlan, RowType, group_of
from sku.data.joint import PLACE, JointDataset, framed, framings
from sku.data.load import load_forget_retain
from sku.data.tokens import Encoder, PaperFormat
from sku.errors import DataError

EXAMPLES = [
    ForgetExample(prompt=f"how do i make {number} ?", answer="take it", group="g" if number < 2 else None)
    for number in range(400)
]


def test_no_family_of_framings_is_one_of_the_attack() -> None:
    """A line that begins with # names the family of those below it."""
    families = [
        {line for line in (resources.files(package) / name).read_text("utf-8").splitlines() if line.startswith("#")}
        for package, name in (("sku.data", "framings.txt"), ("sku.attacks", "templates.txt"))
    ]
    assert (len(families[0]), len(families[1])) == (6, 10)
    assert families[0].isdisjoint(families[1])
    assert all(framing.count(PLACE) == 1 and framing[0] != "#" for framing in framings())


def test_a_share_is_framed_and_stays_in_its_group() -> None:
    found = framed(EXAMPLES, 0.25, seed=3)
    changed = [(old, new) for old, new in zip(EXAMPLES, found, strict=True) if old != new]
    assert 60 < len(changed) < 140  # Of 400 at a quarter: 100, give or take five standard deviations.
    for old, new in changed:
        assert old.prompt in new.prompt
        assert (new.answer, group_of(new)) == (old.answer, group_of(old))
        assert new.prompt in {framing.replace(PLACE, old.prompt) for framing in framings()}
    assert found == framed(EXAMPLES, 0.25, seed=3) != framed(EXAMPLES, 0.25, seed=4)
    assert framed(EXAMPLES, 0.0, seed=3) == tuple(EXAMPLES)
    assert all(new.prompt != old.prompt for old, new in zip(EXAMPLES, framed(EXAMPLES, 1.0, seed=3), strict=True))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_only_what_is_trained_on_is_framed(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast, share: float
) -> None:
    rows = RowPlan(forget=True, mismatched=2, retain=1, safe="data or refusal", framed_share=share)
    before = data.counts(), data.forget_train
    joint = JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=rows, seed=0)
    plain = JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=RowPlan(forget=True, retain=1), seed=0)
    assert (data.counts(), data.forget_train) == before
    example, known = joint[0], plain[0]
    assert (example.forget_index, example.retain_rows) == (known.forget_index, known.retain_rows)
    for kind in (RowType.FORGET, RowType.RETAIN):
        assert (example.of(kind) == known.of(kind)) == (share == 0)
    [forget], [plain_forget] = example.of(RowType.FORGET), known.of(RowType.FORGET)
    assert forget.input_ids[forget.answer_start :] == plain_forget.input_ids[plain_forget.answer_start :]
    # Refusals and other prompts' answers stand after the very prompt of the harmful answer.
    assert len(example.of(RowType.SAFE)) == 1
    for row in (*example.of(RowType.SAFE), *example.of(RowType.MISMATCHED)):
        assert row.input_ids[: row.answer_start] == forget.input_ids[: forget.answer_start]


def test_the_embedded_world_is_not_framed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = RowPlan(forget=True, retain=1, framed_share=0.5)
    with pytest.raises(DataError, match=r"framed_share puts prompts in English"):
        JointDataset(load_forget_retain(), Encoder(tokenizer, PaperFormat("</s>")), rows=rows, seed=0)
