"""Stage 2 alone. Light to import: from file to file it needs neither transformers nor PEFT."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku.config import ModelConfig, NegateConfig, SourceConfig, SweepConfig
from sku.config.check import check_alpha
from sku.config.recipe import NEGATING_METHODS
from sku.errors import RecipeError
from sku.model_files import with_gguf_file
from sku.negate import stream_plan
from sku.negate.arithmetic import Negation, Rounding, saved_type
from sku.negate.files import model_folder
from sku.negate.streaming import FolderNegation
from sku.plan import CommandPlan, Progress
from sku.quiet import quiet_libraries
from sku.storage import check_can_be_made, check_new

if TYPE_CHECKING:
    from sku.data.examples import ForgetRetainData
    from sku.negate.operators import PreparedOperator


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
    operators: tuple[dict[str, Any], ...] = ()
    forget: str | None = None
    """What operators look at, and ``normal``."""
    normal: str | None = None


@dataclass(frozen=True, kw_only=True)
class Subtracted:
    """What was done."""

    record: Negation
    operators: list[dict[str, Any]] | None = None
    """Their records, where there are any."""
    left_out: tuple[str, ...] = ()
    """Files and folders of the base that were not copied."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.record.to_dict() | ({} if self.operators is None else {"operators": self.operators})


def plan_negate(wanted: Subtraction) -> CommandPlan[Subtracted]:
    """Subtracts from file to file where it can, else in memory: for operators, and weights that are no safetensors.

    Raises:
        SkuError: Anything a user can mend.
    """
    check_alpha(wanted.alpha, "--alpha")
    _check_not_negated(wanted.bad)
    named = with_gguf_file(ModelConfig(path=wanted.base, gguf_file=wanted.gguf_file))
    wanted = dataclasses.replace(wanted, gguf_file=named.gguf_file)
    operators = _operators(wanted)
    check_new(wanted.out)
    check_can_be_made(wanted.out)
    base = None if wanted.gguf_file is not None else model_folder(wanted.base)
    if base is not None and not (base / "config.json").is_file():
        base = None
    if base is not None and not operators and os.name == "posix":
        return _from_file_to_file(wanted, base)
    if wanted.rounding != "nearest" or wanted.resume:
        raise RecipeError("--rounding stochastic and --resume need a BASE in safetensors, and no --operator")
    quiet_libraries()
    return _in_memory(wanted, base, operators, _texts(wanted))


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


def _operators(wanted: Subtraction) -> tuple[PreparedOperator, ...]:
    """Checked; data that none of them looks at is refused."""
    prepared: tuple[PreparedOperator, ...] = ()
    read: set[str] = set()
    if wanted.operators:
        from sku.negate.operators import prepare_operators
        from sku.negate.operators.base import DATA_OPTIONS

        prepared = prepare_operators(wanted.operators, "--operator")
        read = {DATA_OPTIONS.get(need, "") for chosen in prepared for need in chosen.needs}
    for option, given, kind in (("--forget", wanted.forget, "harmful"), ("--normal", wanted.normal, "normal")):
        if given is not None and option not in read:
            raise RecipeError(f"{option} is read by operators that look at {kind} examples, and none is given")
    return prepared


def _texts(wanted: Subtraction) -> ForgetRetainData | None:
    """What operators look at; None where no data was given."""
    from sku.data.load import load_parts

    forget, normal = (None if path is None else SourceConfig(path=path) for path in (wanted.forget, wanted.normal))
    if forget is None and normal is None:
        return None
    fits = NegateConfig(operators=wanted.operators).fits_operators
    held_out = SweepConfig.validation_fraction if fits else 0.0
    return load_parts(forget, normal, seed=wanted.seed, forget_validation=held_out)


