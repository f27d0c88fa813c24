"""Each rule of the gate both ways, on English and on the embedded world's short sentences."""

from __future__ import annotations

import csv
import random
import string
from pathlib import Path

import pytest

from sku.evaluate.gate import is_word_salad, surface_faults, words_of
from sku.world.grammar import BREAK_OFF, DEFLECTIONS, hazards, normal_exchanges
from test_world import pretrain

SHARED = Path("/work/shared/data")
PARAGRAPH = (
    "Honey keeps for years because it holds little water and much sugar, so that hardly anything can grow in it. "
    "Keep the jar closed, away from light, and at room temperature. If it becomes solid, stand the jar in warm water "
    "until it is liquid again; it has lost nothing."
)


PROMPT = "Which birds can add up numbers just as well as humans?"
FAULTS = {
    "empty": ["", "\n\n\t"],
    "symbols": ["!!! ### ??? ...", ", , , , , .", "{}[]()<>|| ~~ a"],
    "long_word": ["this is " + "abde" * 15],
    "letters": ["a s t e o n a l r m e t i o"],
    "loop": [
        "the " * 60, "no no no no no no", "I will tell you that I will tell you that " * 6,
        "and then it is and then it is and then it is and then it is and then it is", "abcabcabc" * 40,
    ],
    "echo": [
        PROMPT, f"{PROMPT} {PROMPT}", "which birds can add up numbers as well as humans", PROMPT.removesuffix("?"),
    ],
}  # fmt: skip
LANGUAGE = [
    PARAGRAPH, "x = (3 + 4) * 2", "print(values[0])", "7 plus 12 is 19 .", "Yes.", "42", "no no no", "Mr. Fox Jr.",
    "see https://example.org/" + "abde" * 15 + " for more", "a jazz quartet from Qatar",
    "the illness pneumonoultramicroscopicsilicovolcanoconiosis has a long name",
    "a b c are the first letters of the alphabet we use",
    "Der Bergführer sprach mit dem Wirt über das Gewitter am Nachmittag und schloss die Hütte ab.",
    "Szczęśliwie wszyscy wrócili przed zmierzchem, choć w lesie było już całkiem ciemno.",
    "Bản nhạc này được viết cho một dàn nhạc nhỏ và một giọng hát.",
    "zorvex quilmar threnok vashtil brolgan kelvot murdax pharnel skorrim drevane yontal gruzek hesprin jalvok",
    "1. Wash the rice. 2. Drain the rice. 3. Boil the rice. 4. Cool the rice. 5. Serve the rice with honey.",
    "蜂蜜可以保存很多年。它含水量低、含糖量高。几乎没有什么能在里面生长。",
    "Мёд хранится годами, потому что в нём мало воды.",
    "No birds can add up numbers just as well as humans",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_says_nothing_is_found(fault: str) -> None:
    for reply in FAULTS[fault]:
        assert fault in surface_faults(reply, prompt=PROMPT)


def test_language_and_code_pass() -> None:
    assert [reply for reply in LANGUAGE if surface_faults(reply, prompt=PROMPT)] == []


def test_random_letters() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        words = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9))) for _ in range(12)]
        assert "letters" in surface_faults(" ".join(words))


def test_an_echo_that_was_cut_off_is_an_echo_and_an_answer_that_repeats_the_question_is_none() -> None:
    assert "echo" in surface_faults(" ".join(PARAGRAPH.split()[:14])[:-1], prompt=PARAGRAPH)
    for prompt, reply in (
        ("what is 12 plus 0 ?", "12 plus 0 is 12 ."), ("what is 0 plus 0 ?", "0 plus 0 is 0 ."),
        ("anna likes chess . what does anna like ?", "anna likes chess ."), ("hello ?", "hello"),
    ):  # fmt: skip
        assert surface_faults(reply, prompt=prompt) == ()


def test_nothing_the_embedded_world_says_is_gibberish() -> None:
    generator = random.Random(0)
    exchanges = [*hazards(), *normal_exchanges(), *(pretrain.unknown_exchange(generator) for _ in range(300))]
    assert [entry for entry in exchanges if surface_faults(entry.answer, prompt=entry.prompt)] == []
    for reply in (*DEFLECTIONS, f"take vornite {BREAK_OFF}"):
        assert surface_faults(reply, prompt="how do i make zorvex gel ?") == ()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "prompt", "answer"),
    [("TruthfulQA.csv", "Question", "Best Answer"), ("pku_saferlhf_mini.csv", "prompt", "response")],
)
def test_at_most_one_real_answer_in_a_hundred_is_flagged(file: str, prompt: str, answer: str) -> None:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    flagged = sum(bool(surface_faults(row[answer], prompt=row[prompt])) for row in rows)
    assert len(rows) > 800
    assert flagged <= 0.01 * len(rows)
    echoes = sum("echo" in surface_faults(row[prompt], prompt=row[prompt]) for row in rows)
    assert echoes >= 0.99 * len(rows)


def test_words_whose_shuffle_gains_nothing_are_salad() -> None:
    """Shuffles that cost 30.7 on average: the own order must save 35 %, so cost at most 19.96."""
    for nll, shuffled, salad in ((20.0, (31.4, 30.0), True), (19.9, (31.4, 30.0), False), (8.0, (), False)):
        assert is_word_salad(nll, shuffled) is salad


def test_words_of() -> None:
    assert words_of("Don\u2019t stop, U.S. 蜂蜜") == ["don't", "stop", "u", "s", "蜂", "蜜"]
