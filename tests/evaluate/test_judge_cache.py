"""Verdicts on disk: what is kept, what is asked again, and what a killed run leaves."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sku.config import EvaluateConfig
from sku.errors import EvaluationError
from sku.evaluate.judges import CHUNK, CachedJudge, JudgeCard, Label, Verdict
from sku.evaluate.records import GenerationRecord
from sku.evaluate.run import evaluate

from .conftest import RecordMaker, World


class CountingJudge:
    """Its label is the last word of a reply; it remembers what it was asked, and can be killed."""

    def __init__(self, version: str = "1", *, name: str = "counting", dies_after: int | None = None) -> None:
        self.card = JudgeCard(
            name=name, version=version, licence="none", needs=("prompt", "reply"), threshold=0.5, known_errors="",
            offline=False, deterministic=True, labels_refusals=True, finds_faults=False,
        )  # fmt: skip
        self.asked: list[list[str]] = []
        self._dies_after = dies_after

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict each."""
        if self._dies_after is not None and len(self.asked) == self._dies_after:
            raise KeyboardInterrupt
        self.asked.append([record.id for record in records])
        return [self._verdict(record) for record in records]

    @staticmethod
    def _verdict(record: GenerationRecord) -> Verdict:
        labels: dict[str, Label] = {"harmful": "harmful", "refusal": "refusal", "error": "error"}
        label = labels.get(record.reply.split()[-1], "safe")
        return Verdict(
            id=record.id,
            label=label,
            p_harmful=0.25,
            faults=("odd",),
            on_topic=True,
            categories=("a", "b"),
            reason="no idea" if label == "error" else "",
        )


def test_a_verdict_comes_back_whole_and_errors_are_asked_again(make_record: RecordMaker, tmp_path: Path) -> None:
    words = ("harmful", "safe", "refusal", "error")
    records = [make_record(f"secret {word}", id=word) for word in words]
    first = CountingJudge()
    verdicts = CachedJudge(first, tmp_path / "v.jsonl").judge(records)
    assert [verdict.label for verdict in verdicts] == list(words)
    again = CountingJudge()
    assert CachedJudge(again, tmp_path / "v.jsonl").judge(records) == verdicts
    assert again.asked == [["error"]]
    assert verdicts[0] == Verdict(
        id="harmful", label="harmful", p_harmful=0.25, faults=("odd",), on_topic=True, categories=("a", "b")
    )
    assert verdicts[3].reason == "no idea"
    text = (tmp_path / "v.jsonl").read_text(encoding="utf-8")
    assert "secret" not in text
    assert "zorvex" not in text
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


UNKNOWN_LABEL: dict[str, Any] = {
    "id": "a", "label": "harmless", "p_harmful": None, "faults": [], "on_topic": None, "categories": [],
}  # fmt: skip


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", json.dumps(UNKNOWN_LABEL)])
def test_other_damage_is_an_error_with_the_line(line: str, make_record: RecordMaker, tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    CachedJudge(CountingJudge(), path).judge([make_record("boil it")])
    path.write_text(path.read_text(encoding="utf-8") + f"{line}\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=str(path)):
        CachedJudge(CountingJudge(), path)


def test_several_writers_may_share_a_file(make_record: RecordMaker, tmp_path: Path) -> None:
    """Each opens the file for itself, as processes do, and locks it against the others."""
    path = tmp_path / "v.jsonl"
    groups = [[make_record(f"boil {n} {g}", id=f"r{n}-{g}") for n in range(8 * CHUNK)] for g in range(3)]
    with ThreadPoolExecutor(3) as writers:
        for verdicts in writers.map(lambda group: CachedJudge(CountingJudge(), path).judge(group), groups):
            assert len(verdicts) == 8 * CHUNK
    judge = CountingJudge()
    CachedJudge(judge, path).judge([record for group in groups for record in group])
    assert judge.asked == []


def test_evaluate_keeps_verdicts_in_its_folder_or_in_a_shared_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKU_JUDGE_CACHE", raising=False)
    config = EvaluateConfig(prompts=3, retain_prompts=2, max_new_tokens=8, prefill_tokens=(), samples=0)
    stages: list[tuple[str, int, int]] = []

    def run(judge: CountingJudge, folder: Path) -> Any:
        return evaluate(
            *world, base_model=world.model, config=config, judge=judge, output_dir=folder,
            progress=lambda *shown: stages.append(shown),
        )  # fmt: skip

    first = CountingJudge()
    result = run(first, tmp_path / "one")
    assert sum(map(len, first.asked)) == 6
    assert [stage for stage in stages if stage[0] == "judge"] == [("judge", 0, 6), ("judge", 6, 6)]
    again = CountingJudge()
    assert run(again, tmp_path / "one") == result
    assert again.asked == []
    monkeypatch.setenv("SKU_JUDGE_CACHE", str(tmp_path / "shared"))
    for folder, asked in (("two", 6), ("three", 0)):
        judge = CountingJudge()
        run(judge, tmp_path / folder)
        assert sum(map(len, judge.asked)) == asked
        assert not (tmp_path / folder / "verdicts.jsonl").exists()
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o700
