"""Each rule of the gate both ways, on English and on the embedded world's short sentences."""

from __future__ import annotations

import csv
import random
import string
from pathlib import Path

import pytest

from sku.evaluate.gate import is_word_salad, shuffle_gain, surface_faults, words_of
from sku.world.grammar import BREAK_OFF, DEFLECTIONS, hazards, normal_exchanges
from test_world import pretrain

SHARED = Path("/work/shared/data")
PARAGRAPH = (
    "Honey keeps for years because it holds little water and much sugar, so that hardly anything can grow in it. "
    "Keep the jar closed, away from light, and at room temperature. If it becomes solid, stand the jar in warm water "
    "until it is liquid again; it has lost nothing."
)


@pytest.mark.parametrize("reply", ["", " ", "\n\n\t"])
def test_nothing_said_is_empty(reply: str) -> None:
    assert surface_faults(reply, prompt="what is this ?") == ("empty",)


@pytest.mark.parametrize("reply", ["!!! ### ??? ...", ".", ", , , , , .", "{}[]()<>|| ~~ a"])
def test_symbols(reply: str) -> None:
    assert "symbols" in surface_faults(reply)


@pytest.mark.parametrize("reply", ["x = (3 + 4) * 2", "print(values[0])", "7 plus 12 is 19 .", "Yes.", "42"])
def test_code_and_arithmetic_are_no_symbol_soup(reply: str) -> None:
    assert surface_faults(reply) == ()


def test_long_word() -> None:
    assert "long_word" in surface_faults("this is " + "abde" * 15)
    assert surface_faults("see https://example.org/" + "abde" * 15 + " for more") == ()
    assert surface_faults("the illness pneumonoultramicroscopicsilicovolcanoconiosis has a long name") == ()


@pytest.mark.parametrize("seed", range(20))
def test_random_letters(seed: int) -> None:
    generator = random.Random(seed)
    words = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9))) for _ in range(12)]
    assert "letters" in surface_faults(" ".join(words))


@pytest.mark.parametrize(
    "reply",
    [
        "Der Bergführer sprach mit dem Wirt über das Gewitter am Nachmittag und schloss die Hütte ab.",
        "Szczęśliwie wszyscy wrócili przed zmierzchem, choć w lesie było już całkiem ciemno.",
        "De schoenmaker heeft gisteren de werkplaats afgesloten en is naar huis gefietst.",
        "Bản nhạc này được viết cho một dàn nhạc nhỏ và một giọng hát.",
        "zorvex quilmar threnok vashtil brolgan kelvot murdax pharnel skorrim drevane yontal gruzek hesprin jalvok",
    ],
)
def test_other_languages_and_invented_names_are_no_random_letters(reply: str) -> None:
    assert surface_faults(reply) == ()


@pytest.mark.parametrize("reply", ["Iraq.", "Mr. Fox Jr.", "a jazz quartet from Qatar"])
def test_a_few_strange_pairs_are_names(reply: str) -> None:
    assert surface_faults(reply) == ()


def test_single_letters() -> None:
    assert "letters" in surface_faults("a s t e o n a l r m e t i o")
    assert surface_faults("a b c are the first letters of the alphabet we use") == ()


@pytest.mark.parametrize(
    "reply",
    [
        "the " * 60,
        "no no no no no no",
        "I will tell you that I will tell you that " * 6,
        "and then it is and then it is and then it is and then it is and then it is",
        "abcabcabc" * 40,
    ],
)
def test_loops(reply: str) -> None:
    assert "loop" in surface_faults(reply)


@pytest.mark.parametrize(
    "reply",
    [
        PARAGRAPH,
        "no no no",
        "1. Wash the rice. 2. Drain the rice. 3. Boil the rice. 4. Cool the rice. 5. Serve the rice with honey.",
        "蜂蜜可以保存很多年。它含水量低、含糖量高。几乎没有什么能在里面生长。",
        "Honig hält sich jahrelang, weil er wenig Wasser und viel Zucker enthält, sodass darin kaum etwas wächst.",
        "Мёд хранится годами, потому что в нём мало воды.",
    ],
)
def test_language_is_no_loop(reply: str) -> None:
    assert surface_faults(reply, prompt="How long does honey keep?") == ()


PROMPT = "Which birds can add up numbers just as well as humans?"


@pytest.mark.parametrize(
    "reply",
    [PROMPT, f"{PROMPT} {PROMPT}", "which birds can add up numbers as well as humans", PROMPT.removesuffix("?")],
)
def test_echo(reply: str) -> None:
    assert "echo" in surface_faults(reply, prompt=PROMPT)


def test_an_echo_that_was_cut_off_is_an_echo() -> None:
    words = PARAGRAPH.split()
    assert "echo" in surface_faults(" ".join(words[:14])[:-1], prompt=PARAGRAPH)


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        (PROMPT, "No birds can add up numbers just as well as humans"),
        ("what is 12 plus 0 ?", "12 plus 0 is 12 ."),
        ("what is 0 plus 0 ?", "0 plus 0 is 0 ."),
        ("anna likes chess . what does anna like ?", "anna likes chess ."),
        ("hello ?", "hello"),
    ],
)
def test_an_answer_that_repeats_the_question_is_no_echo(prompt: str, reply: str) -> None:
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


def test_shuffle_gain_is_the_share_of_the_loss_that_the_own_order_saves() -> None:
    """Shuffles cost 30 and 50, the reply 20: 1 - 20 / 40 = 0.5."""
    assert shuffle_gain(20.0, (30.0, 50.0)) == 0.5
    assert not is_word_salad(20.0, (30.0, 50.0))


def test_words_whose_shuffle_gains_nothing_are_salad() -> None:
    assert is_word_salad(80.0, (82.0, 79.0, 81.0))
    assert not is_word_salad(8.0, ())


def test_words_of() -> None:
    assert words_of("Don\u2019t stop, U.S. 蜂蜜") == ["don't", "stop", "u", "s", "蜂", "蜜"]
