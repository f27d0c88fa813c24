"""Stage 2 alone. Light to import: from file to file it needs neither transformers nor PEFT."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sku.config import ModelConfig
from sku.config.check import check_alpha
from sku.config.recipe import NEGATING_METHODS
from sku.errors import RecipeError
from sku.model_files import with_gguf_file
from sku.negate.arithmetic import Rounding, saved_type
from sku.negate.files import model_folder
from sku.negate.matching import check_bad
from sku.negate.streaming import FolderNegation, NegatedFolder, Plan
from sku.plan import CommandPlan, Progress
from sku.quiet import quiet_libraries
from sku.storage import check_can_be_made, check_new


@dataclass(frozen=True, kw_only=True)
class Subtraction:
    """What ``sku negate`` is asked for."""

    base: str
    bad: Path
    out: Path
    alpha: float
    output_dtype: str = "same"
    rounding: Rounding = "nearest"
    seed: int = 0
    threads: int | None = None
    resume: bool = False
    gguf_file: str | None = None


def plan_negate(wanted: Subtraction) -> CommandPlan[NegatedFolder]:
    """Subtracts from file to file; a GGUF file from a temporary copy that transformers writes.

    Raises:
        SkuError: Anything a user can mend.
    """
    check_alpha(wanted.alpha, "--alpha")
    _check_not_negated(wanted.bad)
    named = with_gguf_file(ModelConfig(path=wanted.base, gguf_file=wanted.gguf_file))
    wanted = dataclasses.replace(wanted, gguf_file=named.gguf_file)
    check_new(wanted.out)
    check_can_be_made(wanted.out)
    base = None if wanted.gguf_file is not None else model_folder(wanted.base)
    if base is not None and not (base / "config.json").is_file():
        base = None
    if base is not None:
        return _from_file_to_file(wanted, base)
    if wanted.resume:
        raise RecipeError("--resume needs a BASE in safetensors")
    quiet_libraries()
    return _from_a_copy(wanted)


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


def _streamed(wanted: Subtraction, base: Path) -> FolderNegation:
    return FolderNegation(
        base=base, bad=model_folder(str(wanted.bad)), out=wanted.out, alpha=wanted.alpha,
        output_dtype=saved_type(wanted.output_dtype), rounding=wanted.rounding, seed=wanted.seed,
        threads=wanted.threads, resume=wanted.resume,
    )  # fmt: skip


def _settings(wanted: Subtraction, found: Plan | None, **described: str) -> dict[str, object]:
    weights = {}
    if found is not None:
        dtype = str(found.dtype).removeprefix("torch.")
        weights = {"weights": f"{len(found.changed)} of {len(found.work)} change", "dtype": dtype}
    named = {"base": wanted.base, "bad model": str(wanted.bad), "alpha": wanted.alpha}
    return {**named, **described, **weights, "rounding": wanted.rounding}


def _run(streamed: FolderNegation, found: Plan, progress: Progress | None) -> NegatedFolder:
    told = None if progress is None else lambda done, total: progress("MiB", done >> 20, total >> 20)
    return streamed.run(found, told)


def _from_file_to_file(wanted: Subtraction, base: Path) -> CommandPlan[NegatedFolder]:
    streamed = _streamed(wanted, base)
    found = streamed.plan()
    return CommandPlan(
        command="sku negate",
        out=wanted.out,
        settings=_settings(wanted, found),
        stages=("subtract the task vector",),
        writes=tuple(layout.name for layout in found.layouts),
        execute=lambda progress: _run(streamed, found, progress),
        disk_bytes=found.size,
        disk_there=found.size if wanted.resume else 0,
        bad_model="kept",
    )


def _from_a_copy(wanted: Subtraction) -> CommandPlan[NegatedFolder]:
    from sku.models import load_model
    from sku.negate.task_vector import base_as_files
    from sku.pipeline.checks import check_model

    config = ModelConfig(path=wanted.base, gguf_file=wanted.gguf_file, dtype="float32")
    model = check_model(config)
    check_bad(model_folder(str(wanted.bad)))

    def execute(progress: Progress | None) -> NegatedFolder:
        with base_as_files(load_model(config), wanted.out) as base:
            streamed = _streamed(wanted, base)
            return _run(streamed, streamed.plan(), progress)

    return CommandPlan(
        command="sku negate",
        out=wanted.out,
        settings=_settings(wanted, None, base=model.describe()),
        stages=("subtract the task vector",),
        writes=("model.safetensors",),
        execute=execute,
        disk_bytes=model.bytes() + model.bytes(wanted.output_dtype),
        bad_model="kept",
    )
