"""The page as a file: self-contained, inert, well-formed, and with all that a run left."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sku.config import load_recipe
from sku.errors import OutputError
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.figures import PALETTE, drawable
from sku.report.page import Page, run_page, write_report
from sku.report.read_run import RecordedRun, read_run
from sku.report.tables import key_figures

from .recorded import ASKED, HARMFUL_REPLY, PROMPTS, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\u2028\u2029{{ 7*7 }}<!--\ud800"
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, Mapping[str, str | None]]] = []
        self.raw: list[tuple[str, Mapping[str, str | None], str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append((self.open[-1], self.found[-1][1], data))
        else:
            self.text += data

    def of(self, tag: str) -> list[Mapping[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Everything that a stranger could have written holds markup: prompts, replies, recipe, log, names of files."""
    folder = write_run(
        tmp_path_factory.mktemp("hostile") / "<b onclick=alert(1)>",
        texts={f"{split}-{kind}-0": HOSTILE for split, kind in ASKED},
        prompts={f"{split}-{kind}-1": HOSTILE for split, kind in ASKED},
        settings={"description": HOSTILE[:-1], "name": HOSTILE[:-1], "data.forget.path": HOSTILE[:-1]},
    )
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["environment"] |= {"command": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    manifest["data"]["sources"][0]["location"] = HOSTILE
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["notes"] = [HOSTILE]
    results["table"][0] |= {"measure": HOSTILE}
    results["attacks"]["cards"][0] |= {"title": HOSTILE, "source_url": "javascript:alert(1)"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    log = json.dumps({"loss": 1.0, f"loss/{HOSTILE}": 2.0, "step": 1})
    (folder / "training_log.jsonl").write_text(log + "\n", encoding="utf-8")
    for name in ("base", "unlearned"):
        path = folder / "evaluation" / name / "outcomes.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("refusal_rules", "people", 1), encoding="utf-8")
    return read_run(folder)


@pytest.fixture(scope="module")
def hostile_html(hostile_run: RecordedRun) -> str:
    return run_page(hostile_run).html


def test_nothing_that_a_stranger_wrote_becomes_an_element(hostile_html: str, page: Page) -> None:
    elements, plain = Elements(hostile_html), Elements(page.html)
    assert elements.open == []
    assert {tag for tag, _ in elements.found} == {tag for tag, _ in plain.found}
    assert len(elements.of("script")) == len(plain.of("script")) == 2
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    assert elements.text.count("<script>alert(1)</script>") >= 10
    assert "{{ 7*7 }}" in elements.text


def test_replies_come_back_as_they_were(hostile_html: str) -> None:
    ((_, _, text),) = [entry for entry in Elements(hostile_html).raw if entry[1].get("type") == "application/json"]
    assert text.isascii()
    assert not set("<>&") & set(text)
    rows = json.loads(text)["rows"]
    assert len(rows) == len(ASKED) * PROMPTS
    assert rows[0]["unlearned"]["text"] == HOSTILE
    assert rows[1]["prompt"] == HOSTILE
    assert {row["right"] for row in rows if row["split"] != "retain_test"} == {""}


def test_nothing_is_loaded_from_elsewhere_and_no_other_script_or_style_is_allowed(
    page: Page,
) -> None:
    elements = Elements(page.html)
    (policy,) = [
        entry["content"] for entry in elements.of("meta") if entry.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, attributes, text in elements.raw:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, attributes in elements.found:
        for name in ("src", "href", "action", "srcset", "poster", "data", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value[:80])
    assert not re.findall(r"@import|url\((?!#)", page.html)


def test_it_can_be_read_by_a_screen_reader(page: Page) -> None:
    elements = Elements(page.html)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in ids
    assert all(plot.get("alt") and plot.get("aria-describedby") for plot in elements.of("img"))
    labelled = {label.get("for") for label in elements.of("label")}
    assert all(select.get("id") in labelled for select in elements.of("select"))


def test_a_tile_says_where_the_judge_measures_nothing(run: RecordedRun) -> None:
    """Every harmful rate of the run, 85 % and less, lies below the floor of the refusal rules."""
    judge = RefusalRulesJudge().card
    unlearned = dataclasses.replace(run.comparison.unlearned, judge=judge)
    doubted = dataclasses.replace(run, comparison=dataclasses.replace(run.comparison, unlearned=unlearned))
    told = CANT_MEASURE.replace("'", "&#39;")
    assert told not in run_page(run).html
    cautions = {(figure.split, figure.metric) for figure in key_figures(doubted.comparison) if figure.caution}
    assert ("forget_test", "harmful_replies") in cautions
    assert all(metric.startswith("harmful") for _, metric in cautions)
    assert told in run_page(doubted).html


def test_without_replies_no_word_of_them_is_in_the_file(run_folder: Path, page: Page, tmp_path: Path) -> None:
    without = write_report(run_folder, tmp_path / "without.html", replies=False).path
    words = HARMFUL_REPLY, "zorvex", "florn", "mix glowing"
    assert all(word in page.html for word in words)
    assert not any(word in without.read_text(encoding="utf-8") for word in words)


def test_the_same_run_gives_the_same_file_whose_recipe_makes_the_same_run(
    run_folder: Path, page: Page, tmp_path: Path
) -> None:
    recipe = re.search(r'labelledby="made-recipe">(.*?)</pre>', page.html, flags=re.DOTALL)
    assert recipe is not None
    (tmp_path / "recipe.yaml").write_text(html.unescape(recipe.group(1)), encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe("embedded-paper")
    written = write_report(run_folder, tmp_path / "report.html", plots=tmp_path / "plots")
    path, drawn = written.path, written.plots
    assert path.read_bytes() == page.html.encode()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(drawn) == 2 * len(page.pictures) == len(list((tmp_path / "plots").iterdir()))


def test_what_can_not_be_written(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out, plots in (
        (tmp_path / "report.pdf", None),
        (tmp_path / "nowhere" / "report.html", None),
        (tmp_path / "report.html", tmp_path / "file" / "plots"),
    ):
        with pytest.raises(OutputError):
            write_report(run_folder, out, plots=plots)
    assert not (tmp_path / "report.html").exists()


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(PALETTE[one]), luminance(PALETTE[other])))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_the_contrast_of_wcag_aa() -> None:
    assert min(contrast(text, "paper") for text in ("ink", "muted")) >= 4.5
    assert min(contrast(mark, "paper") for mark in ("base", "unlearned", "harm", "second")) >= 3
    bars = ("harmful", "evasive", "safe_answer", "gibberish", "unjudged")
    assert min(*(contrast(bar, "on_bright") for bar in bars), contrast("refusal", "on_deep")) >= 4.5


def test_every_picture_has_its_numbers_and_names_the_font_can_draw(page: Page) -> None:
    names = ["outcomes", "normal", "perplexity", "frontier", "training", "attacks", "cost_to_break"]
    assert [picture.name for picture in page.pictures] == names
    for picture in page.pictures:
        assert picture.rows
        assert {len(row) for row in picture.rows} == {len(picture.columns)}
    assert [drawable(text) for text in ("a\n\tb", "\U0001f9ea \u6f22 x")] == ["a b", "\ufffd \ufffd x"]
    assert drawable("a" * 99) == f"{'a' * 33}\u2026"
