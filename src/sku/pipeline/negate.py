"""Stage 2 alone. Light to import: from file to file it needs neither transformers nor PEFT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from sku.config import ModelConfig
from sku.config.check import check_alpha
from sku.config.recipe import NEGATING_METHODS
from sku.errors import RecipeError
from sku.model_files import with_gguf_file
from sku.negate.files import model_folder
from sku.negate.matching import check_bad
from sku.negate.streaming import FolderNegation, NegatedFolder, Plan
from sku.pipeline import CommandPlan, Progress
from sku.progress import quiet_libraries
from sku.storage import check_new

Execute = Callable[[Progress | None], NegatedFolder]


def plan_negate(wanted: FolderNegation, gguf_file: str | None = None) -> CommandPlan[NegatedFolder]:
    """Subtracts from file to file; from a GGUF file by way of a temporary copy.

    Args:
        wanted: Its ``base`` and ``bad`` are folders or hub ids.
        gguf_file: Name of a GGUF file in ``base``.

    Raises:
        SkuError: Anything a user can mend.
    """
    check_alpha(wanted.alpha, "--alpha")
    _check_not_negated(wanted.bad)
    named = with_gguf_file(ModelConfig(path=str(wanted.base), gguf_file=gguf_file, dtype="float32"))
    check_new(wanted.out)
    settings: dict[str, object] = {
        "base": str(wanted.base), "bad model": str(wanted.bad), "alpha": wanted.alpha, "rounding": wanted.rounding,
    }  # fmt: skip
    execute: Execute
    if named.gguf_file is None:
        streamed = dataclasses.replace(wanted, base=model_folder(str(wanted.base)), bad=model_folder(str(wanted.bad)))
        found = streamed.plan()
        settings["weights"] = f"{len(found.changed)} of {len(found.work)} change"
        settings["dtype"] = str(found.dtype).removeprefix("torch.")
        size, execute = found.size, lambda progress: _run(streamed, found, progress)
    else:
        if wanted.resume:
            raise RecipeError("--resume needs a BASE in safetensors")
        quiet_libraries()
        settings["base"], size, execute = _from_a_copy(wanted, named)
    return CommandPlan(
        command="sku negate",
        out=wanted.out,
        settings=settings,
        execute=execute,
        disk_bytes=size,
        disk_there=size if wanted.resume else 0,
        bad_model="kept",
    )


def _check_not_negated(bad: Path) -> None:
    """Refuses what a run has subtracted already: subtracted once more it is the bad model, without its marks."""
    run, name = bad.absolute().parent, bad.absolute().name
    if name not in ("unlearned", "negated_adapter"):
        return
    try:
        recipe = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # No run's folder.
    if recipe.get("method") in NEGATING_METHODS:
        raise RecipeError(
            f"{bad} is the result of a run: its bad model is subtracted there already, and subtracting it again adds "
            f"the harm back. Use {run / 'unlearned'} as it is; PEFT puts negated_adapter on the original model"
        )


def _run(wanted: FolderNegation, found: Plan, progress: Progress | None) -> NegatedFolder:
    told = None if progress is None else lambda done, total: progress("MiB", done >> 20, total >> 20)
    return wanted.run(found, told)


def _from_a_copy(wanted: FolderNegation, config: ModelConfig) -> tuple[str, int, Execute]:
    """The base in words, bytes of copy and result, and what subtracts."""
    from sku.models import load_model
    from sku.negate.task_vector import base_as_files
    from sku.pipeline.checks import check_model

    model, bad = check_model(config), model_folder(str(wanted.bad))
    check_bad(bad)

    def execute(progress: Progress | None) -> NegatedFolder:
        with base_as_files(load_model(config), wanted.out) as base:
            streamed = dataclasses.replace(wanted, base=base, bad=bad)
            return _run(streamed, streamed.plan(), progress)

    return model.describe(), model.bytes() + model.bytes(wanted.output_dtype), execute
