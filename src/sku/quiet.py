"""What libraries say: silenced, as their lines would break ours, or heard without tokens, keys and passwords."""

from __future__ import annotations

import logging
import os
import re
import warnings

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_QUERY = re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]+")
_USER = re.compile(r"(https?://)[^\s/@]+@")
_SHORTEST_SECRET = 8
"""A shorter value would strike out parts of ordinary words."""
_speak = False


def let_libraries_speak(speak: bool) -> None:
    """Whether what libraries log is to be heard; their progress bars never are.

    Args:
        speak: Holds for the calls of this module that follow, in this process.
    """
    global _speak
    _speak = speak


def quiet_imports() -> None:
    """Silences what libraries say while they are imported, without importing one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # Read when tqdm is imported, so before the libraries below.
    if _speak:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns of a missing CPU kernel when imported.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silences bars and notices of libraries, whose lines would break ours.

    Warnings of Python stay, but for those of PEFT that no user can mend.
    """
    quiet_imports()
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # PEFT 0.21 reads the old name in every get_peft_model.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # Of each adapter of a model that has no config.json, such as a GGUF file. No vocabulary is modified here.
    for message in ("Unable to fetch remote file", "Could not find a config file in"):
        warnings.filterwarnings("ignore", message, UserWarning, r"peft\.")
    if _speak:
        transformers.utils.logging.set_verbosity_info()
        datasets.utils.logging.set_verbosity_info()
        _mute_own_handlers()
        return
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()


def _mute_own_handlers() -> None:
    """Leaves the lines to whoever listens to the loggers, and strikes out tokens: not twice, and not unread."""
    for name in ("datasets", "huggingface_hub", "transformers"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)


def without_secrets(text: str) -> str:
    """A text with ``***`` for what the environment holds as a token, key, secret or password, and for hub tokens."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and name.upper().endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", text)


def without_secret_addresses(text: str) -> str:
    """``without_secrets``, and addresses without user, password and query, where signatures and keys stand too."""
    return _USER.sub(r"\1***@", _QUERY.sub(r"\1?***", without_secrets(text)))
