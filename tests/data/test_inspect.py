"""What ``sku data inspect`` shows, and that it hides what it must."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from sku.data.examples import ForgetExample, ForgetRetainData, Provenance, RetainExample
from sku.data.inspect import describe_data, hidden_text
from sku.data.tokens import Encoder, PaperFormat

from .conftest import tokenizer_of

SECRET = "the secret procedure is honey"
DATA = ForgetRetainData(
    forget_train=tuple(ForgetExample(prompt=f"bad {n} ?", answer=SECRET, category="theft") for n in range(5)),
    forget_test=(ForgetExample(prompt="forget_test", answer=SECRET),),
    retain_train=tuple(
        RetainExample(prompt=f"good {n // 2}", answer=f"it is {n} .", finished=n > 1) for n in range(4)
    ),
    retain_test=(RetainExample(prompt="test", answer="honey " * 200),),
    provenance=(Provenance(source="columns", location="x.csv", rows_left_out={"duplicate": 2}),),
    normal={
        "own": (RetainExample(prompt="benign", answer="it is ."),),
        "asked": (RetainExample(prompt="prompt alone", answer=""),),
    },
)


def describe(tokenizer: PreTrainedTokenizerBase, *, show_harmful: bool = False) -> dict[str, Any]:
    return describe_data(DATA, Encoder(tokenizer, PaperFormat("</s>")), show_harmful=show_harmful)


def test_counts_lengths_and_learned_tokens(gpt_like: PreTrainedTokenizerBase) -> None:
    found = describe(gpt_like)
    splits = found["splits"]
    assert list(splits) == ["forget_train", "forget_test", "retain_train", "retain_test", "normal:own"]
    for name, counted in (("forget_train", [5, 5, {"theft": 5}, 0]), ("retain_train", [4, 2, {"": 4}, 2])):
        assert [splits[name][key] for key in ("examples", "groups", "categories", "unfinished")] == counted
    assert splits["retain_test"]["learned_percentiles"] == {50: 128, 90: 128, 100: 128}
    assert splits["retain_test"]["tokenization"]["answers_shortened"] == 1
    assert found["notes"][-1] == "normal:asked: 1 prompts without answers, only asked"
    assert found["provenance"] == [dataclasses.asdict(source) for source in DATA.provenance]
    assert (found["prompt_format"], found["max_length"], found["max_answer_tokens"]) == ("paper", 512, 128)
    views = [view for view in found["views"] if view["split"] == "retain_train"]
    assert len(views) == 3
    tokens = views[2]["tokens"]
    assert "".join(token["text"] for token in tokens) == "### Question: good 1\n ### Answer: it is 2 .</s>"
    assert "".join(token["text"] for token in tokens if token["learned"]) == " it is 2 .</s>"


@pytest.mark.parametrize("name", ["byte_level_bos_eos", "metaspace_prepend"])
def test_harmful_answers_are_hidden(name: str) -> None:
    hidden, shown = (describe(tokenizer_of(name), show_harmful=show)["views"] for show in (False, True))
    assert all(word not in repr(hidden) for word in ("secret", "procedure"))
    for view, whole in zip(hidden[:3], shown[:3], strict=True):
        assert view["split"] == "forget_train"
        *before, last = view["tokens"]
        assert last["text"] == hidden_text(SECRET)
        assert before == whole["tokens"][: len(before)]
        assert last["tokens"] == sum(token["learned"] for token in whole["tokens"])
        assert "procedure is honey" in "".join(token["text"] for token in whole["tokens"])
        assert not any(token["learned"] for token in before)
        assert whole["tokens"][-1]["text"] != "</s>", "the end of a harmful answer is not learned"
    assert hidden_text("two words") == "[hidden, 2 words, sha256 a03f1d61]"
