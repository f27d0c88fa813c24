"""What a run leaves on the disk at its fullest moment."""

from __future__ import annotations

from sku.training.config import UnlearningConfig

STATE_BYTES = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_apex_fused": 8.0, "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0,
    "adamw_torch_8bit": 2.0, "adamw_torch_4bit": 1.0, "paged_adamw_8bit": 2.0, "paged_adamw_32bit": 8.0,
    "lion_32bit": 4.0, "lion_8bit": 1.0, "rmsprop": 4.0, "adagrad": 4.0, "sgd": 0.0, "adafactor": 0.1,
}  # fmt: skip
"""Optimizer of transformers -> bytes of state for each trained weight that is held in float32."""


def disk_bytes(*, trained: int, state_bytes: float, checkpoints: int, adapter: bool, model: int) -> int:
    """What lies on the disk at the fullest moment of a run.

    Checkpoints hold what is trained and its optimizer; beside them lie the trained and the unlearned weights.

    Args:
        trained: Bytes of the trained weights.
        state_bytes: Of the optimizer for each trained weight in float32.
        checkpoints: That lie there at once.
        adapter: Whether an adapter is trained, which is saved negated too.
        model: Bytes of the unlearned model.

    Returns:
        Bytes.
    """
    checkpoint = trained + round(trained / 4 * state_bytes)
    return checkpoints * checkpoint + trained + (trained if adapter else 0) + model


def checkpoints_at_once(training: UnlearningConfig) -> int:
    """Most checkpoints that lie on the disk together: the next one is written before the oldest is deleted."""
    return 0 if training.save_strategy == "no" else (training.save_total_limit or 0) + 1
