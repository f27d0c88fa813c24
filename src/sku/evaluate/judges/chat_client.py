"""Chat completions over HTTP that end: in time, in size, and always with an answer or a reason.

The ``openai`` package sends the requests and repeats them after 408, 409, 429, 5xx, a timeout and a lost connection.
Added here: a pace that its repetitions keep too, a time and a size limit for whole answers (its own time limit is for
each read, which a server that sends a byte now and then never exceeds), and a strict reading of the body. No message
of this file holds a key or words of the server.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sku.errors import EvaluationError
from sku.evaluate.judges.chat_messages import Message

MAX_BODY_BYTES = 4 * 2**20
"""A longer answer of the server is broken off."""
_KEY_REFUSED = (401, 403)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model said."""

    text: str
    cut: bool
    """Whether it was cut off at the most tokens allowed."""
    input_tokens: int
    """As the server counts them; 0 where it doesn't."""
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no answer."""

    reason: str
    ask_again: bool = False
    """Whether the same question may be answered if it is put once more."""
    outage: bool = False
    """Whether it says something of the server, not of this question."""


class ChatClient:
    """One model behind one address. Connections are held within ``with client:`` alone."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        key: str | None,
        key_name: str | None,
        request: Mapping[str, Any],
        timeout_s: float,
        max_retries: int,
        requests_per_minute: float | None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            base_url: Such as ``http://localhost:8000/v1``.
            model: Name of the model on that server.
            key: Sent as a bearer token; None for a server that wants none.
            key_name: The environment variable it was read from, for messages.
            request: More fields of each request: temperature, seed, max_tokens, ...
            timeout_s: For a whole answer.
            max_retries: Repetitions of one request.
            requests_per_minute: Most requests, repetitions included; None for no limit.

        Raises:
            EvaluationError: The package ``openai`` is not installed.
        """
        try:
            openai = importlib.import_module("openai")
        except ImportError:
            raise EvaluationError(
                'a chat judge needs the package openai: pip install "sku-unlearning[chat]"'
            ) from None
        self.base_url, self.model, self._key_name = base_url, model, key_name
        self._openai: Any = openai
        self._key = key or "none"
        self._request = dict(request)
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._pace = Pace(requests_per_minute)
        self._has_answered = False
        self._client: Any = None

    def __enter__(self) -> ChatClient:
        self._client = self._openai.OpenAI(
            base_url=self.base_url,
            api_key=self._key,
            max_retries=self._max_retries,
            timeout=self._timeout_s,
            http_client=self._openai.DefaultHttpxClient(
                timeout=self._timeout_s,
                event_hooks={"request": [lambda _: self._pace.wait()], "response": [self._limit]},
            ),
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    @property
    def requests(self) -> int:
        """Requests sent so far, repetitions included."""
        return self._pace.passed

    def ask(self, messages: Sequence[Message]) -> Completion | Failure:
        """One answer of the model, or why there is none.

        Raises:
            EvaluationError: The key or the model is refused, so that no question will be answered.
        """
        openai = self._openai
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=list(messages), extra_body=self._request
            )
        except openai.APITimeoutError:
            return Failure(reason=f"no whole answer within {self._timeout_s:g} s", outage=True)
        except openai.APIConnectionError:
            return Failure(reason="no connection, or it broke off", outage=True)
        except openai.APIStatusError as error:
            status, code = error.status_code, str(error.code)
        else:
            self._has_answered = True
            return read_completion(response.text)
        # Outside of the handler: a traceback must not show the server's words, which may hold the key.
        return self._status_failure(status, code)

    def _status_failure(self, status: int, code: str) -> Failure:
        if code.startswith("content"):
            return Failure(reason=f"HTTP {status}: the server's content filter")
        if status == 403 and self._has_answered:
            # Gateways refuse single texts this way; a bad key would have been refused before.
            return Failure(reason="HTTP 403", outage=True)
        if status in _KEY_REFUSED:
            origin = f"the key in {self._key_name}" if self._key_name else "a request without a key"
            raise EvaluationError(
                f"{self.base_url} refuses {origin} (HTTP {status}): set the variable that judge setting api_key_env "
                "names to a valid key"
            )
        if status == 404:
            raise EvaluationError(
                f"{self.base_url} knows no model {self.model!r}, or is no OpenAI-compatible address (HTTP 404): check "
                "the judge settings model and base_url"
            )
        return Failure(reason=f"HTTP {status}", outage=True)

    def _limit(self, response: Any) -> None:
        """Called by the HTTP library before it reads a body, whatever the status."""
        # openai uses httpx or its successor httpx2, depending on its version.
        library: Any = sys.modules[type(response.stream).__module__.partition(".")[0]]
        inner, deadline = response.stream, time.monotonic() + self._timeout_s

        class Limited(library.SyncByteStream):  # type: ignore[misc]
            def __iter__(self) -> Iterator[bytes]:
                size = 0
                for part in inner:
                    size += len(part)
                    if time.monotonic() > deadline:
                        raise library.ReadTimeout("the whole answer takes too long", request=response.request)
                    if size > MAX_BODY_BYTES:
                        raise library.ReadError("the answer is too long", request=response.request)
                    yield part

            def close(self) -> None:
                inner.close()

        response.stream = Limited()


class Pace:
    """Lets requests of several threads pass at even distances, and counts them."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.passed = 0
        self._distance_s = 0 if requests_per_minute is None else 60 / requests_per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when it is this request's turn."""
        with self._lock:
            self.passed += 1
            turn = max(self._next, time.monotonic())
            self._next = turn + self._distance_s
        time.sleep(max(0.0, turn - time.monotonic()))


def read_completion(body: str) -> Completion | Failure:
    """Reads the body of a chat completion; whatever doesn't fit is a failure, never a guess."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return Failure(reason="the server's answer is not JSON", ask_again=True, outage=True)
    content = _mapping(content)
    choices = content.get("choices")
    choice = _mapping(choices[0] if isinstance(choices, list) and choices else None)
    message = _mapping(choice.get("message"))
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        return Failure(reason="the server's content filter")
    if message.get("refusal"):
        return Failure(reason="the model declined to judge")
    if not message:
        return Failure(reason="the server's answer holds no choice", ask_again=True, outage=True)
    text = message.get("content")
    usage = _mapping(content.get("usage"))
    return Completion(
        text=text if isinstance(text, str) else "",
        cut=finish == "length",
        input_tokens=_count(usage.get("prompt_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
    )


def is_own_machine(base_url: str) -> bool:
    """Whether an address is a loopback address: what is sent there does not leave the machine."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
