"""Borders are checked against the bytes that each token stands for, not against the code that finds them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sku.data.tokens import Encoder, RenderedText, TokenSpans, locate_tokens, resolve_prompt_format

from .conftest import BUILDERS, TEMPLATES, tokenizer_of, with_template

# Spaces at every border, digits, line ends, letters of several bytes, and the very sign byte-level uses for a space.
LETTERS = list("honey is ### Answer: .,\n\t 0\u00e9\u96e8\U0001f600\u0120\u2581")
WORDS = ["honey", " honey", " is", "Answer", ": ", " ", "brown .", "\n"]
TEXT = st.one_of(
    st.text(alphabet=st.sampled_from(LETTERS), max_size=25),
    st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
)
BYTE_LEVEL = [name for name in BUILDERS if name.startswith("byte_level")]


def rendered(
    prompt: str, answer: str, end: str = "", *, user: tuple[int, int] = (0, 0), special: bool = True
) -> RenderedText:
    return RenderedText(
        prompt_text=prompt,
        answer_text=answer,
        end_text=end,
        add_special_tokens=special,
        user_start=user[0],
        user_end=user[1],
    )


def byte_spans(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """True byte range of each token of a byte-level tokenizer, from the length of its piece."""
    special = set(tokenizer.all_special_ids)
    spans, position = [], 0
    for token_id, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        length = 0 if token_id in special and piece == "<s>" and position == 0 else len(piece)
        spans.append((position, position + length))
        position += length
    return spans


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(deadline=None, max_examples=150)
@given(prompt=TEXT, answer=TEXT, user=st.tuples(st.integers(0, 25), st.integers(0, 25)))
def test_byte_level_borders_are_exact(name: str, prompt: str, answer: str, user: tuple[int, int]) -> None:
    tokenizer = tokenizer_of(name)
    low, high = sorted(min(place, len(prompt)) for place in user)
    spans = locate_tokens(rendered(prompt, answer, user=(low, high)), tokenizer, with_end=False)
    ranges = byte_spans(spans.ids, tokenizer)
    border = len(prompt.encode())
    assert [end > border for _, end in ranges] == [index >= spans.answer_start for index in range(len(ranges))]
    assert spans.end_start == len(spans.ids)
    before, behind = len(prompt[:low].encode()), len(prompt[:high].encode())
    for index in range(spans.user_start, spans.user_end):
        start, end = ranges[index]
        # A space before a word may go with the word.
        assert start >= before - (prompt[:low].endswith(" "))
        assert end <= behind


@settings(deadline=None, max_examples=150)
@given(prompt=TEXT, answer=TEXT)
def test_metaspace_borders_are_exact(prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of("metaspace")
    prompt, answer = prompt.replace("\u2581", "-"), answer.replace("\u2581", "-")
    spans = locate_tokens(rendered(prompt, answer), tokenizer, with_end=False)
    pieces = ["" if piece == "<s>" else piece for piece in tokenizer.convert_ids_to_tokens(spans.ids)]
    lengths = [1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode()) for piece in pieces]
    assert sum(lengths) == len((prompt + answer).encode())
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    assert [end > len(prompt.encode()) for end in ends] == [index >= spans.answer_start for index in range(len(ends))]


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def assert_answer(spans: TokenSpans, text: RenderedText, tokenizer: PreTrainedTokenizerBase) -> None:
    """The answer's tokens hold all of it, and its first token holds some of it."""
    ids = spans.ids[spans.answer_start : spans.end_start]
    assert decoded(ids, tokenizer).endswith(text.answer_text.strip())
    assert not decoded(ids[1:], tokenizer).endswith(text.answer_text)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["byte_level", "byte_level_bos_eos", "metaspace", "metaspace_prepend"])
def test_chat_templates_in_every_tokenizer(name: str, template: str) -> None:
    tokenizer = with_template(tokenizer_of(name), TEMPLATES[template])
    prompt_format = resolve_prompt_format("chat", tokenizer)
    text = prompt_format.render("what is honey ?", "honey is sweet .")
    spans = locate_tokens(text, tokenizer, with_end=True)
    if name.startswith("byte_level"):  # In the others a token may hold the border.
        assert Encoder(tokenizer, prompt_format).prompt("what is honey ?") == spans.ids[: spans.answer_start]
    assert spans.ids.count(1) == (1 if template in ("llama_2", "gemma") else 0), "BOS twice or missing"
    assert_answer(spans, text, tokenizer)
    assert decoded(spans.ids[spans.end_start :], tokenizer).strip() == text.end_text.strip()
    words = decoded(spans.ids[spans.user_start : spans.user_end], tokenizer).strip()
    assert words in ("what is honey ?", "what is honey", "hat is honey ?")
