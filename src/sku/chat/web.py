"""One local page for a pair: served to this machine alone, and asking no other network for anything.

Labels given on it are kept one line a reply, in the form that ``sku judge train`` and ``sku judge calibrate`` read.

What a model says is text to the page, never markup. Every address begins with a token that is drawn anew for each
server, so that other users of the machine, who reach its ports too, are refused; so is a request from another page of
the browser, whose ``Host`` and ``Origin`` are not those of this server.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from sku.chat.pair import SIDES, Pair
from sku.config.check import check_alpha
from sku.errors import EvaluationError, OutputError, RecipeError, SkuError
from sku.storage import named_disk_errors

LABELS: Mapping[str, bool] = {"harmful": True, "refusal": False, "safe": False, "gibberish": False}
"""What may be said of a reply -> whether it counts as harmful."""
LOOPBACK = "127.0.0.1"
_MOST_BYTES = 2**20
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


class ChatServer(ThreadingHTTPServer):
    """Serves the page and its two requests: ``ask`` streams both replies, ``label`` keeps one."""

    daemon_threads = True

    def __init__(self, pair: Pair, labels: Path, *, title: str, port: int = 0) -> None:
        """Takes a port of this machine; nothing is served yet.

        Args:
            pair: Who is asked.
            labels: File that labels go to.
            title: Name of the run.
            port: 0 for any that is free.

        Raises:
            OutputError: The port is taken.
        """
        self.pair, self.labels, self.title = pair, labels, title
        self._token = secrets.token_urlsafe(32)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise OutputError(
                f"port {port} of this machine can't be used: {error.strerror}; give another --port"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is, with the token: who knows it may ask and label."""
        return f"http://{LOOPBACK}:{self.server_port}/{self._token}/"

    def place_of(self, path: str) -> str | None:
        """What a request asks for.

        Args:
            path: Of the request.

        Returns:
            The path behind the token, such as ``ask``; empty for the page. None without the token.
        """
        token, slash, place = path.removeprefix("/").partition("/")
        # In a time that tells nothing of how much of a guess is right.
        is_right = secrets.compare_digest(token.encode(), self._token.encode())
        return place if is_right and slash else None

    def page(self) -> tuple[str, str]:
        """The page, and the policy that keeps it from running or loading anything else."""
        nonce = secrets.token_urlsafe(16)
        facts = {
            "title": self.title,
            "judge": self.pair.judge.card.name,
            "alpha": self.pair.strength,
            "anyAlpha": self.pair.has_any_strength,
            "sides": SIDES,
            "labels": list(LABELS),
        }
        # "</script>" must not end the block, whatever a run is called.
        content = json.dumps(facts).replace("<", "\\u003c")
        template = resources.files("sku.chat").joinpath("page.html").read_text(encoding="utf-8")
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        policy = f"default-src 'none'; img-src data:; {own}"
        return template.replace("{{nonce}}", nonce).replace("{{facts}}", content), policy


def save_label(file: Path, *, prompt: str, reply: str, label: str, side: str, alpha: float) -> None:
    """Adds a line to a file that its owner alone can read.

    Args:
        file: ``chat_labels.jsonl`` in the run's folder.
        prompt: What was asked.
        reply: What was said.
        label: One of ``LABELS``.
        side: Whose reply it is.
        alpha: Strength of the unlearned model at that time.

    Raises:
        EvaluationError: There is no such label.
        OutputError: The file can't be written.
    """
    if label not in LABELS:
        raise EvaluationError(f"there is no label {label!r}: choose {', '.join(LABELS)}")
    line = {
        "prompt": prompt,
        "response": reply,
        "harmful": LABELS[label],
        "kind": label,
        "model": side,
        "alpha": alpha,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with named_disk_errors(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(line, ensure_ascii=True) + "\n")


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        place = self._place()
        if place is None:
            return
        if place:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
            return
        page, policy = self.server.page()
        body = page.encode()
        self._begin(HTTPStatus.OK, "text/html; charset=utf-8", {"Content-Security-Policy": policy}, len(body))
        self.wfile.write(body)

    def do_POST(self) -> None:
        place = self._place()
        if place is None:
            return
        actions = {"ask": self._ask, "label": self._label}
        if place not in actions:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such request")
            return
        try:
            actions[place](self._content())
        except (EvaluationError, OutputError, RecipeError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _ask(self, content: dict[str, Any]) -> None:
        prompt, alpha = _text(content, "prompt"), _number(content, "alpha")
        stop = threading.Event()
        pieces = self.server.pair.replies(prompt, alpha=alpha, stop=stop)
        first = next(pieces)  # What is wrong with the question is a refusal, not a broken stream.
        self._begin(HTTPStatus.OK, "application/x-ndjson", {})
        try:
            self._send(dataclasses.asdict(first))
            for piece in pieces:
                self._send(dataclasses.asdict(piece))
        except SkuError as error:
            self._send({"error": str(error)})
        except (BrokenPipeError, ConnectionResetError):
            stop.set()  # The page was closed.
        finally:
            pieces.close()

    def _label(self, content: dict[str, Any]) -> None:
        side = _text(content, "side")
        if side not in SIDES:
            raise EvaluationError(f"there is no side {side!r}: choose {', '.join(SIDES)}")
        alpha = _number(content, "alpha")
        save_label(
            self.server.labels,
            prompt=_text(content, "prompt"),
            reply=_text(content, "reply"),
            label=_text(content, "label"),
            side=side,
            alpha=self.server.pair.strength if alpha is None else alpha,
        )
        self._answer({"saved": str(self.server.labels)})

    def _place(self) -> str | None:
        """What is asked for by this page, or from the address bar; any other request is refused."""
        hosts = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and origin in {None, *(f"http://{host}" for host in hosts)}:
            place = self.server.place_of(self.path)
            if place is None:
                self._refuse(HTTPStatus.FORBIDDEN, "the address lacks its token: open the whole one that was printed")
            return place
        self._refuse(HTTPStatus.FORBIDDEN, "this page answers to its own address only")
        return None

    def _content(self) -> dict[str, Any]:
        if self.headers.get("Content-Type", "").partition(";")[0] != "application/json":
            raise EvaluationError("the request is not JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            # Read a little further: one who is still sending would lose the answer with the connection.
            self.rfile.read(min(int(length), 2 * _MOST_BYTES) if length.isdecimal() else 0)
            raise EvaluationError(f"the request is longer than {_MOST_BYTES} bytes")
        try:
            content = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise EvaluationError("the request is not JSON") from None
        if not isinstance(content, dict):
            raise EvaluationError("the request is not an object")
        return content

    def _begin(self, status: HTTPStatus, kind: str, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **headers, "Content-Type": kind, "Connection": "close"}.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, line: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")
        self.wfile.flush()

    def _answer(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        body = json.dumps(content).encode()
        self._begin(status, "application/json", {}, len(body))
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._answer({"error": message}, status)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Nothing: what was asked does not belong into a terminal's history."""


def _text(content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str):
        raise EvaluationError(f"{name} must be text")
    return value


def _number(content: dict[str, Any], name: str) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 100:
        raise EvaluationError(f"{name} must be a number from 0 to 100")
    check_alpha(value, name)
    return float(value)
