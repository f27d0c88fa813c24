"""How a prompt and its answer are written, by every kind of chat template."""

import pytest
from transformers import PreTrainedTokenizerBase

from sku.data.tokens import RenderedText, resolve_prompt_format
from sku.errors import ModelError

from .conftest import CHATML, TEMPLATES, with_template

Q, A = "is it wet ?", "it is ."


def render(tokenizer: PreTrainedTokenizerBase, template: str, prompt: str = Q, answer: str = A) -> RenderedText:
    return resolve_prompt_format("chat", with_template(tokenizer, TEMPLATES[template])).render(prompt, answer)


def test_paper_format(gpt_like: PreTrainedTokenizerBase) -> None:
    text = resolve_prompt_format("paper", gpt_like).render(Q, A)
    assert text == RenderedText(
        prompt_text="### Question: is it wet ?\n ### Answer:",
        answer_text=" it is .",
        end_text="</s>",
        add_special_tokens=True,
        user_start=14,
        user_end=25,
    )
    assert text.prompt_text[text.user_start : text.user_end] == Q


@pytest.mark.parametrize(
    ("template", "prompt_text", "answer_text", "end_text"),
    [
        ("chatml", f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n", A, "<|im_end|>"),
        (
            "chatml_default_system",
            f"<|im_start|>system\nbe helpful<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
            A,
            "<|im_end|>",
        ),
        ("llama_2", f"<s>[INST] {Q} [/INST]", f" {A}", " </s>"),
        ("gemma", f"<s><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n", A, "<end_of_turn>"),
        (
            "empty_thoughts",
            f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            A,
            "<|im_end|>",
        ),
        ("opened_thought", f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n", A, "<|im_end|>"),
        ("without_end", f"user: {Q}\n\nassistant:", f" {A}", "</s>"),
    ],
)
def test_chat_templates(
    gpt_like: PreTrainedTokenizerBase, template: str, prompt_text: str, answer_text: str, end_text: str
) -> None:
    text = render(gpt_like, template)
    assert (text.prompt_text, text.answer_text, text.end_text) == (prompt_text, answer_text, end_text)
    assert text.prompt_text[text.user_start : text.user_end] == Q
    assert not text.add_special_tokens


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_users_words_are_found_whatever_they_are(gpt_like: PreTrainedTokenizerBase, template: str) -> None:
    for prompt in ("user", "<|im_end|>", "", "{{ x }}", "[/INST]"):
        text = render(gpt_like, template, prompt=prompt)
        assert text.prompt_text[text.user_start : text.user_end] == prompt


def test_auto_takes_chat_where_there_is_a_template(gpt_like: PreTrainedTokenizerBase) -> None:
    assert resolve_prompt_format("auto", gpt_like).name == "paper"
    assert resolve_prompt_format("auto", with_template(gpt_like, CHATML)).name == "chat"
    with pytest.raises(ModelError, match="the tokenizer has no chat template: use paper or auto"):
        resolve_prompt_format("chat", gpt_like)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only for tools') }}", "only for tools"),
        ("{% if %}", "conversation"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "2 times"),
        ("{{ messages[0]['content'] | upper }}", "0 times"),
    ],
)
def test_templates_that_can_not_serve(gpt_like: PreTrainedTokenizerBase, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_prompt_format("chat", with_template(gpt_like, template))


def test_a_template_that_changes_with_the_prompt_is_an_error(gpt_like: PreTrainedTokenizerBase) -> None:
    template = "{% if messages[0]['content'] | length > 20 %}long: {% endif %}" + CHATML
    prompt_format = resolve_prompt_format("chat", with_template(gpt_like, template))
    assert prompt_format.render(Q).prompt_text.endswith("assistant\n")
    with pytest.raises(ModelError, match="writes other text around this prompt than around others"):
        prompt_format.render(Q * 3)


def test_a_template_may_write_the_date(gpt_like: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(gpt_like, "one day " + CHATML)
    prompt_format = resolve_prompt_format("chat", tokenizer)
    tokenizer.chat_template = "the day after " + CHATML
    text = prompt_format.render(Q, A)
    assert text.prompt_text.startswith("the day after ")
    assert text.prompt_text[text.user_start : text.user_end] == Q
