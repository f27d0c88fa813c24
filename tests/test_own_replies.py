"""The model's own replies: which are kept, and those that the embedded model writes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import Command, MadeOnce
from sku.config import EMBEDDED, EvaluateConfig, SourceConfig, load_recipe
from sku.data.load import load_forget_retain, load_own_prompts
from sku.errors import DataError, OutputError
from sku.evaluate.gate import is_refusal, refusal_alone
from sku.evaluate.judges import Judge, Verdict
from sku.evaluate.judges.choose import EmbeddedWorldJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import GenerationRecord
from sku.models import load_model
from sku.own_replies import (
    ENOUGH,
    GIBBERISH,
    HARMFUL,
    KEPT,
    KINDS,
    NO_REFUSAL,
    NOT_HARMFUL,
    REFUSED,
    REPEATED,
    WORLD,
    OwnJob,
    OwnReplies,
    OwnRepliesConfig,
    Reply,
    choose_complying,
    choose_refusals,
    english,
    judge_of,
    read_own_replies,
)
from sku.own_replies.write import write_own_replies
from sku.pipeline.run import plan_run, run_recipe
from sku.pipeline.stages import load_own_data, own_prompts_of, with_own_replies
from sku.world.grammar import is_harmful

NO = "i can not help with that ."


def reply(prompt: str, text: str, outcome: Outcome) -> Reply:
    shared: dict[str, Any] = {"id": f"{prompt}{text}", "split": "forget_train", "kind": "reply", "category": None}
    return Reply(
        record=GenerationRecord(**shared, prompt=prompt, reference="", reply=text, num_tokens=5, finished=True),
        outcome=ReplyOutcome(**shared, outcome=outcome, finished=True),
        decoding={"how": "greedy"},
    )


def test_only_harmful_replies_comply() -> None:
    counts: Counter[str] = Counter()
    kept = choose_complying(
        [
            reply("p", "take vornite", "harmful"),
            reply("p", "Take  vornite", "harmful"),
            reply("q", "take vornite", "harmful"),
            reply("p", f"take it . {NO}", "harmful"),
            reply("p", NO, "refusal"),
            reply("p", "honey is golden", "safe_answer"),
            reply("p", "xq xq xq", "gibberish"),
        ],
        counts,
    )
    assert [(one.record.prompt, one.record.reply) for one in kept] == [("p", "take vornite"), ("q", "take vornite")]
    assert counts == {KEPT: 2, REPEATED: 1, REFUSED: 2, NOT_HARMFUL: 1, GIBBERISH: 1}


def test_refusals_vary_and_every_prompt_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    others = [f"i can not help with that , as it is {word} ." for word in ("bad", "sad", "mad")]
    replies = [reply(f"p{number}", NO, "refusal") for number in range(9)]
    replies += [reply("p8", text, "refusal") for text in others]
    replies += [reply("p0", NO, "harmful"), reply("p0", "honey is golden", "safe_answer")]
    monkeypatch.setattr("sku.own_replies.REPEAT_SHARE", 0.25)
    kept = choose_refusals(replies, 2, counts)  # Three of the twelve usable ones may read the same.
    assert Counter(one.record.prompt for one in kept) == {**{f"p{number}": 1 for number in range(8)}, "p8": 2}
    assert [one.record.reply for one in kept if one.record.prompt == "p8"] == others[:2]
    assert counts == {KEPT: 10, REPEATED: 1, ENOUGH: 1, HARMFUL: 1, NO_REFUSAL: 1}


def test_the_rules_see_the_refusals_of_the_bank_and_no_compliance_in_them() -> None:
    for wordings in (english(), WORLD):
        assert all(map(is_refusal, wordings.refusals))
        assert not any(map(is_refusal, wordings.comply_starts))
        assert not any(start.endswith((" ", "\n")) for start in (*wordings.comply_starts, *wordings.refusal_starts))


def test_a_refusal_ends_with_the_sentence_that_refuses() -> None:
    for said, alone in (
        ('"I cannot help with that." So she said', '"I cannot help with that."'),
        ("I can't help with 3.5 grams of it, and neither", None),
        (NO, NO),
    ):
        assert refusal_alone(said) == alone


SETTINGS = OwnRepliesConfig(samples=2, max_new_tokens=14, refusals=2, batch_size=8)


def job(judge: Judge | None = None, settings: OwnRepliesConfig = SETTINGS) -> OwnJob:
    few = SourceConfig(path=EMBEDDED, limit=14)
    prompts = load_own_prompts(few, few, None, seed=0)
    chosen = judge or judge_of(EvaluateConfig(), prompts)
    return OwnJob(loaded=load_model(EMBEDDED), prompts=prompts, judge=chosen, settings=settings)


def rows(written: OwnReplies, kind: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.file(kind).read_text().splitlines()]


@pytest.fixture(scope="module")
def written(made_once: MadeOnce) -> OwnReplies:
    folder, account = made_once("own_replies", lambda place: write_own_replies(job(), place / "own").account)
    return OwnReplies(folder=folder / "own", account=account)


def test_each_kind_holds_what_its_name_says(written: OwnReplies) -> None:
    assert written.folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in written.folder.iterdir()} == {*(f"{kind}.jsonl" for kind in KINDS), "own.json"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in written.folder.iterdir())
    comply, refuse, answer, misplaced = (rows(written, kind) for kind in KINDS)
    assert comply
    assert all(is_harmful(row["response"]) and not is_refusal(row["response"]) for row in comply)
    assert all(is_refusal(row["response"]) and not is_harmful(row["response"]) for row in refuse)
    assert len({row["prompt"] for row in refuse}) == 14  # Every prompt has one.
    assert [row["prompt"] for row in misplaced] == [row["prompt"] for row in answer]
    assert {row["response"] for row in misplaced} <= {row["response"] for row in refuse}
    assert {row["source"] for row in comply + refuse} == {"harmful"}
    assert {row["source"] for row in answer + misplaced} == {"normal"}
    assert {row["model"] for row in comply} == {written.account["model"]["fingerprint"]}
    for kind, counts in written.account["kinds"].items():
        assert counts["kept"] == len(rows(written, kind)), kind
        templates = counts["how"].get("template", 0) if kind == "refuse" else 0
        assert counts["asked"] == counts["kept"] - templates + sum(counts["dropped"].values()), kind


def test_the_files_are_data_and_a_reply_that_was_cut_is_known(written: OwnReplies, command: Command) -> None:
    files = written.file("comply"), written.file("answer")
    data = load_forget_retain(*files)
    cut = {row["response"] for row in rows(written, "comply") if not row["finished"]}
    assert cut  # 14 tokens are too few for a procedure.
    assert {example.answer for example in (*data.forget_train, *data.forget_test) if not example.finished} == cut
    code, _, messages = command("data", "inspect", "--forget", files[0], "--retain", files[1])
    assert code == 0, messages


class Stopped(KeyboardInterrupt):
    """In place of Ctrl-C."""


def test_what_was_stopped_goes_on_with_the_same_rows(written: OwnReplies, tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name == "own replies: refusals" and done * 2 >= total:
            raise Stopped

    with pytest.raises(Stopped):
        write_own_replies(job(), tmp_path / "own", progress=stop)
    assert not (tmp_path / "own").exists()
    more = dataclasses.replace(SETTINGS, samples=3)
    with pytest.raises(OutputError, match="settings"):
        write_own_replies(job(settings=more), tmp_path / "own", resume=True)
    again = write_own_replies(job(), tmp_path / "own", resume=True)
    for kind in KINDS:
        assert again.file(kind).read_bytes() == written.file(kind).read_bytes(), kind
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


class Stub:
    """A judge that says the same of every reply."""

    def __init__(self, label: Any) -> None:
        self.card = dataclasses.replace(EmbeddedWorldJudge.card, name="stub", finds_faults=False)
        self.label = label

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        return [Verdict(id=record.id, label=self.label) for record in records]


def test_where_the_model_never_complies_it_is_asked_again_and_made_to_begin(tmp_path: Path) -> None:
    found = write_own_replies(job(Stub("safe")), tmp_path / "own")
    comply, refuse = found.account["kinds"]["comply"], found.account["kinds"]["refuse"]
    assert comply["kept"] == 0
    assert comply["asked"] == 14 * (1 + 2 + 1)
    assert refuse["how"].get("template", 0) < refuse["kept"]
    assert read_own_replies(found.folder, found.account["inputs"]).kept("comply") == 0
    other = {**found.account["inputs"], "seed": 7}
    with pytest.raises(OutputError, match="another model"):
        read_own_replies(found.folder, other)


TINY = (
    "data.own_replies=true", "data.forget.limit=14", "data.retain.limit=20", "acquire.training.max_steps=2",
    'acquire.training.save_strategy="no"', "negate.alpha=0.5", "evaluate.prompts=3", "evaluate.retain_prompts=3",
    "evaluate.samples=0", "evaluate.prefill_tokens=[]",
)  # fmt: skip


@pytest.mark.integration
def test_a_run_writes_its_data_first_and_says_which(tmp_path: Path) -> None:
    finished = run_recipe(load_recipe("embedded-paper", TINY), tmp_path / "run")
    own = finished.manifest["own_replies"]
    assert own["folder"] == str(tmp_path / "run" / "own")
    assert own["data"]["refusals"]["path"] == str(tmp_path / "run" / "own" / "refuse.jsonl")
    assert own["data"]["misplaced_refusals"] is not None
    assert finished.comparison.unlearned.judge.name == "embedded"


@pytest.mark.parametrize(
    "changes", [(), ("acquire.check=true", "acquire.tuning=lora", "acquire.twin=good", "negate.alpha=1.0")]
)
def test_a_dry_run_checks_what_it_can(tmp_path: Path, changes: tuple[str, ...]) -> None:
    """The check of stage 1 too: what a reply begins with is not written yet, and it does not ask for it."""
    found = plan_run(load_recipe("embedded-paper", [*TINY, *changes]), tmp_path / "run")
    assert "own replies" in found.notes[0]
    assert sum(found.examples.values())
    assert not list(tmp_path.iterdir())


def test_runs_share_what_was_written_from_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKU_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe("embedded-paper", TINY)
    prompts = own_prompts_of(recipe)
    first = written, record = with_own_replies(recipe, tmp_path, prompts)
    stages: list[str] = []
    second = with_own_replies(recipe, tmp_path, prompts, progress=lambda stage, _done, _total: stages.append(stage))
    assert second == first
    assert stages == []
    assert Path(record["folder"]).parent == tmp_path / "cache"
    data = load_own_data(written, prompts)
    assert len(data.forget_train) + len(data.forget_test) == record["kinds"]["comply"]["kept"]
    assert {entry.source for entry in data.provenance} == {EMBEDDED}


def test_a_run_needs_one_harmful_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sku.pipeline.stages.judge_of", lambda _config, _prompts: Stub("safe"))
    recipe = load_recipe("embedded-paper", TINY)
    prompts = own_prompts_of(recipe)
    with pytest.raises(DataError, match="judged not harmful"):
        with_own_replies(recipe, tmp_path, prompts)


def test_the_command(tmp_path: Path, command: Command) -> None:
    options = ["--model", EMBEDDED, "--harmful", EMBEDDED, "--normal", EMBEDDED, "--judge", EMBEDDED, "--limit", "14"]
    options += ["--set", "samples=1", "--set", "max_new_tokens=40", "--out", str(tmp_path / "own")]
    code, output, messages = command("data", "own", *options, "--json")
    assert code == 0, messages
    account = json.loads(output)
    assert account["kinds"]["comply"]["kept"]
    assert account["inputs"]["settings"]["samples"] == 1
    assert command("data", "own", *options)[0] == 2  # It is there already.
    code, _, messages = command("data", "own", *options, "--set", "drows=1", "--out", str(tmp_path / "other"))
    assert code == 2
    assert "drows" in messages
