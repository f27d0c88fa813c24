"""Evaluation with a recipe's settings: of a run's models, and of any other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.run import check_attacks, run_attacks
from sku.config import EMBEDDED, ModelConfig, Precision, Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError, ModelError, TaskVectorError
from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.precision_results import PrecisionReport
from sku.evaluate.precisions import SurvivalBy, measure_precisions
from sku.evaluate.records import Start
from sku.evaluate.results import EvaluationResult
from sku.evaluate.run import Progress, evaluate
from sku.memory_errors import named_memory_errors
from sku.methods.visits import with_visited
from sku.models import load_config, load_model, with_path
from sku.negate.survival import model_survival
from sku.pipeline.recipe_data import load_recipe_data
from sku.processes import Processes, current_processes
from sku.storage import HAZARD_KEY, is_marked_hazardous


def evaluate_recipe(
    recipe: Recipe, model: str, out: Path, *, progress: Progress | None = None, allow_hazardous: bool = False
) -> Comparison:
    """Measures a model and the recipe's base on the recipe's held-out and trained-on prompts, then attacks both.

    Trained-on prompts are those that the recipe's training visits; a model that was trained otherwise saw others.

    What the attacks that ``evaluate.attacks`` names come to is written to ``attacks.json`` in the folder, what the
    model says at the precisions that ``evaluate.precisions`` names to ``precisions.json``.

    Args:
        recipe: Its model is the base.
        model: Folder or hub id of the model to measure.
        out: Private folder; rows in it that fit are reused.
        progress: For progress bars.
        allow_hazardous: Measure a model that is marked as the bad one of stage 1 too.

    Returns:
        The comparison.

    Raises:
        SkuError: Anything a user can mend.
    """
    if not allow_hazardous:
        refuse_bad_model(recipe, model)
    # Before any model is loaded: each process takes its own GPU.
    check_one_process_attacks(recipe, current_processes())
    data = load_recipe_data(recipe)
    check_attacks(recipe, data)
    with named_memory_errors("load"):
        base = load_model(recipe.model)
        # As one process trains: of more it visits more, and these prompts are among them.
        data = with_visited(recipe, data, base.tokenizer, base.model)
        measured = load_model(with_path(recipe.model, model))
    source = readable_source(recipe.model)
    before = evaluate_one(recipe, base.model, base.tokenizer, data, base.model, out / "base", progress, source)
    after = evaluate_one(
        recipe, measured.model, measured.tokenizer, data, base.model, out / "model", progress, model, before.starts
    )
    comparison = compare(before, after, seed=recipe.seed)
    if recipe.evaluate.precisions:
        measure_recipe_precisions(recipe, measured.model, base.model, base.tokenizer, data, comparison, out, progress)
    if recipe.evaluate.attacks:
        run_attacks(
            recipe,
            measured.model,
            base.model,
            base.tokenizer,
            data,
            output_dir=out,
            starts=before.starts,
            progress=progress,
        )
    return comparison


def check_one_process_attacks(recipe: Recipe, processes: Processes) -> None:
    """Attacks train and quantize copies of their own, in one process."""
    if processes.count > 1 and recipe.evaluate.attacks:
        raise EvaluationError(
            "evaluate.attacks run in one process: set evaluate.attacks=[] here, and start sku evaluate with them "
            "afterwards without a launcher"
        )


def evaluate_one(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    base: PreTrainedModel,
    folder: Path,
    progress: Progress | None,
    source: str | Path | None,
    starts: Sequence[Start] | None = None,
) -> EvaluationResult:
    """One evaluation with a recipe's settings, named after its folder; of another than the base with its starts."""
    name = folder.name
    with named_memory_errors(f"evaluate_{name}"):
        return evaluate(
            model,
            tokenizer,
            data,
            config=recipe.evaluate,
            prompt_format=recipe.model.prompt_format,
            base_model=base,
            output_dir=folder,
            model_name=name,
            model_source=source,
            starts=starts,
            seed=recipe.seed,
            progress=(lambda stage, *counts: progress(f"evaluate {name}: {stage}", *counts)) if progress else None,
        )


def measure_recipe_precisions(
    recipe: Recipe,
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    comparison: Comparison,
    folder: Path,
    progress: Progress | None,
) -> PrecisionReport:
    """The certificate of a model, with a recipe's settings."""
    return measure_precisions(
        model,
        base,
        tokenizer,
        data,
        comparison,
        config=recipe.evaluate,
        prompt_format=recipe.model.prompt_format,
        survival=_survival_of(base, model),
        output_dir=folder,
        seed=recipe.seed,
        progress=progress,
    )


def _survival_of(base: PreTrainedModel, model: PreTrainedModel) -> SurvivalBy:
    """What rounding leaves of the change; nothing for a model of another shape, which is no change of the base."""

    def survival(names: Sequence[Precision]) -> Mapping[str, Mapping[str, Any]]:
        try:
            return model_survival(base, model, names)
        except TaskVectorError:
            return {}

    return survival


def refuse_bad_model(recipe: Recipe, model: str) -> None:
    """Refuses a model that is marked as the bad one of stage 1.

    Args:
        recipe: For the other settings of the model.
        model: Folder or hub id.

    Raises:
        ModelError: It is marked, or can't be found.
    """
    if _is_bad_model(recipe, model):
        raise ModelError(
            f"{model} is a bad model of stage 1; evaluate the unlearned model instead, or add --allow-hazardous"
        )


def _is_bad_model(recipe: Recipe, model: str) -> bool:
    """Whether a folder is marked, or a hub model's configuration is."""
    folder = Path(model).expanduser()
    if folder.exists():
        return is_marked_hazardous(folder)
    return bool(getattr(load_config(with_path(recipe.model, model)), HAZARD_KEY, False))


def readable_source(config: ModelConfig) -> str | None:
    """Where another engine can read a model from: GGUF files and the embedded model have no such place."""
    return None if config.gguf_file is not None or config.path == EMBEDDED else config.path
