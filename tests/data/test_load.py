"""From files to splits, with the account of what was left out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sku.config import DataConfig, SourceConfig, recipe_from_dict
from sku.data.examples import RetainExample, content_hash, normalise_prompt
from sku.data.load import load_data, load_forget_retain, load_parts
from sku.data.tables import NOT_WANTED, Table, read_table
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
        "unlearned": 30, "unseen": 10, "retain_train": 21, "retain_validation": 3, "retain_test": 6,
    }  # fmt: skip
    first, second = data.provenance
    assert (first.source, first.location, first.rows_read) == ("pku_saferlhf", str(forget), 62)
    assert first.rows_left_out == {"duplicate": 1, "empty prompt": 1, "safe answer": 20}
    assert first.licence is None, "anyone's table may have these columns"
    assert (first.safe_answers, second.safe_answers) == (40, 0)
    for example in (*data.unlearned, *data.unseen):
        assert example.safe_answer == f"{example.prompt.replace('harm', 'bad')} 2"
    assert (second.source, second.rows_read, second.rows_left_out, second.licence) == ("columns", 30, {}, None)
    in_order = sorted((*data.unlearned, *data.unseen), key=lambda row: (int(row.prompt.split()[1]), row.answer))
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
    monkeypatch.setattr("sku.data.load.read_table", from_hub)
    found = load_forget_retain(*places).provenance
    assert [source.licence for source in found] == ["CC-BY-NC-4.0", None]


def test_the_same_seed_gives_the_same_data_and_another_seed_another_split(forget: Path, retain: Path) -> None:
    one = load_forget_retain(forget, retain, seed=1)
    assert one == load_forget_retain(forget, retain, seed=1)
    other = load_forget_retain(forget, retain, seed=2)
    assert one.unseen != other.unseen
    assert one.retain_test != other.retain_test
    assert [entry.sha256 for entry in one.provenance] == [entry.sha256 for entry in other.provenance]


def test_limit_is_counted(forget: Path, retain: Path) -> None:
    config = DataConfig(
        forget=SourceConfig(path=str(forget), limit=8), retain=SourceConfig(path=str(retain), limit=12)
    )
    data = load_data(config, seed=0)
    prompts = {normalise_prompt(row.prompt) for row in (*data.unlearned, *data.unseen)}
    assert len(prompts) == 8
    assert len(data.unlearned) + len(data.unseen) == 16
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
    with pytest.raises(DataError, match="no column kid, which where names. Did you mean kind"):
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
def benign(tmp_path: Path) -> Path:
    path = tmp_path / "benign.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"b {n}", "completion": f"ok {n}"}) + "\n" for n in range(9)))
    return path


def test_benign_data_is_a_split_of_its_own(forget: Path, retain: Path, benign: Path) -> None:
    without = load_forget_retain(forget, retain)
    data = load_forget_retain(forget, retain, benign=benign)
    assert data.counts() == {**without.counts(), "benign": 5, "benign_validation": 4}
    assert RetainExample(prompt="b 0", answer="ok 0") in {*data.benign, *data.benign_validation}
    assert dataclasses.replace(data, benign=(), benign_validation=(), provenance=data.provenance[:2]) == without
    assert [entry.location for entry in data.provenance] == [str(forget), str(retain), str(benign)]
    whole = sorted((*data.benign, *data.benign_validation), key=lambda example: example.prompt)
    assert data.provenance[2].sha256 == content_hash(whole)


def test_what_strengths_are_chosen_by_is_not_what_is_reported(
    forget: Path, retain: Path, benign: Path, tmp_path: Path
) -> None:
    """Whole prompts, the same halves whatever the order of the rows."""
    rows = benign.read_text().splitlines()
    again = json.dumps({"prompt": "B 0", "completion": "ok again"})
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join([again, *reversed(rows)]))
    benign.write_text("\n".join([*rows, again]))
    one, other = (load_forget_retain(forget, retain, benign=path) for path in (benign, turned))
    assert set(one.benign) == set(other.benign)
    assert set(one.benign_validation) == set(other.benign_validation)
    halves = [{example.prompt.casefold() for example in half} for half in (one.benign, one.benign_validation)]
    assert halves[0].isdisjoint(halves[1])
    assert len(halves[0] | halves[1]) == 9


def test_a_recipe_limits_benign_data(forget: Path, retain: Path, benign: Path) -> None:
    content = {
        "name": "r",
        "model": {"path": "m"},
        "data": {
            "forget": {"path": str(forget)},
            "retain": {"path": str(retain)},
            "benign": {"path": str(benign), "limit": 4},
        },
    }
    recipe = recipe_from_dict(content)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    data = load_data(recipe.data, seed=1)
    assert (len(data.benign), len(data.benign_validation)) == (2, 2)
    assert data.provenance[2].rows_left_out == {"over the limit": 5}
    assert data == load_data(recipe.data, seed=1)
    kept = {*data.benign, *data.benign_validation}
    other = load_data(recipe.data, seed=2)
    assert kept != {*other.benign, *other.benign_validation}


@pytest.mark.parametrize("prompt", ["HARM 3?", "Normal 4"])
def test_benign_data_that_is_trained_on_is_refused(forget: Path, retain: Path, benign: Path, prompt: str) -> None:
    """Whatever the limit keeps: another seed must not turn the error on and off."""
    with benign.open("a") as file:
        file.write(json.dumps({"prompt": prompt, "completion": "ok"}))
    with pytest.raises(
        DataError, match="1 prompts of the benign data .*benign.jsonl are in the forget or the"
    ) as found:
        load_forget_retain(forget, retain, benign=SourceConfig(path=str(benign), limit=1))
    assert prompt not in str(found.value)


def test_nothing_to_forget_or_to_keep(tmp_path: Path, forget: Path, retain: Path) -> None:
    safe = tmp_path / "safe.csv"
    safe.write_text("prompt,response,is_safe\n" + "q,a,True\n" * 5)
    with pytest.raises(
        DataError, match=r"safe.csv has no unsafe rows among 5, so there is nothing to forget \(safe ans"
    ):
        load_forget_retain(safe, retain)
    source = SourceConfig(
        path=str(forget), prompt_column="prompt", answer_column="response", unsafe_column="is_safe", unsafe_value="no"
    )
    with pytest.raises(DataError, match=r"no unsafe rows among 62, .*column is_safe is compared with 'no'"):
        load_forget_retain(source, retain)
    empty = tmp_path / "empty.csv"
    empty.write_text("question,answer\n,\nq,\n")
    with pytest.raises(DataError, match=r"gives no retain examples from 2 rows \(empty answer: 1, empty prompt: 1\)"):
        load_forget_retain(forget, empty)
    empty.write_text("question,answer\n")
    with pytest.raises(DataError, match=r"gives no retain examples from 0 rows \(it has no rows\)"):
        load_forget_retain(forget, empty)


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


def test_too_little_data_for_the_splits(tmp_path: Path, forget: Path) -> None:
    few = write_retain(tmp_path, [{"question": f"normal {n}", "answer": "good"} for n in range(2)])
    with pytest.raises(DataError, match=r"the retain data .*retain.jsonl has 2 different prompts or groups, too few"):
        load_forget_retain(forget, few)


def test_shares_out_of_range_are_refused(forget: Path, retain: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.unseen_fraction is 1.5"):
        load_forget_retain(forget, retain, unseen_fraction=1.5)


def test_parts_are_those_of_a_run_with_both(tmp_path: Path) -> None:
    forget, retain = (tmp_path / name for name in ("forget.csv", "retain.csv"))
    for path, prefix in ((forget, "how"), (retain, "what")):
        rows = "".join(f"{prefix} is {place} ?,answer {place}\n" for place in range(30))
        path.write_text(f"prompt,completion\n{rows}", encoding="utf-8")
    whole = load_forget_retain(forget, retain, seed=5)
    sources = [SourceConfig(path=str(path)) for path in (forget, retain)]
    harmful, normal = load_parts(sources[0], seed=5), load_parts(None, sources[1], seed=5)
    assert (harmful.unlearned, harmful.unseen) == (whole.unlearned, whole.unseen)
    assert normal.retain_train == whole.retain_train
    assert normal.retain_validation == whole.retain_validation
    assert (harmful.retain_train, normal.unlearned) == ((), ())
    assert [found.location for found in normal.provenance] == [str(retain)]
    assert load_parts(*sources, seed=5) == whole
    embedded = SourceConfig(path="embedded")
    assert load_parts(embedded).unlearned == load_forget_retain().unlearned
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
    found = sorted((*data.unlearned, *data.unseen), key=lambda example: example.prompt)
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
    ends = {(example.finished, example.safe_answer_finished) for example in (*data.unlearned, *data.unseen)}
    assert ends == {(True, False)}
