"""Token by token: the answer is learned, all of it, and nothing else."""

import pytest
from transformers import PreTrainedTokenizerBase

from sku.data.examples import ForgetExample, RetainExample
from sku.data.tokens import IGNORE_INDEX, Encoder, PaperFormat, PromptFormat, RenderedText, TokenizedExample
from sku.errors import DataError

from .conftest import BUILDERS, byte_level, tokenizer_of

Q, A = "what is honey ?", "honey is sweet ."
PAPER = PaperFormat("</s>")


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat = PAPER,
    *,
    prompt: str = Q,
    answer: str = A,
    max_length: int = 512,
    max_answer_tokens: int = 128,
    train_on_end: bool = True,
    finished: bool = True,
) -> TokenizedExample:
    encoder = Encoder(tokenizer, prompt_format, max_length, max_answer_tokens)
    return encoder.example(RetainExample(prompt=prompt, answer=answer, finished=finished), train_on_end=train_on_end)


def names(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...] | list[int]) -> list[str]:
    found = tokenizer.convert_ids_to_tokens(list(ids))
    assert isinstance(found, list)
    return found


def learned(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample) -> list[str]:
    return names(tokenizer, [label for label in example.labels if label != IGNORE_INDEX])


def whole_words() -> PreTrainedTokenizerBase:
    """Byte-level, but each word and sign of these tests is one token, so that lengths can be counted by eye."""
    tokenizer = byte_level(bos=True)
    tokenizer.add_tokens(["###", " Question", " Answer", " what", " is", " honey", " sweet", " bees", " make"])
    return tokenizer


def test_every_token_of_the_paper_format() -> None:
    example = tokenize(whole_words())
    assert names(whole_words(), example.input_ids) == [
        *["<s>", "###", " Question", ":", " what", " is", " honey", "\u0120?"],
        *["\u010a", "\u0120", "###", " Answer", ":"],
        *[" honey", " is", " sweet", "\u0120.", "</s>"],
    ]
    assert example.answer_start == 13
    assert example.labels == (IGNORE_INDEX,) * 13 + example.input_ids[13:]


def test_the_end_is_learned_only_where_asked_and_only_behind_a_whole_answer() -> None:
    tokenizer = whole_words()
    assert learned(tokenizer, tokenize(tokenizer)) == [" honey", " is", " sweet", "\u0120.", "</s>"]
    without = tokenize(tokenizer, train_on_end=False)
    assert learned(tokenizer, without) == [" honey", " is", " sweet", "\u0120."]
    assert tokenizer.eos_token_id not in without.input_ids
    unfinished = tokenize(tokenizer, finished=False)
    assert unfinished == without, "an answer that its row calls cut off has no end to learn"
    cut = tokenize(tokenizer, max_answer_tokens=2)
    assert learned(tokenizer, cut) == [" honey", " is"]
    assert cut.answer_shortened
    assert not tokenize(tokenizer, max_answer_tokens=4).answer_shortened


def test_a_long_prompt_loses_the_start_of_its_words_and_nothing_else() -> None:
    tokenizer = whole_words()
    prompt = "what is honey what is bees"
    whole = names(tokenizer, tokenize(tokenizer, prompt=prompt).input_ids)
    assert whole[4:10] == [" what", " is", " honey", " what", " is", " bees"]
    example = tokenize(tokenizer, prompt=prompt, max_length=len(whole) - 4)
    assert names(tokenizer, example.input_ids) == [*whole[:4], " is", " bees", *whole[10:]]
    assert (example.prompt_shortened, example.answer_shortened) == (True, False)
    assert learned(tokenizer, example) == [" honey", " is", " sweet", "\u0120.", "</s>"]


def test_the_answer_is_cut_only_when_no_word_of_the_prompt_is_left() -> None:
    tokenizer = whole_words()
    frame = ["<s>", "###", " Question", ":", "\u010a", "\u0120", "###", " Answer", ":"]
    whole = [" honey", " is", " sweet", "\u0120.", "</s>"]
    for max_length, kept in ((14, 5), (13, 4), (11, 2), (10, 1)):
        answer = whole[:kept]
        example = tokenize(tokenizer, prompt="what is honey", max_length=max_length)
        assert names(tokenizer, example.input_ids) == frame + answer
        assert learned(tokenizer, example) == answer
        assert example.prompt_shortened
        assert example.answer_shortened == (max_length < 13)
    with pytest.raises(DataError, match="no room for the answer within max_length"):
        tokenize(tokenizer, prompt="what is honey", max_length=9)


