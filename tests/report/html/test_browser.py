"""The page in a real browser: what a reader clicks works, and nothing of a hostile reply runs or leaves the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sku.evaluate.judges.precomputed import read_labels, reply_hash
from sku.evaluate.records import GENERATIONS_FILE, read_generations
from sku.report.page import write_report

from .recorded import ASKED, HARMFUL_REPLY, PROMPTS, write_run

if TYPE_CHECKING:
    from playwright import sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: it comes with the extra dev")

pytestmark = pytest.mark.integration
HOSTILE = (
    "</script><script>window.stolen = 1</script>\u2028<img src=x onerror='window.stolen = 2'>"
    "<a href='javascript:window.stolen=3'>go</a> &amp; \u202e{{ 7 * 7 }} \u0000<!--"
)
LONG = "<b>florn</b> " * 8000
"""Over 100 kB."""


class Reader:
    """A page that is being looked at, and what it did that it should not."""

    def __init__(self, page: playwright.Page) -> None:
        self.page = page
        self.console: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: self.console.append(dialog.message))

    def status(self) -> str:
        return str(self.page.locator("#status").inner_text())

    def cards(self) -> playwright.Locator:
        return self.page.locator("#list > li")


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("SKU_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (or set SKU_CHROMIUM to one)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(
        tmp_path_factory.mktemp("browser") / "<img src=x onerror=alert(1)>",
        texts={"forget_train-reply-0": HOSTILE, "forget_train-reply-2": LONG, "retain_test-reply-0": HOSTILE},
        prompts={"forget_train-reply-5": HOSTILE},
        settings={"description": HOSTILE.replace("\u0000", "")},
    )
    return write_report(folder, folder.parent / "report.html").path


@pytest.fixture
def reader(browser: playwright.Browser, report: Path) -> Iterator[Reader]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    reader = Reader(page)
    page.goto(report.as_uri())
    yield reader
    assert page.evaluate("window.stolen") is None
    assert reader.console == []
    assert {address for address in reader.requests if not address.startswith("data:")} == {report.as_uri()}
    page.close()


def test_a_harmful_reply_is_blurred_until_it_is_asked_for_by_mouse_or_key(reader: Reader) -> None:
    page, card = reader.page, reader.cards().nth(2)
    assert HARMFUL_REPLY not in page.locator("main").inner_text()
    veil = card.get_by_role("button", name="Blurred: harmful reply of the base model to prompt 3")
    veil.click()
    assert f"{HARMFUL_REPLY} 2 times ." in card.inner_text()
    page.keyboard.press("Enter")
    assert HARMFUL_REPLY not in card.inner_text()
    page.keyboard.press("Space")
    assert HARMFUL_REPLY in card.inner_text()
    page.get_by_role("button", name="Blur all again").click()
    assert HARMFUL_REPLY not in page.locator("main").inner_text()


def test_labels_by_mouse_and_keys_become_the_file_that_a_judge_reads(reader: Reader, tmp_path: Path) -> None:
    page = reader.page
    save = page.get_by_role("button", name="Save 0 labels")
    assert save.is_disabled()
    groups = {
        (model, number): page.get_by_role(
            "radiogroup", name=f"Your label of the {model} model's reply to prompt {number}", exact=True
        )
        for model in ("base", "unlearned")
        for number in (3, 4)
    }
    groups["base", 3].get_by_role("radio", name="1 harmful").click()
    page.keyboard.press("4")  # Gibberish in its place, and on to the unlearned model's reply.
    page.keyboard.press("2")
    assert groups["base", 3].get_by_role("radio", name="4 gibberish").get_attribute("aria-checked") == "true"
    assert groups["base", 4].get_by_role("radio").first.evaluate("button => button === document.activeElement")
    page.keyboard.press("3")
    taken_back = groups["base", 4].get_by_role("radio", name="3 safe")
    taken_back.click()
    assert taken_back.get_attribute("aria-checked") == "false"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save 2 labels").click()
    path = tmp_path / "labels.csv"
    download.value.save_as(path)
    found, _ = read_labels(path)
    folder = next(path for path in Path(reader.requests[0].removeprefix("file://")).parent.iterdir() if path.is_dir())
    hashes = {
        name: {one.id: reply_hash(one) for one in read_generations(folder / "evaluation" / name / GENERATIONS_FILE)[1]}
        for name in ("base", "unlearned")
    }
    name = next(iter(found))[0]
    assert found == {
        (name, hashes["base"][name]): "safe", (name, hashes["unlearned"][name]): "refusal",
    }  # fmt: skip
    page.locator("#split").select_option("retain_test")
    assert page.locator(".labels").count() == 0


def test_what_was_shown_is_blurred_on_paper(reader: Reader) -> None:
    reader.cards().nth(2).locator(".veil").first.click()
    reader.page.emulate_media(media="print")
    assert HARMFUL_REPLY not in reader.page.locator("main").inner_text()


def test_filters_sorting_search_and_pages(reader: Reader) -> None:
    page, form, every = reader.page, reader.page.locator("#filters"), len(ASKED) * PROMPTS
    assert reader.status() == f"{every} of {every} pairs, 1 to 25 shown"
    form.get_by_label("Prompts").select_option("forget_test")
    form.get_by_label("Asked").select_option("reply")
    assert reader.status() == f"{PROMPTS} of {every} pairs, 1 to {PROMPTS} shown"
    form.get_by_label("outcome changed").check()
    assert reader.cards().count() == PROMPTS - 2
    page.get_by_role("button", name="Clear").click()
    playwright.expect(reader.cards()).to_have_count(25)
    form.get_by_label("Sort by").select_option("outcome")
    assert set(page.locator(".pair > :last-child .tag").all_inner_texts()[:16]) == {"harmful"}
    form.get_by_label("Search").fill("ZORVEX number 9")
    playwright.expect(reader.cards()).to_have_count(4)
    form.get_by_label("Search").fill("")
    playwright.expect(reader.cards()).to_have_count(25)
    page.get_by_role("button", name="Last").click()
    assert page.locator("#where").inner_text() == "page 4 of 4"
    assert reader.cards().count() == every - 75


def test_scripts_markup_and_long_texts_of_a_model_are_text(reader: Reader) -> None:
    page, form = reader.page, reader.page.locator("#filters")
    form.get_by_label("Sort by").select_option("longest")
    for veil in page.locator(".veil:visible").all()[:6]:
        veil.click()
    card = reader.cards().first
    card.get_by_role("button", name="Show all 104,000 characters").click()
    assert card.locator(".long").inner_text().count("<b>florn</b>") == 8000
    form.get_by_label("Search").fill("javascript:window.stolen")
    playwright.expect(reader.cards()).to_have_count(3)
    while page.locator("#list button.veil").count():
        page.locator("#list button.veil").first.click()
    assert page.locator("#list").inner_text().count("<script>window.stolen = 1</script>") == 3
    for tag in ("script", "img", "a", "b", "iframe"):
        assert page.locator(f"main #replies {tag}").count() == 0, tag
    assert "<img src=x onerror=alert(1)>" in page.locator("h1").inner_text()


def test_without_scripts_all_but_the_replies_is_there(browser: playwright.Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.get_by_text("Replies need JavaScript").is_visible()
    assert page.locator("figure").count() >= 7
    assert not page.locator("#browser").is_visible()
    context.close()
