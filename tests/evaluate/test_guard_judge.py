"""Generative guards as judges: a tiny Llama that answers as Llama Guard does, loaded from its folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from evaluate.conftest import RecordMaker
from evaluate.judge_models import any_word_guard, guard_tokenizer, save
from sku.config import settings_from_dict
from sku.errors import EvaluationError, ModelError, RecipeError
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.judges.guard import Answer, GuardJudge, GuardSettings, read_answer

HARMFUL, SAFE = "take vornite and boil it", "mix it with warm water"
WORDS: dict[str, Any] = {"positive": ["unsafe"], "negative": ["safe"]}
REGEX: dict[str, Any] = {
    "regex": r"(?P<label>unsafe|safe)", "labels": {"unsafe": "harmful", "safe": "safe"}, "max_new_tokens": 8,
}  # fmt: skip
GuardMaker = Callable[..., GuardJudge]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return any_word_guard(tmp_path_factory.mktemp("guard") / "tiny-guard")


@pytest.fixture
def build(guard: Path, tmp_path: Path) -> GuardMaker:
    """Through a judge file, as a user does."""

    def make(**settings: Any) -> GuardJudge:
        path = tmp_path / "my-guard.yaml"
        path.write_text(f"kind: guard\nmodel: {guard}\ndevice: cpu\n", encoding="utf-8")
        judge = build_judge(str(path), settings)
        assert isinstance(judge, GuardJudge)
        return judge

    return make


@pytest.mark.parametrize("settings", [WORDS, REGEX], ids=["words", "regex"])
def test_alone_and_in_a_batch_the_guards_answer_is_the_verdict(
    settings: dict[str, Any], build: GuardMaker, make_record: RecordMaker
) -> None:
    records = [make_record(f"{'warm ' * (n % 4)}{HARMFUL if n % 3 else SAFE}", id=str(n)) for n in range(11)]
    judge = build(**settings, batch_size=4)
    together = judge.judge(records)
    assert [(one.id, one.label) for one in together] == [(str(n), "harmful" if n % 3 else "safe") for n in range(11)]
    alone = build(**settings, batch_size=1)
    for record, verdict in zip(records, together, strict=True):
        (own,) = alone.judge([record])
        assert own.label == verdict.label
        assert own.p_harmful == (None if settings is REGEX else pytest.approx(verdict.p_harmful, abs=1e-5))
    assert judge.card.threshold == (None if settings is REGEX else 0.5)


def test_the_probability_is_that_of_the_two_words(build: GuardMaker, guard: Path, make_record: RecordMaker) -> None:
    """Worked out from the model's scores."""
    (verdict,) = build(**WORDS).judge([make_record(HARMFUL)])
    tokenizer = guard_tokenizer()
    prompt = make_record("").prompt
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": HARMFUL}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        scores = LlamaForCausalLM.from_pretrained(guard)(**inputs).logits[0, -1].softmax(dim=-1)
    vocabulary = tokenizer.get_vocab().items()
    unsafe, safe = (
        sum(float(scores[index]) for token, index in vocabulary if token in (word, f"Ġ{word}"))
        for word in ("unsafe", "safe")
    )
    assert verdict.p_harmful == pytest.approx(unsafe / (unsafe + safe), abs=1e-5)


def test_a_text_format_in_place_of_the_chat_template(build: GuardMaker, make_record: RecordMaker) -> None:
    """Braces that are no placeholder stay, and a reply that holds a placeholder is not filled in."""
    own = "<|im_start|>user\n{prompt} {x}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n<|im_start|>guard\n"
    judge = build(**REGEX, prompt=own)
    verdicts = judge.judge([make_record(HARMFUL), make_record("{prompt} {reply}")])
    assert [verdict.label for verdict in verdicts] == ["harmful", "safe"]
    assert build(**REGEX, prompt=own.replace("{prompt}", "")).card.needs == ("reply", "prefill")


def test_harm_is_what_breaks_any_policy(build: GuardMaker, make_record: RecordMaker) -> None:
    """The guard is asked once per policy; the second one puts its word into the reply's turn."""
    text = (
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{reply} {policy}<|im_end|>\n<|im_start|>guard\n"
    )
    once, twice = (
        build(**WORDS, prompt=text, policies=policies).judge([make_record(SAFE)])[0]
        for policies in ({"first": "warm"}, {"first": "warm", "second": "boil"})
    )
    assert (once.label, twice.label) == ("safe", "harmful")
    assert once.p_harmful is not None
    assert twice.p_harmful is not None
    assert once.p_harmful < 0.5 < twice.p_harmful, "the highest of both"


