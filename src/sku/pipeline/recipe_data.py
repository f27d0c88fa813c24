"""The data of a recipe, split as its other settings ask."""

from __future__ import annotations

from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.load import load_data


def load_recipe_data(recipe: Recipe) -> ForgetRetainData:
    """Reads and splits the data of a recipe; ``forget_validation`` is held out where alpha is still to be chosen.

    Raises:
        DataError: As ``load_data``.
    """
    return load_data(recipe.data, recipe.seed, forget_validation=recipe.forget_validation)
