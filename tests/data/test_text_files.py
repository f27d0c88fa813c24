"""CSV and JSON, cell by cell."""

import gzip
import lzma
from pathlib import Path

import pytest

from sku.data.sources.tables import read_text_file
from sku.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    content = '\ufeffquestion,answer\r\n1,None\r\n007,123\r\nNaN,1.50\r\n"a, b","c\r\nd ""e"""\r\n\r\ntrue,\r\n'
    columns, rows = read_text_file(write(tmp_path, "a.csv", content))
    assert columns == ["question", "answer"]
    assert [tuple(row.values()) for row in rows] == [
        ("1", "None"),
        ("007", "123"),
        ("NaN", "1.50"),
        ("a, b", 'c\r\nd "e"'),
        ("true", ""),
    ]


def test_tsv_and_packed_files(tmp_path: Path) -> None:
    assert read_text_file(write(tmp_path, "a.tsv", "q\ta\n1\t2,3\n"))[1] == [{"q": "1", "a": "2,3"}]
    assert read_text_file(write(tmp_path, "a.csv.gz", gzip.compress(b"q\n1\n")))[1] == [{"q": "1"}]
    assert read_text_file(write(tmp_path, "a.jsonl.xz", lzma.compress(b'{"q": 1}\n')))[1] == [{"q": 1}]
    with pytest.raises(DataError, match="can't be read"):
        read_text_file(write(tmp_path, "cut.csv.gz", gzip.compress(b"q\n1\n")[:-6]))
    with pytest.raises(DataError, match="can't be read"):
        read_text_file(write(tmp_path, "none.csv.gz", b"q\n1\n"))


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        # As Excel writes it where a comma is the sign of decimals; quoted cells hold both signs and a line end.
        (
            "excel.csv",
            '\ufeffFrage;Antwort\r\n"Wie viel ist 1,5; 2,5?";4,0\r\n"Zwei\nZeilen, ja";"er sagte ""nein"""\r\n',
            [("Wie viel ist 1,5; 2,5?", "4,0"), ("Zwei\nZeilen, ja", 'er sagte "nein"')],
        ),
        # The header alone could be read either way: the rows decide.
        ("comma.csv", "Frage (kurz, klar);Antwort\na, b, c;d\ne;f\n", [("a, b, c", "d"), ("e", "f")]),
        ("tabs.csv", "q\ta\nis it 1, 2; or 3 ?\tno, none\n", [("is it 1, 2; or 3 ?", "no, none")]),
        ("commas.tsv", "q,a\n1,2\n", [("1", "2")]),
        ("usual.csv", 'q;r,a\n"1;2",3\n', [("1;2", "3")]),
        ("one.csv", "text\nis it; or not\n", [("is it; or not",)]),
    ],
)
def test_semicolons_and_tabs_are_recognised(
    tmp_path: Path, name: str, content: str, rows: list[tuple[str, ...]]
) -> None:
    found = read_text_file(write(tmp_path, name, content))[1]
    assert [tuple(row.values()) for row in found] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a\n1,2\n3\n", "line 3: 1 cells, but the header has 2"),
        ("q,a\n1,2,3\n", "line 2: 3 cells, but the header has 2"),
        ('q,a\n1,"2\n3,4\n', "line 3: .*is a quote not closed"),
        ("", "is empty"),
        ("\n", "is empty"),
        ("q,a,q\n1,2,3\n", "two columns named 'q'"),
        ("q,a\n1,\u00e9\n".encode("latin-1"), "not UTF-8 text .byte 0xe9"),
        ("q,a\n1,2\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_broken_csv_names_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text_file(write(tmp_path, "a.csv", content))


def test_csv_with_huge_cells_and_nul_bytes(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    huge = "word " * 200_000
    _, rows = read_text_file(write(tmp_path, "a.csv", f"q,a\nx\0y,{huge}\n"))
    assert rows == [{"q": "x\0y", "a": huge}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "content",
    [
        '{"q": "007", "a": "2020-01-01"}\n\n{"q": "x\u2028y", "c": {"d": true}}\n',
        '\ufeff[{"q": "007", "a": "2020-01-01"},\n {"q": "x\u2028y", "c": {"d": true}}]',
    ],
)
def test_json_values_stay_as_written(tmp_path: Path, content: str) -> None:
    """``datasets`` makes times of dates, and numbers of digits where a column is mixed."""
    for name in ("a.json", "a.jsonl"):
        columns, rows = read_text_file(write(tmp_path, name, content))
        assert columns == ["q", "a", "c"]
        assert rows == [
            {"q": "007", "a": "2020-01-01", "c": None},
            {"q": "x\u2028y", "a": None, "c": {"d": True}},
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q": 1}\n{"q": 2}\n{"q": "thr', "line 3, is not JSON .*is the file cut off"),
        ('[{"q": 1},\n{"q": 2},\n{"q"', "line 3, is not JSON .*is the file cut off"),
        ('{\n"q": 1\n}', "line 2, is not JSON .*one object per line"),
        ('"text"\n', "line 1: JSON data must be one object per line"),
        ("[1, 2]", "JSON data must be"),
        ("[" * 100_000, "can't be read as JSON|is not JSON"),
        ('{"q": "\u00e9"}'.encode("latin-1"), "not UTF-8 text"),
    ],
)
def test_broken_json_names_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text_file(write(tmp_path, "a.jsonl", content))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    def refuse(*arguments: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.csv", "q\n1\n")
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(DataError, match=r"can't be read: .*Permission denied"):
        read_text_file(path)
