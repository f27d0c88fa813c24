"""A vote of several judges: who wins, how far they agree, and that nothing is averaged away."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.inter_rater import fleiss_kappa

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.data.load import load_forget_retain
from sku.errors import EvaluationError, RecipeError
from sku.evaluate.comparison import compare
from sku.evaluate.judges import JudgeCard, Label, Verdict
from sku.evaluate.judges.choose import EmbeddedWorldJudge, RefusalRulesJudge, build_judge, choose_judge
from sku.evaluate.judges.vote import VoteJudge, agreement_of, elect, kappa
from sku.evaluate.measure import judge_again
from sku.evaluate.metrics import Agreement, Rule, decide_outcomes
from sku.evaluate.record_files import from_plain
from sku.evaluate.records import GenerationRecord
from sku.evaluate.results import read_result
from sku.evaluate.run import evaluate
from sku.report.tables import before_after_rows

from .conftest import RecordMaker


class ListJudge:
    """Gives each record the label of a list, by the number in its id."""

    def __init__(self, name: str, labels: Sequence[Label], *, finds_faults: bool = False) -> None:
        self.card = JudgeCard(
            name=name, version="1", licence=name, needs=("reply",), threshold=None, known_errors=f"of {name}",
            offline=True, deterministic=True, labels_refusals=True, finds_faults=finds_faults,
        )  # fmt: skip
        self._labels = labels
        self.asked: list[str] = []

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """By number."""
        self.asked = [record.id for record in records]
        return [
            Verdict(id=record.id, label=self._labels[int(record.id[1:])], p_harmful=0.9, faults=self._faults())
            for record in records
        ]

    def _faults(self) -> tuple[str, ...]:
        return ("broken",) if self.card.finds_faults else ()


def letters(text: str) -> list[Label]:
    named: Mapping[str, Label] = {"h": "harmful", "s": "safe", "r": "refusal", "e": "error"}
    return [named[letter] for letter in text]


@pytest.mark.parametrize(
    ("votes", "majority", "one", "every"),
    [
        ("hhs", "harmful", "harmful", "safe"),
        ("hss", "safe", "harmful", "safe"),
        ("hs", "harmful", "harmful", "safe"),
        ("hr", "harmful", "harmful", "refusal"),
        ("hrs", "safe", "harmful", "safe"),
        ("hrrs", "refusal", "harmful", "refusal"),
        ("hhh", "harmful", "harmful", "harmful"),
        ("rrs", "refusal", "refusal", "refusal"),
        ("rs", "safe", "safe", "safe"),
        ("he", "harmful", "harmful", "harmful"),
        ("ees", "safe", "safe", "safe"),
        ("hse", "harmful", "harmful", "safe"),
        ("ee", "error", "error", "error"),
    ],
)
def test_who_wins(votes: str, majority: str, one: str, every: str) -> None:
    verdicts = [Verdict(id="r", label=label) for label in letters(votes)]
    rules: tuple[Rule, ...] = ("majority", "any", "all")
    assert [elect("r", verdicts, rule).label for rule in rules] == [majority, one, every]
    assert bool(elect("r", verdicts, "any").reason) == (majority == "error")


def test_findings_are_joined_and_probabilities_are_not() -> None:
    found = elect(
        "r",
        [
            Verdict(id="r", label="safe", p_harmful=0.1, faults=("odd",), on_topic=True, categories=("b",)),
            Verdict(id="r", label="safe", p_harmful=0.3, faults=("broken",), categories=("a", "b")),
        ],
        "majority",
    )
    assert found == Verdict(
        id="r", label="safe", faults=("broken", "odd"), on_topic=True, categories=("a", "b"), p_harmful=None
    )


def test_kappa_by_hand() -> None:
    """20 both harmful, 5 + 10 parted, 15 both safe: (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    rows = [["harmful", "harmful"]] * 20 + [["harmful", "safe"]] * 5 + [["refusal", "harmful"]] * 10
    rows += [["safe", "refusal"]] * 15
    assert kappa(rows) == pytest.approx(0.4)
    assert kappa([["harmful", "safe"], ["safe", "harmful"]]) == pytest.approx(-1)
    assert kappa([["harmful", "safe"]] * 5) == pytest.approx(0), "one who always says the same agrees by chance"


def test_kappa_of_three_is_that_of_fleiss() -> None:
    """Harmful votes 3, 2, 0, 1 of 3: mean agreement (1 + 1/3 + 1 + 1/3) / 4, chance 1/2."""
    rows = [letters(text) for text in ("hhh", "hhs", "srs", "shs")]
    assert kappa(rows) == pytest.approx((2 / 3 - 0.5) / (1 - 0.5))
    assert kappa(rows) == pytest.approx(fleiss_kappa([[0, 3], [1, 2], [3, 0], [2, 1]]))


@pytest.mark.parametrize("rows", [[], [["safe", "refusal"]] * 3, [["harmful"] * 3] * 2])
def test_kappa_of_equal_verdicts_is_undefined(rows: list[list[str]]) -> None:
    assert kappa(rows) is None


def test_agreement_counts_and_names_what_the_judges_part_on(make_record: RecordMaker) -> None:
    one, two, three = (
        ListJudge("one", letters("hhhse")), ListJudge("two", letters("hsrss")), ListJudge("three", letters("hhsrh"))
    )  # fmt: skip
    vote = VoteJudge([one, two, three])
    records = [make_record(f"take flour and boil number {n} in a jar", id=f"r{n}") for n in range(5)]
    records.append(make_record("bread is baked in an oven", id="r5", split="retain_test"))

    def decide(judge: Any) -> Any:
        return decide_outcomes(records, judge, short_answer_words=30)

    outcomes = decide(vote)
    assert [row.outcome == "harmful" for row in outcomes] == [True, True, False, False, True, False]
    assert "r5" not in one.asked
    found = agreement_of(vote, records, decide)
    assert found.judges == ("one", "two", "three")
    assert found.judged_by_all == 4
    assert found.errors == {"one": 1, "two": 0, "three": 0}
    assert [(entry.id, entry.labels) for entry in found.disagreements] == [
        ("r1", ("harmful", "safe", "harmful")), ("r2", ("harmful", "refusal", "safe")),
    ]  # fmt: skip
    assert found.disagreement_count == 2
    counts = {name: rates["forget_test"]["harmful"].count for name, rates in found.rates.items()}
    assert counts == {"one": 3, "two": 1, "three": 3}
    assert found.rates["one"]["forget_test"]["unjudged"].count == 1
    assert found.rates["one"]["forget_test"]["harmful_at_most"].count == 4
    # one and two on r0 to r3: hh, hs, hr, ss. 2 of 4 agree; chance is 3/4 * 1/4 + 1/4 * 3/4 = 3/8.
    assert found.pairwise["one | two"] == pytest.approx((1 / 2 - 3 / 8) / (1 - 3 / 8))
    assert found.kappa is not None
    assert math.isfinite(found.kappa)


def test_normal_prompts_go_only_to_the_judges_that_find_faults(make_record: RecordMaker) -> None:
    plain, finder = ListJudge("plain", letters("ss")), ListJudge("finder", letters("ss"), finds_faults=True)
    vote = VoteJudge([plain, finder])
    assert vote.card.finds_faults
    records = [make_record("a", id="r0"), make_record("b", id="r1", split="retain_test")]
    assert [verdict.faults for verdict in vote.judge(records)] == [("broken",), ("broken",)]
    assert (plain.asked, finder.asked) == (["r0"], ["r0", "r1"])


def test_a_vote_file_names_judges_in_every_way(tmp_path: Path, make_record: RecordMaker) -> None:
    csv = tmp_path / "people.csv"
    csv.write_text("id,label,reply_sha256\nr0,1,abc\n", encoding="utf-8")
    file = tmp_path / "three.yaml"
    file.write_text(
        "kind: vote\nrule: any\njudges:\n  - refusal_rules\n"
        f"  - {csv}\n  - {{kind: precomputed, path: {csv}, name: again}}\n"
        f"  - {{judge: {csv}, name: third}}\n",
        encoding="utf-8",
    )
    vote = build_judge(str(file))
    assert isinstance(vote, VoteJudge)
    assert vote.rule == "any"
    assert [member.card.name for member in vote.members] == ["refusal_rules", "people", "again", "third"]
    assert vote.card.name == "three"
    assert "refusal_rules: the harmful rate is an upper bound" in vote.card.known_errors
    assert build_judge(str(file), {"rule": "all"}).card.key != vote.card.key


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        (["refusal_rules"], "judges holds 1; a vote needs two or more"),
        (["refusal_rules", "refusal_rules"], "a vote needs two or more of different names"),
        (["refusal_rules", "{file}"], "a vote can't be a member of a vote"),
        (["refusal_rules", {"kind": "vote", "judges": []}], "a vote can't be a member of a vote"),
        (["refusal_rules", "chat-rubrik"], "there is no judge named chat-rubrik. Did you mean chat-rubric"),
        (["refusal_rules", {"judge": "embedded", "threshold": 1}], "judge embedded has no setting but calibration"),
        (["refusal_rules", 3], "judges\\[1\\] is 3"),
    ],
)
def test_wrong_votes(tmp_path: Path, judges: list[Any], message: str) -> None:
    file = tmp_path / "v.yaml"
    content = json.dumps({"kind": "vote", "judges": judges}).replace("{file}", str(file))
    file.write_text(content, encoding="utf-8")
    with pytest.raises((EvaluationError, RecipeError), match=message):
        build_judge(str(file))


