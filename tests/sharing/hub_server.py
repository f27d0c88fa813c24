"""A stand-in for the Hugging Face hub: what an upload asks of it, on the loopback address, with faults to order."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInTokenOfTheTests0123456789"


@dataclass
class Repository:
    """What a repository holds."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


class Hub(ThreadingHTTPServer):
    """State that the handlers share."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.faults: dict[str, list[int]] = {}
        """Part of a path -> statuses of the next requests to it; 0 closes the connection, 1 never answers."""
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, part: str) -> int:
        """Requests whose path begins with a text or holds it behind a repository's name."""
        return sum(path.startswith(part) or part in path.partition("/api/models/")[2] for _, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.requests.append((method, path))
        for part, statuses in hub.faults.items():
            if part in path and statuses:
                status = statuses.pop(0)
                if status == 1:
                    hub.stalled.set()
                    time.sleep(30)
                if status in (0, 1):
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self._send(status, {"error": f"ordered fault {status}"})
        if path.startswith("/lfs/"):
            return self._lfs(path, body)
        if path == "/api/agent-harnesses":  # The client asks for it without a token, once a process.
            return self._send(200, {})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.tokens.add(token)
        if token != TOKEN:
            return self._send(401, {"error": "Invalid credentials"})
        return self._api(path, body)

    def _lfs(self, path: str, body: bytes) -> None:
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "wrong content"})
        self.server.blobs[oid] = body
        return self._send(200, {})

    def _api(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.repositories:
                return self._send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            private = asked.get("private", asked.get("visibility") == "private")
            hub.repositories[name] = Repository(private=bool(private))
            return self._send(200, {"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send(
                200, {"transfer": "basic", "objects": [self._object(o) for o in json.loads(body)["objects"]]}
            )
        name = "/".join(path.split("/")[3:5])
        repository = hub.repositories.get(name)
        if repository is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        _, _, rest = path.partition(f"{name}/")
        action, _, revision = rest.partition("/")
        if not action or action == "revision":
            return self._send(200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": []})
        if action == "branch":
            repository.branches.setdefault(revision, {})
            return self._send(200, {})
        if revision not in repository.branches:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            return self._send(200, {"files": [
                {"path": file["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        assert action == "commit"
        return self._commit(name, repository.branches[revision], body)

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid = asked["oid"]
        known = {"oid": oid, "size": asked["size"]}
        if oid in self.server.blobs:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.server.url}/lfs/{oid}", "header": {}}}}

    def _commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'1' * 40}"
        self._send(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

    def _send(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
