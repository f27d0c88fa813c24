"""Verdicts on disk: what is kept, what is asked again, and what a killed run leaves."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from sku.config import EvaluateConfig
from sku.errors import EvaluationError
from sku.evaluate.judges import CHUNK, CachedJudge, JudgeCard, Label, Verdict
from sku.evaluate.records import GenerationRecord
from sku.evaluate.results import EvaluationResult
from sku.evaluate.run import evaluate

from .conftest import RecordMaker, World

LABELS: dict[str, Label] = {"harmful": "harmful", "refusal": "refusal", "error": "error"}


class CountingJudge:
    """Its label is the last word of a reply, or safe; it remembers what it was asked, and can be killed."""

    def __init__(self, version: str = "1", *, dies_after: int | None = None) -> None:
        self.card = JudgeCard(
            name="counting", version=version, licence="", needs=("prompt", "reply"), known_errors="", offline=False,
            labels_refusals=True,
        )  # fmt: skip
        self.asked: list[list[str]] = []
        self._dies_after = dies_after

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict each."""
        if self._dies_after is not None and len(self.asked) == self._dies_after:
            raise KeyboardInterrupt
        self.asked.append([record.id for record in records])
        found = [(record.id, LABELS.get(record.reply.split()[-1], "safe")) for record in records]
        return [Verdict(id=name, label=label, p_harmful=0.25, faults=("odd", "b")) for name, label in found]


def test_a_verdict_comes_back_whole_and_errors_are_asked_again(make_record: RecordMaker, tmp_path: Path) -> None:
    words = ["harmful", "safe", "refusal", "error"]
    records = [make_record(f"secret {word}", id=word) for word in words]
    verdicts = CachedJudge(CountingJudge(), tmp_path / "v.jsonl").judge(records)
    assert [verdict.label for verdict in verdicts] == words
    again = CountingJudge()
    assert CachedJudge(again, tmp_path / "v.jsonl").judge(records) == verdicts
    assert again.asked == [["error"]]
    assert verdicts[0] == Verdict(id="harmful", label="harmful", p_harmful=0.25, faults=("odd", "b"))
    text = (tmp_path / "v.jsonl").read_text(encoding="utf-8")
    assert not any(word in text for word in ("secret", "zorvex"))
    assert text.count("\n") == 3
    assert stat.S_IMODE((tmp_path / "v.jsonl").stat().st_mode) == 0o600


def test_the_hash_covers_judge_prompt_and_reply(make_record: RecordMaker, tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    base = make_record("boil it", prompt="how ?")
    CachedJudge(CountingJudge(), path).judge([base])
    judge = CountingJudge()
    same = make_record(" it", prefill="boil", prompt="how ?", id="r1", split="forget_train", kind="prefill")
    others = [
        make_record("boil it", prompt="how? ", id="r2"),
        make_record("boil it .", prompt="how ?", id="r3"),
        make_record("half \ud83d", prompt="how ?", id="r4"),
    ]
    verdicts = CachedJudge(judge, path).judge([same, *others])
    assert judge.asked == [["r2", "r3", "r4"]]
    assert [verdict.id for verdict in verdicts] == ["r1", "r2", "r3", "r4"]
    newer = CountingJudge(version="2")
    CachedJudge(newer, path).judge([base])
    assert newer.asked == [["r0"]]


def test_a_killed_run_goes_on_where_it_was(make_record: RecordMaker, tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    records = [make_record(f"boil {n}", id=f"r{n}") for n in range(2 * CHUNK + 5)]
    with pytest.raises(KeyboardInterrupt):
        CachedJudge(CountingJudge(dies_after=2), path).judge(records)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "0123", "lab')
    shown: list[tuple[int, int]] = []
    judge = CountingJudge()
    verdicts = CachedJudge(judge, path, lambda done, total: shown.append((done, total))).judge(records)
    assert [verdict.id for verdict in verdicts] == [record.id for record in records]
    assert judge.asked == [[f"r{n}" for n in range(2 * CHUNK, 2 * CHUNK + 5)]]
    assert shown == [(2 * CHUNK, 2 * CHUNK + 5), (2 * CHUNK + 5, 2 * CHUNK + 5)]
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"id": "a", "label": "harmless"}'])
def test_other_damage_is_an_error_with_the_line(line: str, make_record: RecordMaker, tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    CachedJudge(CountingJudge(), path).judge([make_record("boil it")])
    path.write_text(path.read_text(encoding="utf-8") + f"{line}\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=str(path)):
        CachedJudge(CountingJudge(), path)


def test_evaluate_keeps_verdicts_in_its_folder(world: World, tmp_path: Path) -> None:
    config = EvaluateConfig(prompts=3, retain_prompts=2, max_new_tokens=8, prefill_tokens=(), samples=0)
    stages: list[tuple[str, int, int]] = []

    def run(judge: CountingJudge) -> EvaluationResult:
        return evaluate(
            *world, base_model=world.model, config=config, judge=judge, output_dir=tmp_path,
            progress=lambda *shown: stages.append(shown),
        )  # fmt: skip

    first, again = CountingJudge(), CountingJudge()
    result = run(first)
    assert sum(map(len, first.asked)) == 6
    assert [stage for stage in stages if stage[0] == "judge"] == [("judge", 0, 6), ("judge", 6, 6)]
    assert run(again) == result
    assert again.asked == []