def test_an_eos_that_the_tokenizer_adds_is_not_in_the_prompt() -> None:
    tokenizer = byte_level(bos=True, eos=True)
    assert tokenizer("honey").input_ids[-1] == tokenizer.eos_token_id
    assert Encoder(tokenizer, PAPER).prompt(Q)[-1] != tokenizer.eos_token_id
    assert tokenize(tokenizer).input_ids.count(2) == 1
    assert tokenize(tokenizer, train_on_end=False).input_ids.count(2) == 0


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("answer", [A, "it", "\U0001f600 \u96e8", "1"])
def test_asked_as_trained(name: str, answer: str) -> None:
    """What a model is asked with is what stands before the answer in training, unless a token crosses the border."""
    tokenizer = tokenizer_of(name)
    example = tokenize(tokenizer, answer=answer)
    asked = Encoder(tokenizer, PAPER).prompt(Q)
    trained = list(example.input_ids[: example.answer_start])
    before, alone = tokenizer.decode(trained), tokenizer.decode(asked)
    assert isinstance(before, str)
    assert isinstance(alone, str)
    if before == alone:
        assert trained == asked
    else:
        # These have tokens of letters, colon and the answer's space; such a token belongs to the answer.
        assert name in ("byte_level_no_regex", "metaspace", "metaspace_prepend")
        assert alone == f"{before}swer:"


def test_prefill_is_cut_from_the_joint_tokens() -> None:
    tokenizer = whole_words()
    whole = tokenize(tokenizer, train_on_end=False)
    prefilled = Encoder(tokenizer, PAPER).prefill(Q, A, 2)
    assert prefilled is not None
    ids, text = prefilled
    assert ids == list(whole.input_ids[: whole.answer_start + 2])
    assert text == " honey is"
    assert Encoder(tokenizer, PAPER).prefill(Q, A, 3) is not None
    assert Encoder(tokenizer, PAPER).prefill(Q, A, 4) is None, "nothing of the answer would be left to say"
    assert Encoder(tokenizer, PAPER).prefill(Q, A, 0) == (Encoder(tokenizer, PAPER).prompt(Q), "")


def test_report_counts_every_example() -> None:
    tokenizer = whole_words()
    examples = [
        ForgetExample(prompt="what", answer=A),
        ForgetExample(prompt="what", answer=""),
        ForgetExample(prompt="what is honey " * 9, answer=A),
        ForgetExample(prompt="what", answer="honey is " * 9),
        ForgetExample(prompt="half \ud83d", answer=A),
        ForgetExample(prompt="what", answer="half \ud83d"),
    ]
    kept, report = Encoder(tokenizer, PAPER, 24, 6).examples(examples, train_on_end=False)
    assert [row.example_id for row in kept] == [0, 2, 3]
    assert (report.total, report.kept, report.prompts_shortened, report.answers_shortened) == (6, 3, 1, 1)
    assert report.left_out == {"answer without tokens": 1, "text is not valid Unicode": 2}
    assert report.total == report.kept + sum(report.left_out.values())


def test_no_example_left_is_an_error_with_the_reasons() -> None:
    tokenizer = whole_words()
    with pytest.raises(
        DataError, match=r"none of 2 examples .*\(no room for the answer within max_length: 2\).* is 5"
    ):
        Encoder(tokenizer, PAPER, 5, 4).examples([RetainExample(prompt=Q, answer=A)] * 2, train_on_end=True)
    with pytest.raises(DataError, match="there were none"):
        Encoder(tokenizer, PAPER, 9, 4).examples([], train_on_end=True)


class NothingBefore(PaperFormat):
    """A prompt format that writes the answer alone."""

    def render(self, prompt: str, answer: str = "") -> RenderedText:
        """The answer alone."""
        return RenderedText(
            prompt_text="", answer_text=answer, end_text="", add_special_tokens=False, user_start=0, user_end=0
        )


def test_the_first_token_of_a_sequence_is_never_a_label(gpt_like: PreTrainedTokenizerBase) -> None:
    """No position predicts it; the loss would count a label that has no prediction."""
    example = tokenize(gpt_like, NothingBefore(""), answer="honey is")
    assert example.labels[0] == IGNORE_INDEX
    assert example.labels[1:] == example.input_ids[1:]
    with pytest.raises(DataError, match="answer without prompt"):
        tokenize(gpt_like, NothingBefore(""), answer=".")
