"""``sku acquire``, ``sku negate``, ``sku wipe``: stages 1 and 2 alone, and the removal of what runs leave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sku.cli import options
from sku.cli.console import carry_out, errors, notes, perform, print_json, print_next, results
from sku.config import EMBEDDED
from sku.quiet import quiet_imports, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from sku.kept_replies import KeptReplies

_STAYS = (
    "figures, and outcomes and verdicts by hash: sku report, push and chat work as before; sku judge again, and "
    "replies in a report, need a new evaluation"
)


def acquire(
    out: Annotated[Path, typer.Option(help="New private folder for the hazardous model.")],
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Stage 1: train the bad model and keep it. It answers harmful prompts on purpose: never share it."""
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides, judged=False
    )

    quiet_libraries()
    from sku.pipeline.bad_model import run_acquire
    from sku.processes import current_processes, end_when_the_launcher_says_so

    processes = current_processes()
    end_when_the_launcher_says_so(processes)
    headline = f"recipe {settings.name}, model {settings.model.path}, seed {settings.seed}"
    log = perform(lambda show: run_acquire(settings, out, progress=show), headline=headline, is_main=processes.is_main)
    if as_json:
        print_json({"bad_model": str(out), "hazardous": True, "log": log})
        return
    for name, value in sorted(log[-1].items()):
        results.print(f"{name:<32}{value:.6g}")
    results.print(f"\nhazard    {out} is the bad model, private to you; never share it")
    base = settings.model.path
    gguf = [] if settings.model.gguf_file is None else ["--gguf-file", settings.model.gguf_file]
    print_next(["negate", base, out, "--out", out.with_name(f"{out.name}-unlearned"), *gguf], ["wipe", out])


def negate(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the original model, or `embedded`.")],
    bad: Annotated[Path, typer.Argument(help="Folder of the bad model, its adapter, or a task vector.")],
    out: Annotated[Path, typer.Option(help="New folder for the unlearned model.")],
    alpha: Annotated[float, typer.Option(help="How much of the task vector to subtract, 0 or more.")] = 1.0,
    dtype: Annotated[
        Literal["same", "float32", "bfloat16", "float16"], typer.Option(help="Type of the result.")
    ] = "same",
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        typer.Option(help="stochastic: small changes survive bfloat16 and float16 on average."),
    ] = "nearest",
    seed: Annotated[int, typer.Option(help="Of the stochastic rounding.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="That read, compute and write; up to 4 where this is left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed call had finished.")] = False,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in BASE.")] = None,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Stage 2: subtract the task vector of a bad model from the original weights, from file to file."""
    quiet_imports()
    from sku.pipeline.negate import Subtraction, plan_negate

    subtraction = Subtraction(
        base=base, bad=bad, out=out, alpha=alpha, output_dtype=dtype, rounding=rounding, seed=seed, threads=threads,
        resume=resume, gguf_file=gguf_file,
    )  # fmt: skip
    done = carry_out(
        plan_negate(subtraction),
        dry_run=dry_run,
        as_json=as_json,
        interrupted="interrupted; what is finished is kept: the same command with --resume goes on",
    )
    if done.left_out:
        notes.print(f"not copied from the base: {', '.join(done.left_out)}")
    if as_json:
        print_json(done.to_dict())
        return
    for name, value in done.record.to_dict().items():
        if isinstance(value, dict):  # Norms by layer and module: --json.
            continue
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}")
    named = [] if gguf_file is None else ["--set", f"model.gguf_file={gguf_file}"]
    print_next(["evaluate", out, "--base", base, *named, "--out", out.with_name(f"{out.name}-evaluation")])


def wipe(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A run, a folder of runs, or a bad model: all marked folders in it."),
    ],
    replies: Annotated[
        bool,
        typer.Option(
            "--replies",
            help="Also what models said: own replies, in $SKU_CACHE too, what an interrupted sku data own left, and "
            "the prompts and replies of evaluations. Figures stay.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Remove hazardous weights: kept bad models, and the checkpoints of interrupted runs, which then begin anew."""
    from sku.kept_replies import find_replies, remove_replies
    from sku.storage import hazardous_folders
    from sku.storage import wipe as remove

    kept = find_replies(folder) if replies else []
    found = hazardous_folders(folder) if folder.is_dir() or not replies else []
    kept = [place for place in kept if not any(place.path.is_relative_to(marked) for marked in found)]
    removes = bool(found or kept) and not dry_run
    asks = removes and not yes
    if asks or not as_json:  # What is asked about must be seen.
        _list_wiped(folder, found, kept, "hazard" if dry_run else "remove", errors if as_json else results)
        if not found and not kept:
            also = " and nothing holds replies" if replies else ""
            results.print(f"nothing in {folder} is marked as hazardous{also}")
    if asks and not typer.confirm("Remove them? A run that is still going on would fail.", err=True):
        raise typer.Exit(1)
    if removes:
        remove_replies(kept)
        remove(found)
    removed = len(found) + len(kept) if removes else 0
    if as_json:
        listed = [{"path": str(place.path), "what": place.what, "texts": place.texts, "bytes": place.bytes}
                  for place in kept]  # fmt: skip
        print_json({
            "hazardous": [str(path) for path in found], **({"replies": listed} if replies else {}), "removed": removed,
        })  # fmt: skip
    elif removes:
        results.print(
            f"removed   {removed}; what the disk keeps of freed blocks, snapshots and backups stays (SECURITY.md)"
        )


def _list_wiped(folder: Path, found: list[Path], kept: list[KeptReplies], word: str, console: Console) -> None:
    """What would be removed, without a word of any text, and what stays of it."""
    for path in found:
        console.print(f"{word:<10}{path}")
    for place in kept:
        texts = "" if place.texts is None else f"{place.texts:,} texts, "
        console.print(f"{word:<10}{place.path}  ({place.what}: {texts}{place.bytes:,} bytes)")
    if kept:
        from sku.kept_replies import labels_in

        console.print(f"all       {len(kept)} of replies, {sum(place.bytes for place in kept):,} bytes")
        console.print(f"stays     {_STAYS}")
        for path in labels_in(folder):
            console.print(f"stays     {path}: labels that you gave, with their replies; remove it yourself")
