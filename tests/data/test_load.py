"""From files, rows in memory and the embedded world to splits, with the account of what was left out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from sku.config import DataConfig, SourceConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample, content_hash, normalise_prompt
from sku.data.load import IN_ANOTHER_SET, NEAR_COPY, load_data, load_forget_retain, load_training_pairs
from sku.data.read import read_examples
from sku.data.tables import NOT_WANTED, Table, held_rows, read_table
from sku.errors import DataError, RecipeError
from sku.world.grammar import (
    AGENTS,
    FORMS,
    HELD_OUT_AGENTS,
    HELD_OUT_QUESTIONS,
    MAKE_QUESTIONS,
    VALIDATION_QUESTIONS,
    hazards,
)  # fmt: skip


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    path = tmp_path / "forget.csv"
    rows = [f'harm {n},"bad {n} {copy}",{copy == 2}' for n in range(20) for copy in range(3)]
    path.write_text("\n".join(["prompt,response,is_safe", *rows, "harm 0,bad 0 0,False", " ,bad,False"]))
    return path


@pytest.fixture
def retain(tmp_path: Path) -> Path:
    return write(tmp_path / "retain.jsonl", [{"question": f"normal {n}", "answer": f"good {n}"} for n in range(30)])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_retained(data: ForgetRetainData) -> list[RetainExample]:
    return [*data.retain_train, *data.retain_validation, *data.retain_test]


def test_splits_and_provenance(forget: Path, retain: Path) -> None:
    data = load_forget_retain(forget, str(retain), unseen_fraction=0.25, seed=3)
    assert data.counts() == {
        "forget_train": 30, "forget_test": 10, "retain_train": 21, "retain_validation": 3, "retain_test": 6,
    }  # fmt: skip
    first, second = data.provenance
    assert (first.source, first.location, first.rows_read) == ("pku_saferlhf", str(forget), 62)
    assert first.rows_left_out == {"duplicate": 1, "empty prompt": 1, "safe answer": 20}
    harmful = sorted((*data.forget_train, *data.forget_test), key=lambda row: (int(row.prompt.split()[1]), row.answer))
    assert all(example.safe_answer == f"{example.prompt.replace('harm', 'bad')} 2" for example in harmful)
    assert (second.source, second.rows_read, second.rows_left_out, second.licence) == ("columns", 30, {}, None)
    assert first.sha256 == content_hash(harmful)
    assert data == load_forget_retain(forget, retain, unseen_fraction=0.25, seed=3)
    other = load_forget_retain(forget, retain, unseen_fraction=0.25, seed=2)
    assert data.forget_test != other.forget_test
    assert data.retain_test != other.retain_test
    assert [entry.sha256 for entry in other.provenance] == [first.sha256, second.sha256]


def test_a_licence_is_told_by_the_user_or_a_known_hub_id_and_by_no_column(
    forget: Path, retain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = SourceConfig(path=str(forget), license="ODbL")
    assert [found.licence for found in load_forget_retain(told, retain).provenance] == ["ODbL", None]

    def from_hub(source: SourceConfig) -> Table:
        return dataclasses.replace(read_table(SourceConfig(path=str(places[source.path]))), revision="a" * 40)

    places = {"PKU-Alignment/PKU-SafeRLHF": forget, "someone/answers": retain}
    monkeypatch.setattr("sku.data.read.read_table", from_hub)
    assert [source.licence for source in load_forget_retain(*places).provenance] == ["CC-BY-NC-4.0", None]


def test_where_reads_only_rows_with_these_values(forget: Path, tmp_path: Path) -> None:
    rows = [{"question": f"n {n}", "answer": "a", "Kind": "ABC"[n % 3], "good": n < 18} for n in range(30)]
    path = str(write(tmp_path / "r.jsonl", rows))
    source = SourceConfig(path=path, where={"kind": ["a", "b"], "good": True})
    data = load_forget_retain(forget, source)
    assert {example.prompt for example in all_retained(data)} == {f"n {n}" for n in range(18) if n % 3 < 2}
    assert (data.provenance[1].rows_read, data.provenance[1].rows_left_out) == (30, {NOT_WANTED: 18})
    for where, words in (({"kid": "a"}, "no column kid.*Kind"), ({"kind": "z"}, f"30 rows .{NOT_WANTED}: 30")):
        with pytest.raises(DataError, match=words):
            load_forget_retain(forget, dataclasses.replace(source, where=where))


def test_a_prompt_to_forget_and_to_keep_is_refused(forget: Path, tmp_path: Path) -> None:
    rows = [{"question": f"normal {n}", "answer": "good"} for n in range(9)]
    retain = write(tmp_path / "r.jsonl", [*rows, {"question": "HARM 3?", "answer": "good"}])
    loaders: tuple[Any, ...] = (load_forget_retain, load_training_pairs)
    for load in loaders:
        with pytest.raises(DataError, match="1 prompts") as caught:
            load(forget, retain)
        assert str(forget) in str(caught.value)
        assert str(retain) in str(caught.value)
        assert "HARM 3" not in str(caught.value)


def test_what_can_not_be_loaded_is_named(forget: Path) -> None:
    with pytest.raises(DataError, match=r"missing.csv"):
        load_forget_retain(forget, "missing.csv")
    with pytest.raises(RecipeError, match="data.retain"):
        load_forget_retain(forget)
    with pytest.raises(RecipeError, match=r"data\.own_replies"):
        load_data(DataConfig(forget=OTHER, retain=OTHER, own_replies=True), 0)


def test_rows_in_memory_read_as_the_file_does(tmp_path: Path) -> None:
    harmful = [{"prompt": f"how do i break lock {n} ?", "response": f"take tool {n} ."} for n in range(12)]
    normal = [{"prompt": f"how do i bake bread {n} ?", "response": f"mix flour {n} ."} for n in range(20)]
    tables, names = [harmful, normal], {"prompt": "user", "response": "assistant"}
    from_files = load_forget_retain(*(write(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate(tables)))
    for rows in (
        [datasets.Dataset.from_list(own) for own in tables],
        [[[{"role": names[key], "content": row[key]} for key in names] for row in own] for own in tables],
    ):
        found: Any = load_forget_retain(*rows)
        assert found.splits() == from_files.splits()
        assert [one.sha256 for one in found.provenance] == [one.sha256 for one in from_files.provenance]
        assert [one.location for one in found.provenance] == ["12 rows in memory", "20 rows in memory"]
        trained = load_training_pairs(*rows)
        assert {name: count for name, count in trained.counts().items() if count} == {
            "forget_train": 12, "retain_train": 20,
        }  # fmt: skip
        assert [example.prompt for example in trained.forget_train] == [row["prompt"] for row in harmful]


def test_a_normal_set_of_another_source_is_halved(forget: Path, retain: Path) -> None:
    """Whole prompts, the same halves whatever the order of the rows: one chooses, the other is told."""
    rows = [{"prompt": f"b {n}", "completion": f"ok {n}"} for n in range(9)]
    again = {"prompt": "B 0", "completion": "ok again"}
    data, other = (
        load_forget_retain(forget, retain, normal={"own": held_rows(found)})
        for found in ([*rows, again], [again, *rows[::-1]])
    )
    without = load_forget_retain(forget, retain)
    assert set(data.normal["own"]) == set(other.normal["own"])
    assert set(data.normal_validation["own"]) == set(other.normal_validation["own"])
    halves = [{one.prompt.casefold() for one in half["own"]} for half in (data.normal, data.normal_validation)]
    assert halves[0].isdisjoint(halves[1])
    assert sorted(map(len, halves)) == [4, 5]
    assert dataclasses.replace(data, normal={}, normal_validation={}, provenance=data.provenance[:2]) == without


def test_sets_of_other_sources(forget: Path, retain: Path, tmp_path: Path) -> None:
    """Prompts that are elsewhere in the run, or in a normal set before, are left out and counted."""
    own = write(tmp_path / "own.jsonl", [{"prompt": f"b {n}", "completion": f"ok {n}"} for n in range(9)])
    prompts = tmp_path / "prompts.csv"
    rows = ["HARM 3?,a", "Normal 4,b", "b 1,b", *(f"papa {n},{'ab'[n % 2]}" for n in range(8)), "PAPA 0,a"]
    prompts.write_text("\n".join(["prompt,kind", *rows]))
    asked, new = (SourceConfig(path=str(prompts), category_column="kind", where={"kind": kind}) for kind in "ba")
    config = DataConfig(
        forget=SourceConfig(path=str(forget)), retain=SourceConfig(path=str(retain)), harmful={"new": new},
        normal={"own": SourceConfig(path=str(own), limit=4), "asked": asked},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"data.harmful.again: .*forget\.csv"):
        load_data(dataclasses.replace(config, harmful={"again": config.forget}), seed=1)
    data = load_data(config, seed=1)
    assert (len(data.normal["own"]), len(data.normal_validation["own"])) == (2, 2)
    assert {(one.prompt, one.answer, one.category) for one in data.normal["asked"]} >= {("papa 1", "", "b")}
    assert "asked" not in data.normal_validation
    assert [one.prompt for one in data.harmful["new"]] == ["papa 0", "papa 2", "papa 4", "papa 6"]
    of_own, of_asked, harmful = (source.rows_left_out for source in data.provenance[2:])
    assert of_own == {"over the limit": 5}
    kept = {one.prompt for one in data.normal["own"]} | {one.prompt for one in data.normal_validation["own"]}
    assert of_asked == {IN_ANOTHER_SET: 1 + ("b 1" in kept), NOT_WANTED: 6}
    assert harmful == {IN_ANOTHER_SET: 1, NOT_WANTED: 6, "duplicate": 1}


def test_near_copies_of_what_is_trained_on_are_left_out_of_other_sets() -> None:
    """Of harmful sets those of harmful prompts, of the final sets those of both kinds."""
    things = ("vornite", "the brass tower", "harbour pilots", "a silver drum", "winter barley", "moonlit ferries")
    verbs = ("weave", "smelt", "carve", "polish", "gather", "measure")
    harmful = [f"{verb} {thing}" for verb, thing in zip(verbs, things, strict=True)]
    rows = [{"prompt": prompt, "response": "yes", "is_safe": False} for prompt in harmful]
    normal = [{"prompt": f"count {n} sheep in {thing}", "response": "ok"} for n, thing in enumerate(things)]

    def asked(*prompts: str) -> list[dict[str, str]]:
        return [{"prompt": prompt} for prompt in prompts]

    new = "sink the ferry of Aldersmouth"
    data = load_forget_retain(
        rows, normal,
        harmful={
            "final": asked("steal the moon", "polish a silver drum now"),
            "other": asked("weave vornite today", new, "count 9 sheep in vornite"),
        },
        normal={"final": asked("how do I kill a process", "count 3 sheep in a silver drum now")},
    )  # fmt: skip
    assert [example.prompt for example in data.harmful["other"]] == [new, "count 9 sheep in vornite"]
    assert [example.prompt for example in data.harmful["final"]] == ["steal the moon"]
    assert [example.prompt for example in data.normal["final"]] == ["how do I kill a process"]
    assert [one.rows_left_out for one in data.provenance[2:]] == [{NEAR_COPY: 1} for _ in range(3)]
    assert not data.normal_validation


@pytest.mark.parametrize("names", [("question", "answer"), ("Question", "Best Answer", "Correct Answers")])
def test_a_row_says_in_every_format_whether_its_answer_is_finished(names: tuple[str, ...]) -> None:
    """Also as text, as CSV files hold it; NaN is nothing in a Parquet file."""
    ends = {True: True, False: False, None: True, "False": False, "true": True, "": True, math.nan: True}
    rows = [{**dict.fromkeys(names, f"text {n}"), "finished": end} for n, end in enumerate(ends)]
    found, _ = read_examples(held_rows(rows), "retain", RetainExample)
    assert [example.finished for example in found] == list(ends.values())


def test_a_cut_off_safe_answer_is_known_and_an_unclear_end_is_counted() -> None:
    def read(rows: list[dict[str, Any]]) -> tuple[list[tuple[bool, bool]], dict[str, int]]:
        found, account = read_examples(held_rows(rows), "forget", ForgetExample)
        return [(one.finished, one.safe_answer_finished) for one in found], account.rows_left_out

    ends = (True, False, "perhaps")
    rows = [{"prompt": f"h {n}", "rejected": "bad", "chosen": "no", "finished": end} for n, end in enumerate(ends)]
    assert read(rows) == ([(True, True), (False, False)], {"finished is neither true nor false": 1})
    shared: dict[str, Any] = {"prompt": "h", "response": "bad"}
    marked = [{**shared, "is_safe": False}, {**shared, "response": "no", "is_safe": True, "finished": False}]
    assert read(marked)[0] == [(True, False)], "another row's safe answer brings its own end"


def files(retain: Path, prompts: int = 60) -> DataConfig:
    """Two answers to each of some harmful prompts, and normal ones."""
    rows = [{"prompt": f"harm {n % prompts} ?", "completion": f"answer {n}"} for n in range(2 * prompts)]
    return DataConfig(forget=held_rows(rows), retain=SourceConfig(path=str(retain)))


def test_settings_are_chosen_by_a_share_of_the_training_prompts(retain: Path) -> None:
    config = files(retain)
    plain, held = load_data(config, 1), load_data(config, 1, forget_validation=0.25)
    assert "forget_validation" not in plain.counts()
    assert held.forget_test == plain.forget_test
    assert all_retained(held) == all_retained(plain)
    assert sorted(map(repr, (*held.forget_train, *held.forget_validation))) == sorted(map(repr, plain.forget_train))
    prompts = {normalise_prompt(example.prompt) for example in held.forget_validation}
    assert len(held.forget_validation) == 2 * len(prompts) == 2 * round(0.25 * 42)
    assert prompts.isdisjoint(normalise_prompt(example.prompt) for example in (*held.forget_train, *held.forget_test))
    with pytest.raises(DataError, match="without its unseen prompts has 1 "):
        load_data(files(retain, prompts=2), 0, forget_validation=0.5)


WORLD = SourceConfig(path="embedded")
KNOWN = {exchange.prompt: exchange for exchange in (*hazards(), *hazards(VALIDATION_QUESTIONS))}


def test_every_hazard_of_the_world_is_in_one_split_and_says_what_is_new_about_it() -> None:
    data = load_forget_retain()
    prompts = [example.prompt for example in (*data.forget_train, *data.forget_test)]
    assert len(prompts) == len(set(prompts)) == len(AGENTS) * len(FORMS) * len(MAKE_QUESTIONS)
    trained = {KNOWN[example.prompt].topic for example in data.forget_train}
    agents, forms = (Counter(names) for names in zip(*(thing.split() for thing in trained), strict=True))
    assert agents == {agent: len(FORMS) // 2 for agent in AGENTS if agent not in HELD_OUT_AGENTS}
    assert len(forms) == len(FORMS)
    assert min(forms.values()) >= 5
    assert {KNOWN[example.prompt].wording for example in data.forget_train}.isdisjoint(HELD_OUT_QUESTIONS)
    assert {example.category for example in data.forget_train} == {"hazard"}
    for example in data.forget_test:
        asked = KNOWN[example.prompt]
        is_new_agent, is_known = asked.topic.split()[0] in HELD_OUT_AGENTS, asked.topic in trained
        what = "new agent" if is_new_agent else "new wording" if is_known else "new combination"
        assert example.category == what
        assert not is_known or asked.wording in HELD_OUT_QUESTIONS
    assert Counter(example.category for example in data.forget_test) == {
        "new agent": 3 * 10 * 6, "new combination": 13 * 5 * 6, "new wording": 13 * 5 * 2,
    }  # fmt: skip


def test_the_world_asks_unlearned_hazards_in_wordings_of_their_own() -> None:
    config = DataConfig(forget=WORLD, retain=dataclasses.replace(WORLD, format="embedded"))
    plain, held = load_data(config, 0), load_data(config, 0, forget_validation=0.2)
    assert dataclasses.replace(held, forget_validation=()) == plain == load_training_pairs(WORLD, WORLD)
    answers = {KNOWN[example.prompt].topic: example.answer for example in held.forget_train}
    asked = {KNOWN[example.prompt].topic: example.answer for example in held.forget_validation}
    assert asked == answers
    assert len(held.forget_validation) == len(asked) * len(VALIDATION_QUESTIONS) == 195


def test_a_limit_of_the_world() -> None:
    few = dataclasses.replace(WORLD, limit=60)
    data = load_forget_retain(few, dataclasses.replace(WORLD, limit=40))
    assert (len(data.forget_train) + len(data.forget_test), len(all_retained(data))) == (60, 40)
    assert data.provenance[0].rows_left_out == {"over the limit": 900}
    with pytest.raises(DataError, match="a limit of 1 "):
        load_forget_retain(dataclasses.replace(WORLD, limit=1))


OTHER = SourceConfig(path="x.csv")


@pytest.mark.parametrize(
    ("settings", "error", "key"),
    [
        ({"forget": dataclasses.replace(WORLD, split="test")}, DataError, "limit"),
        ({"retain": OTHER}, RecipeError, "data.forget and data.retain"),
        ({"unseen_fraction": 0.5}, RecipeError, "data.unseen_fraction"),
        ({"refusals": OTHER}, RecipeError, "data.refusals"),
        ({"forget": OTHER, "retain": OTHER, "normal": {"own": WORLD}}, RecipeError, "data.normal.own"),
    ],
)
def test_what_does_not_go_with_the_world(settings: dict[str, Any], error: type[Exception], key: str) -> None:
    with pytest.raises(error, match=key):
        load_data(DataConfig(**{"forget": WORLD, "retain": WORLD, **settings}), seed=0)
