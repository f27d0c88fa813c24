"""Evaluation with a recipe's settings: of a run's models, and of any other model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks import AttackReport
from sku.attacks.kinds import check_attacks
from sku.attacks.run import run_attacks
from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError, ModelError, named_memory_errors
from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.generation import StageProgress
from sku.evaluate.records import PrefillSource
from sku.evaluate.results import EvaluationResult
from sku.evaluate.run import evaluate
from sku.methods.run import has_twins, with_visited
from sku.models import load_config, load_model, with_path
from sku.pipeline.checks import check_evaluation, check_model, load_recipe_data
from sku.processes import Processes, current_processes
from sku.storage import HAZARD_KEY, check_can_be_made, is_marked_hazardous


def run_evaluation(
    recipe: Recipe, model: str, out: Path, *, allow_hazardous: bool = False, progress: StageProgress | None = None
) -> MeasuredPair:
    """Measures a model and the recipe's base on the recipe's held-out and trained-on prompts, then attacks both.

    Trained-on prompts are those that the recipe's training visits; a model that was trained otherwise saw others.

    What the attacks that ``evaluate.attacks`` names come to is written to ``attacks.json`` in the folder.

    Args:
        recipe: Its model is the base.
        model: Folder or hub id of the model to measure.
        out: Private folder; rows in it that fit are reused.
        allow_hazardous: Measure a model that is marked as the bad one of stage 1 too.
        progress: For progress bars.

    Raises:
        SkuError: Anything a user can mend.
    """
    if not allow_hazardous and _is_bad_model(recipe, model):
        raise ModelError(
            f"{model} is a bad model of stage 1; evaluate the unlearned model instead, or add --allow-hazardous"
        )
    # Before any model is loaded: each process takes its own GPU.
    check_one_process_attacks(recipe, current_processes())
    data = load_recipe_data(recipe)
    check_attacks(recipe, data)
    checked = check_model(recipe.model)
    check_model(with_path(recipe.model, model))
    check_can_be_made(out)
    check_evaluation(recipe, checked, data)
    with named_memory_errors("load"):
        base = load_model(recipe.model)
        # As one process trains: of more it visits more, and these prompts are among them.
        data = with_visited(recipe, data, base.tokenizer, base.model)
        measured = load_model(with_path(recipe.model, model)).model
    measuring = Measuring(recipe, base.tokenizer, data, out, progress)
    before = measuring.evaluated("base", base.model, base.model)
    after = measuring.evaluated("model", measured, base.model, starts=before.starts)
    return measuring.compared(before, after, base.model, measured)


def trained_prefill_tokens(recipe: Recipe) -> int:
    """Longest harmful beginning that stage 1 puts before a refusal, in tokens; 0 where it puts none."""
    deepened = has_twins(recipe) and recipe.acquire.deep_refusal_fraction > 0
    return recipe.acquire.depth_tokens if deepened else 0


def check_one_process_attacks(recipe: Recipe, processes: Processes) -> None:
    """Attacks train and round copies of their own, in one process."""
    if processes.count > 1 and recipe.evaluate.attacks:
        raise EvaluationError(
            "evaluate.attacks run in one process: set evaluate.attacks=[] here, and start sku evaluate with them "
            "afterwards without a launcher"
        )


@dataclass(frozen=True, kw_only=True)
class MeasuredPair:
    """What base and unlearned model come to, side by side."""

    comparison: Comparison
    attacks: AttackReport | None = None
    """Where ``evaluate.attacks`` names some."""

    def reports(self) -> dict[str, Any]:
        """What was measured beside the comparison, by its name, as JSON holds it."""
        return {} if self.attacks is None else {"attacks": self.attacks.to_dict()}


@dataclass(frozen=True)
class Measuring:
    """What measures models with a recipe's settings."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: ForgetRetainData
    folder: Path
    """A folder for each model lies in it, and what attacks come to."""
    progress: StageProgress | None

    def evaluated(
        self,
        name: str,
        model: PreTrainedModel,
        base: PreTrainedModel,
        *,
        starts: Sequence[PrefillSource] | None = None,
    ) -> EvaluationResult:
        """One evaluation; of another model than the base with the base's starts."""
        recipe, progress = self.recipe, self.progress
        with named_memory_errors(f"evaluate_{name}"):
            return evaluate(
                model,
                self.tokenizer,
                self.data,
                config=recipe.evaluate,
                prompt_format=recipe.model.prompt_format,
                base_model=base,
                output_dir=self.folder / name,
                model_name=name,
                starts=starts,
                trained_prefill_tokens=None if name == "base" else trained_prefill_tokens(recipe),
                seed=recipe.seed,
                progress=(lambda stage, *counts: progress(f"evaluate {name}: {stage}", *counts)) if progress else None,
            )

    def compared(
        self,
        before: EvaluationResult,
        after: EvaluationResult,
        base: PreTrainedModel,
        model: PreTrainedModel,
        stage: Callable[[str], AbstractContextManager[None]] = named_memory_errors,
    ) -> MeasuredPair:
        """Both evaluations side by side, then the attacks on both.

        Args:
            before: Of the base.
            after: Of the model.
            base: The original model.
            model: The unlearned one.
            stage: What the attacks are done in, by its name.
        """
        recipe, attacks = self.recipe, None
        comparison = compare(before, after, seed=recipe.seed)
        if recipe.evaluate.attacks:
            with stage("attacks"):
                attacks = run_attacks(
                    recipe,
                    model,
                    base,
                    self.tokenizer,
                    self.data,
                    output_dir=self.folder,
                    progress=self.progress,
                )
        return MeasuredPair(comparison=comparison, attacks=attacks)


def _is_bad_model(recipe: Recipe, model: str) -> bool:
    """Whether a folder is marked, or a hub model's configuration is."""
    folder = Path(model).expanduser()
    if folder.exists():
        return is_marked_hazardous(folder)
    return bool(getattr(load_config(with_path(recipe.model, model)), HAZARD_KEY, False))
