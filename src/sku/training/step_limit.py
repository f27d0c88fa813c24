"""How many steps are taken where the limit is looked at between passes only (``compat.epoch_step_limit``)."""

from __future__ import annotations

from sku.errors import RecipeError


def steps_in_whole_passes(max_steps: int, rows: int, batch: int) -> int:
    """The step limit, rounded up to whole passes.

    A pass over two loaders in step ends with the shorter one, whose last batch may be a part: it has
    ``ceil(rows / batch)`` steps.

    Args:
        max_steps: Steps asked for.
        rows: Of the shorter loader.
        batch: Rows of an optimizer step.

    Returns:
        Steps taken.

    Raises:
        RecipeError: ``max_steps`` is not set.
    """
    check_step_limit(max_steps)
    steps_of_a_pass = -(-rows // batch)
    return -(-max_steps // steps_of_a_pass) * steps_of_a_pass


def check_step_limit(max_steps: int) -> None:
    """Refuses a limit that can't be rounded.

    Raises:
        RecipeError: ``max_steps`` is not set.
    """
    if max_steps < 1:
        raise RecipeError(
            "compat.epoch_step_limit rounds acquire.training.max_steps up to whole passes, and it is not set: set it, "
            "or leave compat.epoch_step_limit (in sku ablate, the group compat) out"
        )
