"""What must not be printed or written down: tokens, keys, passwords, signatures in addresses."""

from __future__ import annotations

import os
import re

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_QUERY = re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]+")
_USER = re.compile(r"(https?://)[^\s/@]+@")
_SHORTEST_SECRET = 8
"""A shorter value would strike out parts of ordinary words."""


def without_secrets(text: str) -> str:
    """A text with ``***`` for what the environment holds as a token, key, secret or password, and for hub tokens."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and name.upper().endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", text)


def without_secret_addresses(text: str) -> str:
    """``without_secrets``, and addresses without user, password and query, where signatures and keys stand too."""
    return _USER.sub(r"\1***@", _QUERY.sub(r"\1?***", without_secrets(text)))
