"""A sweep with a bad model that lies in a folder."""

from __future__ import annotations

from pathlib import Path

from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import ModelError
from sku.methods.run import prepare, with_safe_dtype
from sku.models import load_model
from sku.negate.operators import operate
from sku.negate.operators.base import context_of
from sku.negate.run import task_vector_of
from sku.sweep.bad_model import training_notes
from sku.sweep.meter import Progress
from sku.sweep.result import Sweep
from sku.sweep.run import sweep


def sweep_bad_model(
    recipe: Recipe, bad: Path, data: ForgetRetainData, out: Path, *, progress: Progress | None = None
) -> Sweep:
    """Chooses alpha for a bad model, its adapter or its task vector.

    Args:
        recipe: Its model is the original; ``negate.operators`` are applied as in a run.
        bad: Folder of one of the three. It is not changed.
        data: With ``forget_validation``.
        out: As in ``sweep``.
        progress: As in ``sweep``.

    Returns:
        The sweep. Its notes say so where the bad model may have been trained on what alpha is chosen by.

    Raises:
        ModelError: There is no such folder, or it holds no model.
        SkuError: As ``sweep``, and as operators do.
    """
    if not bad.is_dir():
        raise ModelError(f"there is no folder {bad}: give that of a bad model, or leave it out to train one")
    run = prepare(recipe, out)
    notes = [*data.notes(), *training_notes(bad, data)]
    loaded = load_model(with_safe_dtype(recipe))
    vector = task_vector_of(loaded.model, bad)
    if run.operators:
        cache = recipe.negate.operator_cache
        context = context_of(
            loaded.model,
            loaded.tokenizer,
            data,
            recipe.data,
            prompt_format=recipe.model.prompt_format,
            seed=recipe.seed,
            cache=None if cache is None else Path(cache),
        )
        vector = operate(vector, run.operators, context).vector
    return sweep(loaded.model, vector, loaded.tokenizer, data, recipe, out, notes=notes, progress=progress)
