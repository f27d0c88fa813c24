"""What ``sku data inspect`` shows, and that it hides what it must."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import PreTrainedTokenizerBase

from sku.data.examples import ForgetExample, ForgetRetainData, Provenance, RetainExample
from sku.data.inspect import DataDescription, describe_data, hidden_text
from sku.data.tokens import Encoder, PaperFormat

from .conftest import BUILDERS, tokenizer_of

SECRET = "the secret procedure is honey"


@pytest.fixture
def data() -> ForgetRetainData:
    return ForgetRetainData(
        forget_train=tuple(ForgetExample(prompt=f"bad {n} ?", answer=SECRET, category="theft") for n in range(5)),
        forget_test=(ForgetExample(prompt="forget_test", answer=SECRET),),
        retain_train=tuple(RetainExample(prompt=f"good {n // 2}", answer=f"it is {n} .") for n in range(4)),
        retain_validation=(),
        retain_test=(RetainExample(prompt="test", answer="honey " * 200),),
        provenance=(Provenance(source="columns", location="x.csv", rows_left_out={"duplicate": 2}),),
    )


def describe(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerBase, *, show_harmful: bool = False
) -> DataDescription:
    return describe_data(data, Encoder(tokenizer, PaperFormat("</s>")), show_harmful=show_harmful)


def test_counts_and_lengths(data: ForgetRetainData, gpt_like: PreTrainedTokenizerBase) -> None:
    found = describe(data, gpt_like)
    assert list(found.splits) == ["forget_train", "forget_test", "retain_train", "retain_test"]
    unlearned, train, test = found.splits["forget_train"], found.splits["retain_train"], found.splits["retain_test"]
    assert (unlearned.examples, unlearned.groups, unlearned.categories) == (5, 5, {"theft": 5})
    assert (train.examples, train.groups, train.categories) == (4, 2, {"": 4})
    assert test.learned_percentiles == {50: 128, 90: 128, 99: 128, 100: 128}
    assert test.tokenization.answers_shortened == 1
    assert list(train.length_percentiles) == [50, 90, 99, 100]
    assert all(train.learned_percentiles[rank] < train.length_percentiles[rank] for rank in (50, 100))
    assert {name: split.unfinished for name, split in found.splits.items()} == dict.fromkeys(found.splits, 0)
    cut = tuple(dataclasses.replace(example, finished=index > 1) for index, example in enumerate(data.retain_train))
    again = describe(dataclasses.replace(data, retain_train=cut), gpt_like).splits["retain_train"]
    assert again.unfinished == 2
    assert again.learned_percentiles[50] == train.learned_percentiles[50] - 1
    assert found.provenance == data.provenance
    assert (found.prompt_format, found.max_length, found.max_answer_tokens) == ("paper", 512, 128)


def test_sets_of_other_sources_are_splits_where_there_are_any(
    data: ForgetRetainData, gpt_like: PreTrainedTokenizerBase
) -> None:
    others = {
        "own": (RetainExample(prompt="benign", answer="it is ."),),
        "asked": (RetainExample(prompt="prompt alone", answer=""),),
    }
    with_others = dataclasses.replace(data, normal=others)
    found = describe(with_others, gpt_like)
    assert list(found.splits) == ["forget_train", "forget_test", "retain_train", "retain_test", "normal:own"]
    assert found.splits["normal:own"].examples == 1
    assert found.notes[-1] == "normal:asked: 1 prompts without answers, only asked"
    assert "normal:own" not in {view.split for view in found.views}


def test_views_show_which_tokens_are_learned(data: ForgetRetainData, gpt_like: PreTrainedTokenizerBase) -> None:
    views = [view for view in describe(data, gpt_like).views if view.split == "retain_train"]
    assert len(views) == 3
    text = "".join(token.text for token in views[0].tokens)
    assert text == "### Question: good 0\n ### Answer: it is 0 .</s>"
    assert "".join(token.text for token in views[0].tokens if token.learned) == " it is 0 .</s>"


@pytest.mark.parametrize("name", BUILDERS)
def test_harmful_answers_are_hidden(name: str, data: ForgetRetainData) -> None:
    tokenizer = tokenizer_of(name)
    hidden = describe(data, tokenizer)
    assert all(word not in repr(dataclasses.asdict(hidden)) for word in ("secret", "procedure"))
    views = [view for view in hidden.views if view.split == "forget_train"]
    assert len(views) == 3
    shown = [view for view in describe(data, tokenizer, show_harmful=True).views if view.split == "forget_train"]
    for view, whole in zip(views, shown, strict=True):
        assert view.tokens[-1].text == hidden_text(SECRET)
        assert view.tokens[:-1] == whole.tokens[: len(view.tokens) - 1]
        assert view.tokens[-1].tokens == sum(token.learned for token in whole.tokens)
        assert "procedure is honey" in "".join(token.text for token in whole.tokens)
        assert not any(token.learned for token in view.tokens[:-1])
        assert whole.tokens[-1].text != "</s>", "the end of a harmful answer is not learned"


def test_hidden_text_can_be_recognised_but_not_read() -> None:
    assert hidden_text("two words") == "[hidden, 2 words, sha256 a03f1d61]"
    assert hidden_text("half \ud83d") != hidden_text("half \ud83e")
