"""Key ``model``: what is unlearned, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EMBEDDED = "embedded"
"""Name of the model, the data and the recipe that ship inside the package."""
PromptFormatName = Literal["auto", "chat", "paper"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to unlearn."""

    path: str
    """Local folder, hub id, or ``embedded``. Never written to."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; the commit it resolved to is recorded."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``path``: it is dequantized while loading."""
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are held in. ``auto``: bfloat16 on a GPU, float32 on a CPU; ``stored``: that of the files."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    license: str | None = None
    """Licence of the model, such as ``apache-2.0``, for the card of the unlearned one; what the model's own card says
    where this is empty."""
    prompt_format: PromptFormatName = "auto"
    """``chat``: the model's template, ``paper``: "### Question / ### Answer", ``auto``: chat where there is one."""
