"""What writes the replies: one file a backend, behind one protocol."""

from sku.evaluate.backends.base import Decoding, GenerationBackend, GenerationRequest, decoding_settings
from sku.evaluate.backends.check import CHECKED_PROMPTS, BackendCheck, compare_replies
from sku.evaluate.backends.choose import choose_backend
from sku.evaluate.backends.generate import GenerateBackend

__all__ = [
    "CHECKED_PROMPTS",
    "BackendCheck",
    "Decoding",
    "GenerateBackend",
    "GenerationBackend",
    "GenerationRequest",
    "choose_backend",
    "compare_replies",
    "decoding_settings",
]
