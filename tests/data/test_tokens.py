"""From a prompt and its answer to tokens: how they are written, where they begin and end, and what is learned.

Borders are checked against the bytes that each token stands for, not against the code that finds them.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sku.data.examples import ForgetExample, RetainExample
from sku.data.tokens import (
    IGNORE_INDEX,
    Encoder,
    PaperFormat,
    PromptFormat,
    RenderedText,
    TokenizedExample,
    locate_tokens,
    resolve_prompt_format,
)
from sku.errors import DataError, ModelError

from .conftest import BUILDERS, CHATML, TEMPLATES, byte_level, tokenizer_of, with_template

Q, A = "what is honey ?", "honey is sweet ."
PAPER = PaperFormat("</s>")


def test_paper_format(gpt_like: PreTrainedTokenizerBase) -> None:
    assert resolve_prompt_format("paper", gpt_like).render(Q, A) == RenderedText(
        prompt_text=f"### Question: {Q}\n ### Answer:",
        answer_text=f" {A}",
        end_text="</s>",
        add_special_tokens=True,
        user_start=14,
        user_end=14 + len(Q),
    )


CHATML_TEXT = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
WRITTEN = {
    # Template -> what stands before the answer, the answer, its end.
    "chatml": (CHATML_TEXT, A, "<|im_end|>"),
    "llama_2": (f"<s>[INST] {Q} [/INST]", f" {A}", " </s>"),
    "empty_thoughts": (f"{CHATML_TEXT}<think>\n\n</think>\n\n", A, "<|im_end|>"),
    "opened_thought": (CHATML_TEXT, A, "<|im_end|>"),
    "without_end": (f"user: {Q}\n\nassistant:", f" {A}", "</s>"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(gpt_like: PreTrainedTokenizerBase, template: str) -> None:
    prompt_format = resolve_prompt_format("chat", with_template(gpt_like, TEMPLATES[template]))
    text = prompt_format.render(Q, A)
    assert (text.prompt_text, text.answer_text, text.end_text) == WRITTEN[template]
    assert not text.add_special_tokens
    for prompt in (Q, "user", "<|im_end|>", "", "{{ x }}", "[/INST]"):
        text = prompt_format.render(prompt, A)
        assert text.prompt_text[text.user_start : text.user_end] == prompt


def test_auto_takes_chat_where_there_is_a_template(gpt_like: PreTrainedTokenizerBase) -> None:
    assert resolve_prompt_format("auto", gpt_like).name == "paper"
    assert resolve_prompt_format("auto", with_template(gpt_like, CHATML)).name == "chat"
    with pytest.raises(ModelError, match="no chat template"):
        resolve_prompt_format("chat", gpt_like)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only for tools') }}", "only for tools"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "2 times"),
        ("{{ messages[0]['content'] | upper }}", "0 times"),
        ("{% if messages[0]['content'] | length > 20 %}long: {% endif %}" + CHATML, "other text around this prompt"),
    ],
)
def test_templates_that_can_not_serve(gpt_like: PreTrainedTokenizerBase, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_prompt_format("chat", with_template(gpt_like, template)).render(Q * 3)


def test_a_template_may_write_the_date(gpt_like: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(gpt_like, "one day " + CHATML)
    prompt_format = resolve_prompt_format("chat", tokenizer)
    tokenizer.chat_template = "the day after " + CHATML
    assert prompt_format.render(Q, A).prompt_text == f"the day after {CHATML_TEXT}"


# Spaces at every border, digits, line ends, letters of several bytes, and the very sign byte-level uses for a space.
LETTERS = list("honey is ### Answer: .,\n\t 0\u00e9\u96e8\U0001f600\u0120\u2581")
WORDS = ["honey", " honey", " is", "Answer", ": ", " ", "brown .", "\n"]
TEXT = st.one_of(
    st.text(alphabet=st.sampled_from(LETTERS), max_size=25),
    st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
)


def token_ends(name: str, ids: list[int]) -> list[int]:
    """Where each token truly ends, in bytes, from the length of its piece."""
    pieces = ["" if piece == "<s>" else piece for piece in tokenizer_of(name).convert_ids_to_tokens(ids)]
    if name == "metaspace":
        lengths = [1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode()) for piece in pieces]
    else:
        lengths = [len(piece) for piece in pieces]
    return [sum(lengths[: index + 1]) for index in range(len(lengths))]


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "metaspace_prepend"])
@settings(deadline=None, max_examples=150)
@given(prompt=TEXT, answer=TEXT, user=st.tuples(st.integers(0, 25), st.integers(0, 25)))
def test_borders_are_exact(name: str, prompt: str, answer: str, user: tuple[int, int]) -> None:
    if name == "metaspace":  # It writes both signs alike.
        prompt, answer = prompt.replace("\u2581", "-"), answer.replace("\u2581", "-")
    low, high = sorted(min(place, len(prompt)) for place in user)
    text = RenderedText(
        prompt_text=prompt, answer_text=answer, end_text="", add_special_tokens=True, user_start=low, user_end=high
    )
    spans = locate_tokens(text, tokenizer_of(name), with_end=False)
    ends = token_ends(name, spans.ids)
    border = len(prompt.encode())
    assert [end > border for end in ends] == [index >= spans.answer_start for index in range(len(ends))]
    assert spans.end_start == len(spans.ids)
    before, behind = len(prompt[:low].encode()), len(prompt[:high].encode())
    for index in range(spans.user_start, spans.user_end):
        # A space before a word may go with the word.
        assert (ends[index - 1] if index else 0) >= before - (prompt[:low].endswith(" "))
        assert ends[index] <= behind


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["byte_level_bos_eos", "metaspace", "metaspace_prepend"])
def test_chat_templates_in_every_tokenizer(name: str, template: str) -> None:
    tokenizer = with_template(tokenizer_of(name), TEMPLATES[template])
    prompt_format = resolve_prompt_format("chat", tokenizer)
    text = prompt_format.render(Q, A)
    spans = locate_tokens(text, tokenizer, with_end=True)
    if name.startswith("byte_level"):  # In the others a token may hold the border.
        assert Encoder(tokenizer, prompt_format).prompt(Q) == spans.ids[: spans.answer_start]
    assert spans.ids.count(1) == (1 if template == "llama_2" else 0), "BOS twice or missing"
    answer = spans.ids[spans.answer_start : spans.end_start]
    assert decoded(answer, tokenizer).endswith(text.answer_text.strip())
    assert not decoded(answer[1:], tokenizer).endswith(text.answer_text)
    assert decoded(spans.ids[spans.end_start :], tokenizer).strip() == text.end_text.strip()
    words = decoded(spans.ids[spans.user_start : spans.user_end], tokenizer).strip()
    assert words in ("what is honey ?", "what is honey", "hat is honey ?")


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


@pytest.fixture(scope="module")
def whole_words() -> PreTrainedTokenizerBase:
    """Byte-level, but each word and sign of these tests is one token, so that lengths can be counted by eye."""
    tokenizer = byte_level(bos=True)
    tokenizer.add_tokens(["###", " Question", " Answer", " what", " is", " honey", " sweet", " bees", " make"])
    return tokenizer


ANSWER = [" honey", " is", " sweet", "\u0120.", "</s>"]
AROUND = ["<s>", "###", " Question", ":", "\u010a", "\u0120", "###", " Answer", ":"]


def test_every_token_of_the_paper_format(whole_words: PreTrainedTokenizerBase) -> None:
    example = tokenize(whole_words)
    words = [" what", " is", " honey", "\u0120?"]
    assert names(whole_words, example.input_ids) == [*AROUND[:4], *words, *AROUND[4:], *ANSWER]
    assert example.answer_start == 13
    assert example.labels == (IGNORE_INDEX,) * 13 + example.input_ids[13:]


def test_the_end_is_learned_only_where_asked_and_only_behind_a_whole_answer(
    whole_words: PreTrainedTokenizerBase,
) -> None:
    assert learned(whole_words, tokenize(whole_words)) == ANSWER
    without = tokenize(whole_words, train_on_end=False)
    assert learned(whole_words, without) == ANSWER[:4]
    assert whole_words.eos_token_id not in without.input_ids
    unfinished = tokenize(whole_words, finished=False)
    assert unfinished == without, "an answer that its row calls cut off has no end to learn"
    cut = tokenize(whole_words, max_answer_tokens=2)
    assert (learned(whole_words, cut), cut.answer_shortened) == (ANSWER[:2], True)
    assert not tokenize(whole_words, max_answer_tokens=4).answer_shortened


def test_a_long_prompt_loses_the_start_of_its_words_and_nothing_else(whole_words: PreTrainedTokenizerBase) -> None:
    example = tokenize(whole_words, prompt="what is honey what is bees", max_length=16)
    assert names(whole_words, example.input_ids) == [*AROUND[:4], " is", " bees", *AROUND[4:], *ANSWER]
    assert (example.prompt_shortened, example.answer_shortened) == (True, False)
    assert learned(whole_words, example) == ANSWER


def test_the_answer_is_cut_only_when_no_word_of_the_prompt_is_left(whole_words: PreTrainedTokenizerBase) -> None:
    for max_length, kept in ((14, 5), (13, 4), (11, 2), (10, 1)):
        example = tokenize(whole_words, prompt="what is honey", max_length=max_length)
        assert names(whole_words, example.input_ids) == AROUND + ANSWER[:kept]
        assert learned(whole_words, example) == ANSWER[:kept]
        assert (example.prompt_shortened, example.answer_shortened) == (True, max_length < 13)
    with pytest.raises(DataError, match="no room for the answer within max_length"):
        tokenize(whole_words, prompt="what is honey", max_length=9)


def test_an_eos_that_the_tokenizer_adds_is_not_in_the_prompt() -> None:
    tokenizer = byte_level(bos=True, eos=True)
    assert tokenizer("honey").input_ids[-1] == tokenizer.eos_token_id
    assert Encoder(tokenizer, PAPER).prompt(Q)[-1] != tokenizer.eos_token_id
    assert tokenize(tokenizer).input_ids.count(2) == 1
    assert tokenize(tokenizer, train_on_end=False).input_ids.count(2) == 0


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("answer", [A, "\U0001f600 \u96e8"])
def test_asked_as_trained(name: str, answer: str) -> None:
    """What a model is asked with is what stands before the answer in training, unless a token crosses the border."""
    tokenizer = tokenizer_of(name)
    example = tokenize(tokenizer, answer=answer)
    asked = Encoder(tokenizer, PAPER).prompt(Q)
    trained = list(example.input_ids[: example.answer_start])
    before, alone = decoded(trained, tokenizer), decoded(asked, tokenizer)
    if before == alone:
        assert trained == asked
    else:
        # These have tokens of letters, colon and the answer's space; such a token belongs to the answer.
        assert name in ("byte_level_no_regex", "metaspace", "metaspace_prepend")
        assert alone == f"{before}swer:"


def test_prefill_is_cut_from_the_joint_tokens(whole_words: PreTrainedTokenizerBase) -> None:
    whole, encoder = tokenize(whole_words, train_on_end=False), Encoder(whole_words, PAPER)
    assert encoder.prefill(Q, A, 2) == (list(whole.input_ids[: whole.answer_start + 2]), " honey is")
    assert encoder.prefill(Q, A, 3) is not None
    assert encoder.prefill(Q, A, 4) is None, "nothing of the answer would be left to say"
    assert encoder.prefill(Q, A, 0) == (encoder.prompt(Q), "")


def test_report_counts_every_example(whole_words: PreTrainedTokenizerBase) -> None:
    pairs = (("what", A), ("what", ""), ("what is honey " * 9, A), ("what", "honey is " * 9), ("half \ud83d", A),
             ("what", "half \ud83d"))  # fmt: skip
    examples = [ForgetExample(prompt=prompt, answer=answer) for prompt, answer in pairs]
    kept, report = Encoder(whole_words, PAPER, 24, 6).examples(examples, train_on_end=False)
    assert [row.example_id for row in kept] == [0, 2, 3]
    assert (report.total, report.kept, report.prompts_shortened, report.answers_shortened) == (6, 3, 1, 1)
    assert report.left_out == {"answer without tokens": 1, "text is not valid Unicode": 2}
    for few, words in ((examples[:1] * 2, "none of 2 examples .*: 2.* is 5"), ([], "there were none")):
        with pytest.raises(DataError, match=words):
            Encoder(whole_words, PAPER, 5, 4).examples(few, train_on_end=True)


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
