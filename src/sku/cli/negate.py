"""``sku negate``: stage 2 alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sku.cli.console import errors, notes, print_json, print_next, progress_bars, results
from sku.cli.dry_run import print_dry_run
from sku.cli.options import DryRunOption, JsonOption
from sku.config import read_yaml
from sku.errors import RecipeError
from sku.quiet import quiet_imports, quiet_libraries

if TYPE_CHECKING:
    import torch

    from sku.data.examples import ForgetRetainData
    from sku.dry_run import DryRun
    from sku.negate.arithmetic import Negation
    from sku.negate.operators import PreparedOperator

DTYPES = ("same", "float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic")


def negate(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the original model, or `embedded`.")],
    bad: Annotated[Path, typer.Argument(help="Folder of the bad model, its adapter, or a task vector.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the unlearned model.")],
    alpha: Annotated[float, typer.Option("--alpha", help="How much of the task vector to subtract.")] = 1.0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the result: same, float32, bfloat16, float16.")
    ] = "same",
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding", help="nearest, or stochastic: small changes survive bfloat16 and float16 on average."
        ),
    ] = "nearest",
    seed: Annotated[
        int, typer.Option("--seed", help="Of the stochastic rounding, and of what operators hold out and draw.")
    ] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", help="That read, compute and write; up to 4 where this is left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed call had finished.")] = False,
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", help="GGUF file inside BASE; it is negated in memory.")
    ] = None,
    operators: Annotated[
        list[str] | None,
        typer.Option("--operator", help="NAME={key: value} as in a recipe, repeatable; then negated in memory."),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option("--forget", help="File, folder or hub id of harmful pairs, for operators that look at them."),
    ] = None,
    normal: Annotated[
        str | None,
        typer.Option("--normal", help="File, folder or hub id of normal pairs, for operators that look at them."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: subtract the task vector of a bad model from the original weights, from file to file."""
    from sku.config import NegateConfig

    _check_choice("--dtype", dtype, DTYPES)
    _check_choice("--rounding", rounding, ROUNDINGS)
    NegateConfig(alpha=alpha)
    entries = [_operator(text) for text in operators or ()]
    _check_sign(alpha, bad)

    quiet_imports()
    from sku.negate.rounding import saved_type

    if not entries:
        _check_read(forget, normal, set())
    wanted = _Wanted(
        base=base,
        bad=bad,
        out=out,
        alpha=alpha,
        output_dtype=saved_type(dtype),
        rounding="stochastic" if rounding == "stochastic" else "nearest",
        seed=seed,
        threads=threads,
        resume=resume,
        gguf_file=gguf_file,
        entries=entries,
        forget=forget,
        normal=normal,
    )
    folder = wanted.streamed_base()
    if dry_run:
        print_dry_run(_checked(wanted), as_json=as_json)
        return
    record: Negation
    account: dict[str, Any] = {}
    if folder is None:
        record, account = _negated_in_memory(wanted)
    else:
        record = _negated_from_file_to_file(wanted, folder)
    if as_json:
        print_json({**record.to_dict(), **account})
        return
    for name, value in record.to_dict().items():
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}", soft_wrap=True)
    options = [] if gguf_file is None else ["--set", f"model.gguf_file={gguf_file}"]
    print_next(["evaluate", out, "--base", base, *options, "--out", out.with_name(f"{out.name}-evaluation")])


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """The options of one call."""

    base: str
    bad: Path
    out: Path
    alpha: float
    output_dtype: torch.dtype | None
    rounding: Literal["nearest", "stochastic"]
    seed: int
    threads: int | None
    resume: bool
    gguf_file: str | None
    entries: list[dict[str, Any]]
    """Operators."""
    forget: str | None
    """What they look at, and ``normal``."""
    normal: str | None

    def streamed_base(self) -> Path | None:
        """Folder of the original model where it is negated from file to file; None where in memory."""
        from sku.negate.files import model_folder

        folder = None if self.gguf_file is not None or self.entries else model_folder(self.base)
        if folder is not None and (folder / "config.json").is_file() and os.name == "posix":
            return folder
        if self.rounding != "nearest" or self.resume:
            raise RecipeError("--rounding stochastic and --resume need a BASE in safetensors, and no --operator")
        return None

    def operators(self) -> tuple[PreparedOperator, ...]:
        """Checked, and the data with them."""
        from sku.negate.operators import prepare_operators
        from sku.negate.operators.base import DATA_OPTIONS

        prepared = prepare_operators(self.entries, "--operator")
        needs = {DATA_OPTIONS.get(need, "") for chosen in prepared for need in chosen.needs}
        _check_read(self.forget, self.normal, needs)
        return prepared

    def texts(self) -> ForgetRetainData | None:
        """What operators look at; None where no data was given."""
        from sku.config import NegateConfig, SourceConfig, SweepConfig
        from sku.data.load import load_parts

        forget, normal = (None if path is None else SourceConfig(path=path) for path in (self.forget, self.normal))
        if forget is None and normal is None:
            return None
        fits = NegateConfig(operators=tuple(self.entries)).fits_operators
        held_out = SweepConfig.validation_fraction if fits else 0.0
        return load_parts(forget, normal, seed=self.seed, forget_validation=held_out)