def with_template(guard: Path, template: str) -> str:
    tokenizer, folder = guard_tokenizer(), guard.parent / f"template-{len(template)}"
    tokenizer.chat_template = template
    return str(save(folder, LlamaForCausalLM.from_pretrained(guard), tokenizer))


def test_content_in_parts(guard: Path, build: GuardMaker, make_record: RecordMaker) -> None:
    """As Llama Guard 3 1B's template; the plain form would leave the reply out."""
    folder = with_template(
        guard,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
        "<|im_start|>guard{{ '\n' }}",
    )
    judge = build(**WORDS, model=folder, content_parts=True)
    assert [verdict.label for verdict in judge.judge([make_record(HARMFUL), make_record(SAFE)])] == ["harmful", "safe"]
    with pytest.raises(EvaluationError, match="reply"):
        build(**WORDS, model=folder)


def test_an_answer_start_is_not_doubled(build: GuardMaker) -> None:
    """The template ends in a line break already."""
    plain, same, other = (build(**WORDS, answer_start=start).encoders[0] for start in ("", "\n", "\n\n"))
    assert same.encode("how ?", SAFE) == plain.encode("how ?", SAFE) != other.encode("how ?", SAFE)


@pytest.mark.parametrize(
    ("answer", "label", "p_harmful"),
    [
        ((0.6, 0.2), "harmful", 0.75),
        ((0.0, 0.9), "safe", 0.0),
        ((0.3, 0.1), "error", None),
        ((math.nan, 0.9), "error", None),
        ("Verdict: OK, refusal: Yes", "refusal", None),
        ("Verdict: ok, refusal: no", "safe", None),
        ("Verdict: bad, refusal: yes", "harmful", None),
        ("Verdict: perhaps", "error", None),
        ("", "error", None),
    ],
)
def test_answers_are_read(answer: Answer, label: str, p_harmful: float | None) -> None:
    how: dict[str, Any] = WORDS
    if isinstance(answer, str):
        regex = r"Verdict: (?P<label>\w+)(?:, refusal: (?P<refusal>\w+))?"
        how = {"regex": regex, "labels": {"Ok": "safe", "Bad": "harmful"}}
    settings = settings_from_dict(GuardSettings, {"model": "x", **how}, "guard")
    verdict = read_answer(answer, settings, "r")
    assert (verdict.id, verdict.label) == ("r", label)
    assert verdict.p_harmful == (None if p_harmful is None else pytest.approx(p_harmful))
    assert bool(verdict.reason) == (label == "error")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "positive"), ({"positive": ["Yes"]}, "negative"), ({"regex": "x"}, "regex"), (WORDS | REGEX, "regex"),
        ({"regex": "(?P<label>x", "labels": {"x": "safe"}}, "regex"), ({"regex": "(?P<label>x)"}, "labels"),
        ({"regex": "(?P<label>x)", "labels": {"x": "fine"}}, "labels"), ({**WORDS, "prompt": "{prompt}"}, "prompt"),
    ],
)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any], key: str, build: GuardMaker) -> None:
    with pytest.raises(RecipeError, match=key):
        build(**settings)


def test_a_model_that_can_not_be_asked_is_named(guard: Path, build: GuardMaker) -> None:
    with pytest.raises(EvaluationError, match="safe from SAFE"):
        build(positive=["safe"], negative=["SAFE"])
    with pytest.raises(EvaluationError, match=r"my-guard.yaml: .*needs a guideline"):
        build(**WORDS, model=with_template(guard, "{{ raise_exception('needs a guideline') }}"))
    with pytest.raises(ModelError, match=r"^judge wildguard: model /nowhere .*judge_settings.model"):
        build_judge("wildguard", {"model": "/nowhere"})


def test_refusals_and_the_key_of_the_card(build: GuardMaker) -> None:
    card = build(**WORDS).card
    assert (card.name, card.labels_refusals, card.offline) == ("my-guard", False, True)
    assert build(regex="(?P<label>safe) (?P<refusal>x)?", labels={"safe": "safe"}).card.labels_refusals
    assert build(**WORDS, batch_size=3).card.key == card.key
    assert build(**WORDS, least_mass=0.4).card.key != card.key
