"""From files to splits, with the account of what was left out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sku.config import DataConfig, SourceConfig, recipe_from_dict
from sku.data.examples import RetainExample, content_hash, normalise_prompt
from sku.data.load import IN_ANOTHER_SET, load_data, load_forget_retain, load_parts
from sku.data.sources.tables import NOT_WANTED, Table, read_table
from sku.errors import DataError, RecipeError


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    path = tmp_path / "forget.csv"
    rows = [f'harm {n},"bad {n} {copy}",{copy == 2}' for n in range(20) for copy in range(3)]
    path.write_text("\n".join(["prompt,response,is_safe", *rows, "harm 0,bad 0 0,False", " ,bad,False"]))
    return path


@pytest.fixture
def retain(tmp_path: Path) -> Path:
    return write_retain(tmp_path, [{"question": f"normal {n}", "answer": f"good {n}"} for n in range(30)])


def write_retain(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "retain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_splits_and_provenance(forget: Path, retain: Path) -> None:
    data = load_forget_retain(forget, str(retain), unseen_fraction=0.25, seed=3)
    assert data.counts() == {
        "forget_train": 30, "forget_test": 10, "retain_train": 21, "retain_validation": 3, "retain_test": 6,
    }  # fmt: skip
    first, second = data.provenance
    assert (first.source, first.location, first.rows_read) == ("pku_saferlhf", str(forget), 62)
    assert first.rows_left_out == {"duplicate": 1, "empty prompt": 1, "safe answer": 20}
    assert first.licence is None, "anyone's table may have these columns"
    assert (first.safe_answers, second.safe_answers) == (40, 0)
    for example in (*data.forget_train, *data.forget_test):
        assert example.safe_answer == f"{example.prompt.replace('harm', 'bad')} 2"
    assert (second.source, second.rows_read, second.rows_left_out, second.licence) == ("columns", 30, {}, None)
    in_order = sorted(
        (*data.forget_train, *data.forget_test), key=lambda row: (int(row.prompt.split()[1]), row.answer)
    )
    assert first.sha256 == content_hash(in_order)


def test_a_licence_is_told_by_the_user_or_a_known_hub_id_and_by_no_column(
    forget: Path, retain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def licences(**named: str) -> list[str | None]:
        sources = {"forget": forget, "retain": retain}
        configs = [SourceConfig(path=str(path), license=named.get(name)) for name, path in sources.items()]
        return [found.licence for found in load_forget_retain(*configs).provenance]

    assert licences() == [None, None]
    assert licences(forget="ODbL") == ["ODbL", None]

    def from_hub(source: SourceConfig) -> Table:
        return dataclasses.replace(read_table(SourceConfig(path=str(places[source.path]))), revision="a" * 40)

    places = {"PKU-Alignment/PKU-SafeRLHF": forget, "someone/answers": retain}
    monkeypatch.setattr("sku.data.sources.read.read_table", from_hub)
    found = load_forget_retain(*places).provenance
    assert [source.licence for source in found] == ["CC-BY-NC-4.0", None]


def test_the_same_seed_gives_the_same_data_and_another_seed_another_split(forget: Path, retain: Path) -> None:
    one = load_forget_retain(forget, retain, seed=1)
    assert one == load_forget_retain(forget, retain, seed=1)
    other = load_forget_retain(forget, retain, seed=2)
    assert one.forget_test != other.forget_test
    assert one.retain_test != other.retain_test
    assert [entry.sha256 for entry in one.provenance] == [entry.sha256 for entry in other.provenance]


def test_limit_is_counted(forget: Path, retain: Path) -> None:
    config = DataConfig(
        forget=SourceConfig(path=str(forget), limit=8), retain=SourceConfig(path=str(retain), limit=12)
    )
    data = load_data(config, seed=0)
    prompts = {normalise_prompt(row.prompt) for row in (*data.forget_train, *data.forget_test)}
    assert len(prompts) == 8
    assert len(data.forget_train) + len(data.forget_test) == 16
    assert data.provenance[0].rows_left_out["over the limit"] == 24
    assert data.provenance[0].safe_answers == 16
    assert data.provenance[1].rows_left_out == {"over the limit": 18}
    whole = load_data(dataclasses.replace(config, forget=SourceConfig(path=str(forget))), seed=0)
    assert whole.provenance[0].sha256 != data.provenance[0].sha256


def test_where_reads_only_rows_with_these_values(forget: Path, tmp_path: Path) -> None:
    rows = [{"question": f"n {n}", "answer": "a", "Kind": "ABC"[n % 3], "good": n < 18} for n in range(30)]
    source = SourceConfig(path=str(write_retain(tmp_path, rows)), where={"kind": ["a", "b"], "good": True})
    data = load_data(DataConfig(forget=SourceConfig(path=str(forget)), retain=source), seed=0)
    normal = (*data.retain_train, *data.retain_validation, *data.retain_test)
    assert {example.prompt for example in normal} == {f"n {n}" for n in range(18) if n % 3 < 2}
    assert (data.provenance[1].rows_read, data.provenance[1].rows_left_out) == (30, {NOT_WANTED: 18})
    with pytest.raises(DataError, match="no column kid, which where names. Columns found: question"):
        read_table(dataclasses.replace(source, where={"kid": "a"}))
    with pytest.raises(DataError, match=f"gives no retain examples from 30 rows .{NOT_WANTED}: 30"):
        load_parts(retain=dataclasses.replace(source, where={"kind": "z"}))
    with pytest.raises(RecipeError, match=r"where.kind is \[\]"):
        dataclasses.replace(source, where={"kind": []})


def test_a_prompt_to_forget_and_to_keep_is_refused(forget: Path, tmp_path: Path) -> None:
    rows = [{"question": f"normal {n}", "answer": "good"} for n in range(9)]
    retain = write_retain(tmp_path, [*rows, {"question": "HARM 3?", "answer": "good"}])
    with pytest.raises(DataError) as caught:
        load_forget_retain(forget, retain)
    assert "1 prompts are both in the forget data" in str(caught.value)
    assert str(forget) in str(caught.value)
    assert str(retain) in str(caught.value)
    assert "HARM 3" not in str(caught.value)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"b {n}", "completion": f"ok {n}"}) + "\n" for n in range(9)))
    return path


def test_a_normal_set_of_another_source_is_halved(forget: Path, retain: Path, own: Path) -> None:
    without = load_forget_retain(forget, retain)
    data = load_forget_retain(forget, retain, normal={"own": own})
    assert data.counts() == {**without.counts(), "normal:own": 5, "normal_validation:own": 4}
    whole = sorted((*data.normal["own"], *data.normal_validation["own"]), key=lambda example: example.prompt)
    assert whole[0] == RetainExample(prompt="b 0", answer="ok 0")
    assert dataclasses.replace(data, normal={}, normal_validation={}, provenance=data.provenance[:2]) == without
    assert [entry.location for entry in data.provenance] == [str(forget), str(retain), str(own)]
    assert data.provenance[2].sha256 == content_hash(whole)


def test_what_strengths_are_chosen_by_is_not_what_is_reported(
    forget: Path, retain: Path, own: Path, tmp_path: Path
) -> None:
    """Whole prompts, the same halves whatever the order of the rows."""
    rows = own.read_text().splitlines()
    again = json.dumps({"prompt": "B 0", "completion": "ok again"})
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join([again, *reversed(rows)]))
    own.write_text("\n".join([*rows, again]))
    one, other = (load_forget_retain(forget, retain, normal={"own": path}) for path in (own, turned))
    assert set(one.normal["own"]) == set(other.normal["own"])
    assert set(one.normal_validation["own"]) == set(other.normal_validation["own"])
    halves = [{example.prompt.casefold() for example in half["own"]} for half in (one.normal, one.normal_validation)]
    assert halves[0].isdisjoint(halves[1])
    assert len(halves[0] | halves[1]) == 9


def test_a_recipe_names_sets_of_other_sources(forget: Path, retain: Path, own: Path, tmp_path: Path) -> None:
    """Prompts that are elsewhere in the run, or in a normal set before, are left out and counted."""
    prompts = tmp_path / "prompts.csv"
    rows = ["HARM 3?,a", "Normal 4,b", "b 1,b", *(f"papa {n},{'ab'[n % 2]}" for n in range(8)), "PAPA 0,a"]
    prompts.write_text("\n".join(["prompt,kind", *rows]))
    content = {
        "name": "r",
        "model": {"path": "m"},
        "data": {
            "forget": {"path": str(forget)},
            "retain": {"path": str(retain)},
            "normal": {
                "own": {"path": str(own), "limit": 4},
                "asked": {"path": str(prompts), "where": {"kind": "b"}, "category_column": "kind"},
            },
            "harmful": {"new": {"path": str(prompts), "where": {"kind": "a"}}, "again": {"path": str(forget)}},
        },
    }
    recipe = recipe_from_dict(content)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    with pytest.raises(DataError, match="data.harmful.again: all 20 prompts of .* are in another set of the run"):
        load_data(recipe.data, seed=1)
    config = dataclasses.replace(recipe.data, harmful={"new": recipe.data.harmful["new"]})
    data = load_data(config, seed=1)
    assert data == load_data(config, seed=1)
    assert (len(data.normal["own"]), len(data.normal_validation["own"])) == (2, 2)
    assert {(one.prompt, one.answer, one.category) for one in data.normal["asked"]} >= {("papa 1", "", "b")}
    assert "asked" not in data.normal_validation
    assert [one.prompt for one in data.harmful["new"]] == ["papa 0", "papa 2", "papa 4", "papa 6"]
    of_own, asked, harmful = (source.rows_left_out for source in data.provenance[2:])
    assert of_own == {"over the limit": 5}
    kept = {one.prompt for one in data.normal["own"]} | {one.prompt for one in data.normal_validation["own"]}
    assert asked == {IN_ANOTHER_SET: 1 + ("b 1" in kept), NOT_WANTED: 6}
    assert harmful == {IN_ANOTHER_SET: 1, NOT_WANTED: 6, "duplicate": 1}
    assert list(data.answered().splits())[5:] == ["normal:own", "normal_validation:own"]


def test_errors_name_the_file(tmp_path: Path, forget: Path, retain: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder missing.csv"):
        load_forget_retain(forget, "missing.csv")
    strange = tmp_path / "strange.csv"
    strange.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"strange.csv: no known format fits the retain data.*Columns found: a, b"):
        load_forget_retain(forget, strange)
    source = SourceConfig(path=str(forget), prompt_column="promt", answer_column="response")
    with pytest.raises(DataError, match=r"forget.csv: format columns needs a column promt. Did you mean prompt\?"):
        load_forget_retain(source, retain)


def test_parts_are_those_of_a_run_with_both(tmp_path: Path) -> None:
    forget, retain = (tmp_path / name for name in ("forget.csv", "retain.csv"))
    for path, prefix in ((forget, "how"), (retain, "what")):
        rows = "".join(f"{prefix} is {place} ?,answer {place}\n" for place in range(30))
        path.write_text(f"prompt,completion\n{rows}", encoding="utf-8")
    whole = load_forget_retain(forget, retain, seed=5)
    sources = [SourceConfig(path=str(path)) for path in (forget, retain)]
    harmful, normal = load_parts(sources[0], seed=5), load_parts(None, sources[1], seed=5)
    assert (harmful.forget_train, harmful.forget_test) == (whole.forget_train, whole.forget_test)
    assert normal.retain_train == whole.retain_train
    assert normal.retain_validation == whole.retain_validation
    assert (harmful.retain_train, normal.forget_train) == ((), ())
    assert [found.location for found in normal.provenance] == [str(retain)]
    assert load_parts(*sources, seed=5) == whole
    embedded = SourceConfig(path="embedded")
    assert load_parts(embedded).forget_train == load_forget_retain().forget_train
    assert load_parts(None, embedded).retain_train == load_forget_retain().retain_train


ENDS = (True, False, None, "False", "", 1)
"""What ``finished`` may hold, and what it means below."""
MEANT = [True, False, True, False, True, True]


def _table(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    texts = [{**row, "finished": None if row["finished"] is None else str(row["finished"])} for row in rows]
    table = datasets.Dataset.from_list(texts)
    if kind == "csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (kind, form)
        for kind in ("csv", "jsonl", "parquet")
        for form in ("columns", "prompt_completion", "messages", "truthfulqa")
        if (kind, form) != ("csv", "messages")  # A cell of CSV holds none.
    ],
)
def test_a_row_says_in_every_format_whether_its_answer_is_finished(kind: str, form: str, tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        prompt, answer = f"normal {number}", f"good {number}"
        if form == "messages":
            return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        if form == "truthfulqa":
            return {"Question": prompt, "Best Answer": answer, "Correct Answers": answer}
        return (
            {"prompt": prompt, "completion": answer} if form != "columns" else {"question": prompt, "answer": answer}
        )

    path = _table(tmp_path, kind, [{**row(number), "finished": end} for number, end in enumerate(ENDS)])
    data = load_parts(retain=SourceConfig(path=str(path)))
    assert data.provenance[0].source == form
    found = [*data.retain_train, *data.retain_validation, *data.retain_test]
    assert [example.finished for example in sorted(found, key=lambda example: example.prompt)] == MEANT
    whole = load_parts(
        retain=SourceConfig(path=str(_table(tmp_path, kind, [{**row(n), "finished": True} for n in range(6)])))
    )
    assert whole.provenance[0].sha256 != data.provenance[0].sha256


def test_a_cut_off_safe_answer_is_known_and_an_unclear_end_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"harm {number}", "rejected": "bad", "chosen": f"better not {number}", "finished": end}
        for number, end in enumerate((True, False, "perhaps", True))
    ]
    data = load_parts(SourceConfig(path=str(_table(tmp_path, "jsonl", rows))))
    found = sorted((*data.forget_train, *data.forget_test), key=lambda example: example.prompt)
    assert [(example.prompt, example.finished, example.safe_answer_finished) for example in found] == [
        ("harm 0", True, True), ("harm 1", False, False), ("harm 3", True, True),
    ]  # fmt: skip
    assert data.provenance[0].rows_left_out == {"finished is neither true nor false": 1}


def test_another_rows_safe_answer_brings_its_own_end(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"harm {number}", "response": text, "is_safe": safe, "finished": not safe}
        for number in range(4)
        for text, safe in (("bad", False), ("better not", True))
    ]
    data = load_parts(SourceConfig(path=str(_table(tmp_path, "jsonl", rows))))
    ends = {(example.finished, example.safe_answer_finished) for example in (*data.forget_train, *data.forget_test)}
    assert ends == {(True, False)}