def _checked(wanted: _Wanted) -> DryRun:
    quiet_libraries()
    from sku.pipeline.dry_negate import dry_negate

    return dry_negate(
        wanted.base,
        wanted.bad,
        wanted.out,
        wanted.alpha,
        output_dtype=wanted.output_dtype,
        rounding=wanted.rounding,
        seed=wanted.seed,
        threads=1 if wanted.threads is None else wanted.threads,
        gguf_file=wanted.gguf_file,
        operators=wanted.operators(),
        texts=wanted.texts(),
    )


def _negated_from_file_to_file(wanted: _Wanted, folder: Path) -> Negation:
    from sku.negate.files import model_folder
    from sku.negate.streaming import negate_folders

    try:
        with progress_bars() as show:
            negated = negate_folders(
                folder, model_folder(str(wanted.bad)), wanted.out, wanted.alpha, output_dtype=wanted.output_dtype,
                rounding=wanted.rounding, seed=wanted.seed, threads=wanted.threads, resume=wanted.resume,
                progress=lambda done, total: show("MiB", done >> 20, total >> 20),
            )  # fmt: skip
    except KeyboardInterrupt:
        errors.print("what is finished is kept: the same command with --resume goes on")
        raise
    if negated.left_out:
        notes.print(f"not copied from the base: {', '.join(negated.left_out)}", soft_wrap=True)
    return negated.record


def _negated_in_memory(wanted: _Wanted) -> tuple[Negation, dict[str, Any]]:
    """For operators, and for weights that are no safetensors, such as GGUF."""
    quiet_libraries()
    from sku.config import ModelConfig
    from sku.models import load_model
    from sku.negate.operators import operate
    from sku.negate.operators.base import OperatorContext, context_of
    from sku.negate.run import negate_with_record, save_unlearned, task_vector_of
    from sku.storage import check_new

    check_new(wanted.out)
    prepared, texts = wanted.operators(), wanted.texts()
    dtype: Literal["float32", "stored"] = "float32" if wanted.gguf_file else "stored"
    loaded = load_model(ModelConfig(path=wanted.base, gguf_file=wanted.gguf_file, dtype=dtype))
    context = OperatorContext(base=loaded.model, seed=wanted.seed)
    if texts is not None:
        context = context_of(loaded.model, loaded.tokenizer, texts, seed=wanted.seed)
    for chosen in prepared:  # Before a large vector is read.
        context.check(chosen.needs, chosen.who)
    operated = operate(task_vector_of(loaded.model, wanted.bad), prepared, context) if prepared else None
    vector = wanted.bad if operated is None else operated.vector
    model, record = negate_with_record(loaded.model, vector, wanted.alpha, output_dtype=wanted.output_dtype)
    save_unlearned(model, loaded.tokenizer, wanted.out)
    return record, {} if operated is None else {"operators": operated.records}


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{option} is {value}; it must be {', '.join(known[:-1])} or {known[-1]}")


def _check_sign(alpha: float, bad: Path) -> None:
    """Refuses to add what a bad model learned: the result would be another one, without its marks."""
    from sku.storage import is_marked_hazardous

    if alpha < 0 and is_marked_hazardous(bad):
        raise RecipeError(
            f"--alpha is {alpha:g} and {bad} is a bad model: below 0 its harm is added. A negative alpha is for "
            "what is negated already, such as a run's negated_adapter"
        )


def _check_read(forget: str | None, normal: str | None, read: set[str]) -> None:
    """Refuses data that no operator looks at."""
    for option, given, kind in (("--forget", forget, "harmful"), ("--normal", normal, "normal")):
        if given is not None and option not in read:
            raise RecipeError(f"{option} is read by operators that look at {kind} examples, and none is given")


def _operator(text: str) -> dict[str, Any]:
    """``name={key: value}`` as a recipe's ``negate.operators`` holds it."""
    name, _, settings = text.partition("=")
    try:
        return {name: read_yaml(settings) if settings else {}}
    except RecipeError:
        raise RecipeError(f"--operator {text}: {settings!r} is no YAML, such as {{energy: 0.9}}") from None
