"""``sku run``, its stages alone (``acquire``, ``negate``, ``evaluate``), and ``sku wipe`` of what runs leave."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sku.cli import options
from sku.cli.console import (
    carry_out,
    errors,
    notes,
    perform,
    print_headline,
    print_json,
    print_measured,
    print_next,
    results,
)
from sku.config import EMBEDDED
from sku.progress import quiet_imports, quiet_libraries

if TYPE_CHECKING:
    from sku.pipeline.run import FinishedRun

_STAYS = (
    "figures, and outcomes and verdicts by hash: sku report, push and chat work as before; sku judge again, and "
    "replies in a report, need a new evaluation"
)


def run(
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    out: options.OutOption = None,
    judge: options.JudgeOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    base_of: Annotated[
        Path | None, typer.Option(help="Folder of a run, whose evaluation of the base model is taken where it fits.")
    ] = None,
    keep_bad_model: Annotated[
        bool, typer.Option("--keep-bad-model", help="Keep the hazardous model of stage 1 in the run folder.")
    ] = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Unlearn: stage 1, stage 2, and the evidence. Without arguments: the embedded model and world."""
    overrides = [*(overrides or []), *(["keep_bad_model=true"] if keep_bad_model else [])]
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )
    quiet_libraries()
    from sku.models import pick_device  # Imports torch: only when a command really runs.
    from sku.pipeline.run import plan_run
    from sku.processes import current_processes, end_when_the_launcher_says_so

    processes = current_processes()
    end_when_the_launcher_says_so(processes)
    folder = processes.run_on_rank0(lambda: out or options.new_run_folder(settings.name))
    plan = plan_run(settings, folder, resume=resume, base_of=base_of)
    method = "" if settings.method == "sku" else f", method {settings.method}"
    headline = f"recipe {settings.name}, model {settings.model.path}, seed {settings.seed}{method}"
    on_gpu = pick_device(settings.model.device).type == "cuda"
    if plan.memory is not None and on_gpu and processes.is_main and not dry_run:
        fits, text = plan.memory()  # It takes every row for as long as it may be: no reason to refuse a run.
        if not fits:
            print_headline(f"memory: {text}")
    again = shlex.join(["--out", str(folder), "--resume"])
    try:
        finished = carry_out(
            plan,
            dry_run=dry_run,
            as_json=as_json,
            headline=headline,
            interrupted=f"interrupted; go on with the same command and {again}",
            is_main=processes.is_main,
        )
    except Exception:
        if processes.is_main and (folder / "bad").exists():  # Whoever doesn't go on with it should know.
            removed = shlex.join(["sku", "wipe", str(folder)])
            errors.print(
                f"until the run is finished {folder / 'bad'} holds hazardous checkpoints; {removed} removes them"
            )
        raise
    if as_json:
        print_json(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    else:
        _print_finished(finished, folder)


def _print_finished(finished: FinishedRun, folder: Path) -> None:
    """What was measured, where everything lies, and what to do next."""
    print_measured(finished.comparison, finished.attacks)
    manifest, bad = finished.manifest, folder / "bad"
    card = finished.comparison.unlearned.judge
    results.print(f"judge     {card.name}: {card.errors_in_words}")
    names = ("unlearned", "negated_adapter", "adapter", "results.json")
    written = ", ".join(name for name in names if (folder / name).exists())
    results.print(f"written   {folder}: {written}; {sum(manifest['seconds'].values()):.0f} seconds")
    if bad.exists():
        results.print(f"hazard    {bad} is kept; never share it")
    with_bad: list[list[str | Path]] = [["sweep", folder], ["wipe", folder]]
    talk: list[list[str | Path]] = [["report", folder], ["chat", folder], ["push", folder, "NAMESPACE/NAME"]]
    print_next(*talk, *(with_bad if bad.exists() else (["wipe", "--replies", folder],)))


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model to measure.")],
    out: Annotated[Path, typer.Option(help="Private folder for replies and results; rows in it are reused.")],
    recipe: options.RecipeArgument = EMBEDDED,
    base: Annotated[
        str | None, typer.Option(help="Original model to compare with; the recipe's where left out.")
    ] = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    judge: options.JudgeOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    attacks: Annotated[
        str | None,
        typer.Option(help="Attacks to run on both models, with commas: paraphrase, template, rounding, relearn."),
    ] = None,
    allow_hazardous: Annotated[
        bool, typer.Option("--allow-hazardous", help="Measure a model that is marked as the bad one of stage 1 too.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure MODEL and its base on the prompts of a recipe, and compare them."""
    overrides = list(overrides or [])
    if attacks is not None:
        overrides.append(f"evaluate.attacks={json.dumps(options.names_in(attacks))}")
    settings = options.resolve_recipe(
        recipe, model=base, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )

    quiet_libraries()
    from sku.pipeline.evaluate import run_evaluation
    from sku.processes import current_processes

    measured = perform(
        lambda show: run_evaluation(settings, model, out, allow_hazardous=allow_hazardous, progress=show),
        is_main=current_processes().is_main,
    )
    comparison = measured.comparison
    if as_json:
        sides = {"base": comparison.base.to_dict(), "model": comparison.unlearned.to_dict()}
        verdict = {"verdict": comparison.verdict.to_dict(), "notes": comparison.notes}
        print_json(sides | verdict | measured.reports())
        return
    print_measured(comparison, measured.attacks)
    results.print(f"\nevidence  {out}")
    print_next(["judge", "export", out, "--out", out.with_name(f"{out.name}-labels.csv")])


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
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides
    )

    quiet_libraries()
    from sku.pipeline.stages import run_acquire
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
    import torch

    from sku.negate.streaming import FolderNegation
    from sku.pipeline.negate import plan_negate

    saved_as = None if dtype == "same" else getattr(torch, dtype)
    wanted = FolderNegation(
        base=Path(base), bad=bad, out=out, alpha=alpha, output_dtype=saved_as, rounding=rounding, seed=seed,
        threads=threads, resume=resume,
    )  # fmt: skip
    done = carry_out(
        plan_negate(wanted, gguf_file),
        dry_run=dry_run,
        as_json=as_json,
        interrupted="interrupted; what is finished is kept: the same command with --resume goes on",
    )
    if done.left_out:
        notes.print(f"not copied from the base: {', '.join(done.left_out)}")
    if as_json:
        print_json(done.record.to_dict())
        return
    for name, value in done.record.to_dict().items():
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}")
    named = [] if gguf_file is None else ["--set", f"model.gguf_file={gguf_file}"]
    print_next(["evaluate", out, "--base", base, *named, "--out", out.with_name(f"{out.name}-evaluation")])


def wipe(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run, a folder of runs, or a bad model: all marked in it.")
    ],
    replies: Annotated[
        bool,
        typer.Option(
            "--replies",
            help="Also what models said: own replies, in $SKU_CACHE and of interrupted calls too, and the prompts and "
            "replies of evaluations.",
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
        console, word = errors if as_json else results, "hazard" if dry_run else "remove"
        for path in found:
            console.print(f"{word:<10}{path}")
        for place in kept:
            texts = "" if place.texts is None else f"{place.texts:,} texts, "
            console.print(f"{word:<10}{place.path}  ({place.what}: {texts}{place.bytes:,} bytes)")
        if kept:
            console.print(f"stays     {_STAYS}")
        elif not found:
            also = " and nothing holds replies" if replies else ""
            results.print(f"nothing in {folder} is marked as hazardous{also}")
    if asks and not typer.confirm("Remove them? A run that is still going on would fail.", err=True):
        raise typer.Exit(1)
    if removes:
        remove_replies(kept)
        remove(found)
    removed = len(found) + len(kept) if removes else 0
    if as_json:
        listed = [{**place._asdict(), "path": str(place.path)} for place in kept]
        told = {"hazardous": list(map(str, found)), **({"replies": listed} if replies else {}), "removed": removed}
        print_json(told)
    elif removes:
        results.print(
            f"removed   {removed}; what the disk keeps of freed blocks, snapshots and backups stays (SECURITY.md)"
        )
