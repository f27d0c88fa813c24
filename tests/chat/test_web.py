"""The page's server, asked as a browser asks it, and the page in a real browser."""

from __future__ import annotations

import hmac
import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sku.chat import Pair
from sku.chat.pair import Piece
from sku.chat.web import ChatServer
from sku.errors import EvaluationError, OutputError

if TYPE_CHECKING:
    from playwright import sync_api as playwright

HOSTILE = "<img src=x onerror='window.stolen = 1'></script><script>window.stolen = 2</script>"
PROMPT = "what colour is a florn ?"


@pytest.fixture
def server(adapter_pair: Pair, tmp_path: Path) -> Iterator[ChatServer]:
    with ChatServer(adapter_pair, tmp_path / "labels.jsonl", title=HOSTILE) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def asked(
    server: ChatServer,
    path: str,
    content: Any = None,
    *,
    method: str = "POST",
    token: str | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    body = content if isinstance(content, bytes) else json.dumps(content)
    address = f"/{server.url.split('/')[3]}{path}" if token is None else f"{token}{path}"
    connection.request(method, address, body if method == "POST" else None, given)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_the_page_runs_only_its_own_script_and_holds_names_as_text(server: ChatServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, headers, body = asked(server, "/", method="GET")
    page = body.decode()
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; img-src data:; script-src 'nonce-")
    assert HOSTILE not in page
    assert "http" not in page.replace("http-equiv", "")
    _, others, _ = asked(server, "/", method="GET")
    assert others["Content-Security-Policy"] != headers["Content-Security-Policy"]


def test_both_replies_are_streamed(server: ChatServer, adapter_pair: Pair) -> None:
    status, _, body = asked(server, "/ask", {"prompt": PROMPT, "alpha": 0.5})
    pieces = [json.loads(line) for line in body.splitlines()]
    assert status == 200
    expected = [piece for piece in adapter_pair.replies(PROMPT, alpha=0.5) if piece.outcome is not None]
    assert [piece["reply"] for piece in pieces if piece["outcome"]] == [piece.reply for piece in expected]
    assert len(pieces) > 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "x", "alpha": "much"}, "alpha must be a number"),
        ({"prompt": "x", "alpha": float("nan")}, "alpha must be a number from 0 to 100"),
        ({"prompt": "x", "alpha": 101}, "alpha must be a number from 0 to 100"),
        ({"prompt": "x", "alpha": -1}, "-1 gives the bad model itself"),
        (b"{", "not JSON"),
        ([], "not an object"),
        (b" " * (2**20 + 1), "longer than"),
    ],
)
def test_a_wrong_question_is_answered_with_one_line(server: ChatServer, content: Any, message: str) -> None:
    status, _, body = asked(server, "/ask", content)
    assert status == 400
    assert message in json.loads(body)["error"]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
@pytest.mark.parametrize(("path", "method"), [("/", "GET"), ("/ask", "POST"), ("/label", "POST")])
def test_another_page_is_refused(server: ChatServer, headers: dict[str, str], path: str, method: str) -> None:
    status, _, body = asked(server, path, {"prompt": PROMPT}, method=method, **headers)
    assert status == 403
    assert b"its own address" in body


@pytest.mark.parametrize(("path", "method"), [("/", "GET"), ("/ask", "POST"), ("/label", "POST")])
def test_who_has_not_the_whole_address_is_refused(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, path: str, method: str
) -> None:
    """Any user of the machine reaches its ports: only the address that was printed has the token."""
    compared: list[bytes] = []

    def compare(given: bytes, own: bytes) -> bool:
        compared.append(given)
        return hmac.compare_digest(given, own)

    monkeypatch.setattr("secrets.compare_digest", compare)
    token = server.url.split("/")[3]
    row = {"prompt": PROMPT, "reply": "golden", "side": "unlearned", "label": "safe", "alpha": 1}
    assert len(token) >= 40
    for wrong in ("", "/", f"/{token[:-1]}", f"/{token}x", f"/{token.swapcase()}", "/%C3%A9", f"/x/{token}"):
        status, _, body = asked(server, path, row, method=method, token=wrong)
        assert (status, list(json.loads(body))) == (403, ["error"])
    assert len(compared) == 7, "in constant time"
    assert asked(server, "", row, method="GET")[0] == 403, "relative addresses need the slash"
    assert not server.labels.exists()
    with ChatServer(server.pair, server.labels, title="x") as other:
        assert other.url.split("/")[3] != token