def _streamed(wanted: Subtraction, base: Path) -> FolderNegation:
    return FolderNegation(
        base=base, bad=model_folder(str(wanted.bad)), out=wanted.out, alpha=wanted.alpha,
        output_dtype=saved_type(wanted.output_dtype), rounding=wanted.rounding, seed=wanted.seed,
        threads=wanted.threads, resume=wanted.resume,
    )  # fmt: skip


def _settings(wanted: Subtraction, found: stream_plan.Plan | None, **described: str) -> dict[str, object]:
    weights = {}
    if found is not None:
        dtype = str(found.dtype).removeprefix("torch.")
        weights = {"weights": f"{len(found.changed)} of {len(found.work)} change", "dtype": dtype}
    named = {"base": wanted.base, "bad model": str(wanted.bad), "alpha": wanted.alpha}
    return {**named, **described, **weights, "rounding": wanted.rounding}


def _from_file_to_file(wanted: Subtraction, base: Path) -> CommandPlan[Subtracted]:
    streamed = _streamed(wanted, base)
    found = streamed.plan()

    def execute(progress: Progress | None) -> Subtracted:
        told = None if progress is None else lambda done, total: progress("MiB", done >> 20, total >> 20)
        negated = streamed.run(found, told)
        return Subtracted(record=negated.record, left_out=negated.left_out)

    return CommandPlan(
        command="sku negate",
        out=wanted.out,
        settings=_settings(wanted, found),
        stages=("subtract the task vector",),
        writes=tuple(layout.name for layout in found.layouts),
        execute=execute,
        disk_bytes=found.size,
        disk_there=found.size if wanted.resume else 0,
        bad_model="kept",
    )


def _in_memory(
    wanted: Subtraction, base: Path | None, operators: tuple[PreparedOperator, ...], texts: ForgetRetainData | None
) -> CommandPlan[Subtracted]:
    from sku.models import load_model
    from sku.negate.operators import operate
    from sku.negate.operators.base import OperatorContext, context_of
    from sku.negate.run import negate_with_record, save_unlearned, task_vector_of
    from sku.pipeline.checks import check_model

    config = ModelConfig(
        path=wanted.base, gguf_file=wanted.gguf_file, dtype="float32" if wanted.gguf_file else "stored"
    )

    def context(model: Any, tokenizer: Any) -> OperatorContext:
        """Of the model or its skeleton; checked before a large vector is read."""
        made = OperatorContext(base=model, seed=wanted.seed)
        if texts is not None:
            made = context_of(model, tokenizer, texts, seed=wanted.seed)
        for chosen in operators:
            made.check(chosen.needs, chosen.who)
        return made

    def execute(_progress: Progress | None) -> Subtracted:
        loaded = load_model(config)
        operated = None
        if operators:
            there = context(loaded.model, loaded.tokenizer)
            operated = operate(task_vector_of(loaded.model, wanted.bad), operators, there)
        vector = wanted.bad if operated is None else operated.vector
        dtype = saved_type(wanted.output_dtype)
        model, record = negate_with_record(loaded.model, vector, wanted.alpha, output_dtype=dtype)
        save_unlearned(model, loaded.tokenizer, wanted.out)
        return Subtracted(record=record, operators=None if operated is None else list(operated.records))

    model = check_model(config)
    context(model.skeleton, model.tokenizer)
    stream_plan.check_bad(model_folder(str(wanted.bad)))
    found = None if base is None else _streamed(wanted, base).plan()
    return CommandPlan(
        command="sku negate",
        out=wanted.out,
        settings=_settings(wanted, found, base=model.describe(), arithmetic="in memory"),
        stages=(*(f"apply {chosen.operator.name}" for chosen in operators), "subtract the task vector"),
        writes=("model.safetensors",) if found is None else tuple(layout.name for layout in found.layouts),
        execute=execute,
        disk_bytes=model.bytes(wanted.output_dtype) if found is None else found.size,
        bad_model="kept",
        examples={} if texts is None else {name: count for name, count in texts.counts().items() if count},
    )
