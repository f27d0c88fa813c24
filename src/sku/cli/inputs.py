"""What of a recipe can be found wrong before torch is loaded, which takes seconds: method, model's place, data.

A run finds all of it again where it reads the same files. This is for the answer to come at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from sku.cli.method_list import listed_methods
from sku.config import Recipe, SourceConfig
from sku.errors import DataError, no_method_named
from sku.from_file import SUFFIX


def check_inputs(recipe: Recipe) -> None:
    """Refuses what a command would refuse later.

    Args:
        recipe: Of the command.

    Raises:
        RecipeError: There is no such method.
        ModelError: The model's folder can't be used, or the hub that has it is out of reach.
        DataError: Local data can't be read or split, or hub data is out of reach and on no disk here.
    """
    names = [method["name"] for method in listed_methods()]
    if recipe.method not in names and not recipe.method.endswith(SUFFIX):
        raise no_method_named(recipe.method, names)

    from sku.model_files import locate_model

    locate_model(recipe.model)
    _check_data(recipe)


def check_judge(recipe: Recipe) -> None:
    """Refuses a judge folder or file that isn't there, for the commands that judge.

    Args:
        recipe: Of the command.

    Raises:
        EvaluationError: There is none of that name, or it is broken.
    """
    if "/" in recipe.evaluate.judge:
        from sku.evaluate.judges.choose import read_judge_file

        read_judge_file(recipe.evaluate.judge)


def _check_data(recipe: Recipe) -> None:
    from sku.data.load import load_data
    from sku.data.prompt_sets import load_own_prompts, wants_own_replies
    from sku.data.sources.tables import is_hub_id

    config = recipe.data
    named = (config.forget, config.retain, config.borderline, *config.normal.values(), *config.harmful.values())
    sources = [source for source in named if source is not None]
    from_hub = [source for source in sources if is_hub_id(source)]
    for source in from_hub:
        _check_within_reach(source)
    if from_hub:  # Nothing is downloaded twice.
        return
    if wants_own_replies(config):
        load_own_prompts(config.forget, config.retain, config.borderline, seed=recipe.seed, prefix="data.")
    else:
        load_data(config, recipe.seed, forget_validation=recipe.forget_validation)


def _check_within_reach(source: SourceConfig) -> None:
    from huggingface_hub import constants

    from sku.hub_reach import out_of_reach

    why = out_of_reach()
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    # The name of the set is written in another way there; that of its owner is not.
    if why is None or any(cache.glob(f"{source.path.partition('/')[0]}*")):
        return
    raise DataError(
        f"there is no file or folder {source.path} (looked in {Path.cwd()}), this machine holds no copy of a hub "
        f"dataset of that name, and {why}"
    )