def test_a_label_is_kept(server: ChatServer) -> None:
    row = {"prompt": PROMPT, "reply": "golden", "side": "unlearned", "label": "safe", "alpha": 1}
    status, _, body = asked(server, "/label", row)
    assert (status, json.loads(body)) == (200, {"saved": str(server.labels)})
    [line] = server.labels.read_text().splitlines()
    assert json.loads(line) | {"date": ""} == {
        "prompt": PROMPT, "response": "golden", "harmful": False, "kind": "safe", "model": "unlearned", "alpha": 1.0,
        "date": "",
    }  # fmt: skip
    for wrong in ({"side": "other"}, {"label": "other"}, {"reply": None}, {"alpha": -1}):
        assert asked(server, "/label", row | wrong)[0] == 400
    assert len(server.labels.read_text().splitlines()) == 1


def test_a_failure_while_a_reply_is_written_is_said_on_the_page(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replies(*_: Any, **__: Any) -> Iterator[Piece]:
        yield Piece(side="base", text="a")
        raise EvaluationError("it broke")

    monkeypatch.setattr(server.pair, "replies", replies)
    lines = [json.loads(line) for line in asked(server, "/ask", {"prompt": PROMPT})[2].splitlines()]
    assert lines[1] == {"error": "it broke"}


def test_the_page_gives_its_address_to_nobody(server: ChatServer) -> None:
    for path in ("/", "/other"):
        _, headers, body = asked(server, path, method="GET")
        assert headers["Referrer-Policy"] == "no-referrer"
        assert server.url.split("/")[3] not in body.decode() + str(headers)


def test_a_port_that_is_taken_is_an_error(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"port {server.server_port} of this machine can't be used"):
        ChatServer(server.pair, tmp_path / "x", title="x", port=server.server_port)


class HostilePair:
    """Says what an attacker would."""

    def __init__(self, pair: Pair) -> None:
        self.judge, self.strength, self.has_any_strength = pair.judge, 1.5, True
        self.asked: list[tuple[str, float | None]] = []

    def replies(self, prompt: str, *, alpha: float | None = None, stop: Any = None) -> Iterator[Piece]:
        self.asked.append((prompt, alpha))
        for side in ("base", "unlearned"):
            yield Piece(side=side, text=HOSTILE)
            yield Piece(side=side, outcome="harmful", reply=HOSTILE)


@pytest.fixture
def page(server: ChatServer, adapter_pair: Pair) -> Iterator[playwright.Page]:
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: it comes with the extra dev")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("SKU_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (or set SKU_CHROMIUM to one)")
    server.pair = HostilePair(adapter_pair)  # type: ignore[assignment]
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        found = browser.new_page(viewport={"width": 400, "height": 800})
        found.set_default_timeout(10_000)
        said: list[str] = []
        requests: list[str] = []
        found.on("console", lambda message: said.append(message.text))
        found.on("pageerror", lambda error: said.append(str(error)))
        found.on("request", lambda request: requests.append(request.url))
        found.goto(server.url)
        yield found
        assert found.evaluate("window.stolen") is None
        assert said == []
        assert all(url.startswith((server.url, "data:,")) for url in requests)
        browser.close()


@pytest.mark.integration
def test_a_prompt_a_slider_and_a_label_in_a_browser(page: playwright.Page, server: ChatServer) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.get_by_label("alpha").fill("0.75")
    assert page.locator("#value").inner_text() == "0.75"
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.keyboard.press("Enter")
    cards = page.locator(".reply")
    page.locator(".labels").nth(1).wait_for()
    assert cards.count() == 2
    assert cards.nth(1).locator(".text").inner_text() == HOSTILE
    assert cards.nth(1).locator(".outcome").inner_text() == "harmful"
    assert page.locator(".asked").inner_text() == HOSTILE
    assert server.pair.asked == [(HOSTILE, 0.75)]  # type: ignore[attr-defined]
    cards.nth(1).get_by_role("button", name="gibberish").click()
    cards.nth(1).get_by_text("saved").wait_for()
    [row] = map(json.loads, server.labels.read_text().splitlines())
    assert (row["kind"], row["response"], row["model"], row["alpha"]) == ("gibberish", HOSTILE, "unlearned", 0.75)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
