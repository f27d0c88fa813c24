"""Alpha chosen in Python, as ``negate.alpha: auto`` of a recipe and ``sku sweep`` choose it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import DataConfig, EvaluateConfig, ModelConfig, Recipe, SourceConfig, SweepConfig
from sku.data.examples import ForgetRetainData
from sku.evaluate.batching import StageProgress
from sku.negate.run import task_vector_of
from sku.negate.task_vector import TaskVector
from sku.sweep.result import Sweep
from sku.sweep.run import sweep

_GIVEN = "given in Python"


def choose_alpha(
    base: PreTrainedModel,
    bad: PreTrainedModel | PeftModel | TaskVector | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    *,
    judge: str = EvaluateConfig.judge,
    judge_settings: Mapping[str, Any] | None = None,
    config: SweepConfig | None = None,
    folder: Path | None = None,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> Sweep:
    """Measures alphas on prompts that stage 1 did not train on, and chooses one.

    Args:
        base: The original model. It is not changed.
        bad: The model of stage 1, as ``negate`` takes it.
        tokenizer: Of the model.
        data: Splits with ``forget_validation``: ``load_forget_retain(..., forget_validation_fraction=0.2)``.
        judge: Name of a judge, or a judge file, as ``evaluate.judge`` of a recipe.
        judge_settings: As ``evaluate.judge_settings`` of a recipe.
        config: What is tried, what is asked of an alpha, and the budget; the defaults of ``sweep`` if None.
        folder: Private folder that keeps every point, so that a second call goes on; none is kept if None.
        seed: Decides which prompts are asked.
        progress: Called with a stage, what is done and how much there is.

    Returns:
        All that was measured: ``alpha()`` for ``negate``, the frontier when it is printed or ``to_pandas()``.

    Raises:
        EvaluationError: Nothing to ask, several processes, or a judge of unknown errors or one that fails.
        OutputError: The folder can't be written.
        TaskVectorError: The bad model doesn't fit.
    """
    given = SourceConfig(path=_GIVEN)
    recipe = Recipe(
        name="choose-alpha",
        model=ModelConfig(path=str(base.name_or_path) or _GIVEN),
        data=DataConfig(forget=given, retain=given),
        seed=seed,
        sweep=config or SweepConfig(),
        evaluate=EvaluateConfig(judge=judge, judge_settings=judge_settings or {}),
    )
    vector = task_vector_of(base, bad)
    with tempfile.TemporaryDirectory(prefix="sku-") as temporary:
        return sweep(base, vector, tokenizer, data, recipe, folder or Path(temporary) / "sweep", progress=progress)