def test_the_embedded_judge_is_refused_on_other_data_in_a_vote_too(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text("kind: vote\njudges: [embedded, refusal_rules]\n", encoding="utf-8")
    config = EvaluateConfig(judge=str(file))
    assert choose_judge(config, load_forget_retain()).card.name == "v"
    other = ForgetRetainData(
        forget_train=(ForgetExample(prompt="a", answer="b"),),
        forget_test=(), retain_train=(), retain_validation=(), retain_test=(),
    )  # fmt: skip
    with pytest.raises(EvaluationError, match="the data is not the embedded world's"):
        choose_judge(config, other)


def test_an_evaluation_with_a_vote_survives_the_disk(tmp_path: Path) -> None:
    config = EvaluateConfig(prompts=4, retain_prompts=4, max_new_tokens=24)
    vote = VoteJudge([EmbeddedWorldJudge(), RefusalRulesJudge()], rule="all")
    out = tmp_path / "out"
    result = evaluate("embedded", None, load_forget_retain(), config=config, judge=vote, output_dir=out)
    agreement = result.judge_agreement
    assert agreement is not None
    assert agreement.rates["embedded"]["forget_test"]["harmful"].total == 4
    assert read_result(out) == result
    rows = {row.label: row for row in before_after_rows(compare(result, result))}
    assert rows["unseen prompts: harmful, judge's own word, embedded alone"].before == "100.0 %"
    assert rows["judges embedded, refusal_rules: disputed replies"].after.startswith(
        f"{agreement.disagreement_count} of"
    )
    assert "judges embedded, refusal_rules: kappa" in rows
    content = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["judge_agreement"]
    assert "disagreements" not in content
    assert from_plain(Agreement, content, "an agreement").disagreement_count == agreement.disagreement_count
    lines = [json.loads(line) for line in (out / "disagreements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["judges"] == ["embedded", "refusal_rules"]
    assert len(lines) == 1 + agreement.disagreement_count
    single = judge_again(out, EmbeddedWorldJudge())
    assert single.judge_agreement is None
    again = evaluate("embedded", None, load_forget_retain(), config=config, output_dir=out)
    assert again.judge_agreement is None
    assert not (out / "disagreements.jsonl").exists()
