"""Whether the hub can be asked, found out in seconds: its own clients try five times, most of a minute."""

from __future__ import annotations

import functools
import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 4.0


def out_of_reach() -> str | None:
    """Why the hub can't be asked, for a message; None where it can, as far as one connection tells."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    if getproxies() or _connects(constants.ENDPOINT):  # A proxy answers for hosts whose names are not known here.
        return None
    return f"the hub can't be reached ({constants.ENDPOINT})"


def is_cached(repository: str, file: str, revision: str | None) -> bool:
    """Whether a file of a hub model is in the cache of this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(repository, file, revision=revision), str)
    except HFValidationError:
        return False


@functools.cache
def _connects(endpoint: str) -> bool:
    """In a thread that is not waited for: the lookup of a name has no limit of time of its own."""
    address = urlsplit(endpoint)
    answered = threading.Event()

    def connect() -> None:
        try:
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return answered.is_set()
