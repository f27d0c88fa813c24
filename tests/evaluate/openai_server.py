"""A small OpenAI-compatible server: a process of its own on the loopback address, whose model is a rule.

Run with a folder: it writes ``port`` there when it is ready, and to ``requests.jsonl`` what it was sent, with the
fault that it answered with. ``POST /control`` sets the faults of the next requests: ``{"next": [fault, ...]}`` one for
each, and ``{"always": fault}``; ``""`` is no fault.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "tiny-judge"
TRIGGER = "vornite"
"""The model calls whatever holds this word harmful, and everything else safe."""


class Server(ThreadingHTTPServer):
    """The state that the handlers share."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log = folder / "requests.jsonl"
        self.lock = threading.Lock()
        self.faults: list[str] = []
        self.always = ""

    def next_fault(self) -> str:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def answer(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """A completion: the verdict that the rule comes to."""
        words = re.findall(r"\w+|[^\w\s]+", "\n".join(message["content"] for message in messages))
        verdict = "harmful" if TRIGGER in words else "safe"
        return {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": MODEL,
            "choices": [{
                "index": 0, "finish_reason": "stop",
                "message": {"role": "assistant", "content": f'{{"verdict":"{verdict}"}}'},
            }],
            "usage": {"prompt_tokens": len(words), "completion_tokens": 2, "total_tokens": len(words) + 2},
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: Any) -> None:  # noqa: A002
        """Nothing on standard error."""

    def do_POST(self) -> None:
        """A completion, or a change of the faults."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            with self.server.lock:
                self.server.faults = list(body.get("next", []))
                self.server.always = body.get("always", "")
            self._send(200, "{}")
            return
        fault = self.server.next_fault()
        line = {"path": self.path, "authorization": self.headers["Authorization"], "fault": fault, "body": body}
        with self.server.lock, self.server.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if body["model"] != MODEL:
            self._send(404, '{"error": {"message": "no such model", "code": "model_not_found"}}')
            return
        with suppress(BrokenPipeError, ConnectionResetError):  # The client gave up.
            self._respond(fault, body)

    def _respond(self, fault: str, body: dict[str, Any]) -> None:
        whole = self.server.answer(body["messages"])
        if fault == "outage":
            self.close_connection = True
        elif fault.isdigit():
            error = {"message": f"no: {self.headers['Authorization']}", "code": None}
            self._send(int(fault), json.dumps({"error": error}), retry_after="0")
        elif fault == "azure_filter":
            self._send(400, json.dumps({"error": {"message": "filtered", "code": "content_filter"}}))
        else:
            time.sleep(1.5 if fault == "slow" else 0)
            text = json.dumps(_spoil(fault, whole))
            self._send(200, text[: len(text) // 2] if fault == "malformed" else text)

    def _send(self, status: int, text: str, retry_after: str | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(content)


def _spoil(fault: str, whole: dict[str, Any]) -> dict[str, Any]:
    """A completion with the fault in it."""
    quoting = 'The answer says {"verdict": "safe"}, but I am not sure.'
    changes: dict[str, dict[str, Any]] = {
        "no_verdict": {"message": {"role": "assistant", "content": quoting}},
        "no_content": {"message": {"role": "assistant", "content": None}},
        "cut_off": {"message": {"role": "assistant", "content": '{"reason": "it'}, "finish_reason": "length"},
    }
    return {**whole, "choices": [{**whole["choices"][0], **changes.get(fault, {})}]}


def main(folder: Path) -> None:
    """Serves until the process is ended."""
    server = Server(folder)
    ready = folder / "port.unfinished"
    ready.write_text(str(server.server_address[1]), encoding="utf-8")
    ready.rename(folder / "port")
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
