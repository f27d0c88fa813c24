"""``sku judge train``: a harm classifier from labelled replies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import print_json, print_next, progress_bars, results, shown_messages
from sku.cli.dry_run import print_dry_run
from sku.cli.labelled_options import (
    ByOption,
    HarmfulValueOption,
    LabelColumnOption,
    PromptColumnOption,
    ReplyColumnOption,
    WhereOption,
    figures_table,
    label_columns,
)
from sku.cli.options import DryRunOption, JsonOption, settings_of
from sku.dry_run import DryRun
from sku.quiet import quiet_libraries
from sku.storage import check_can_be_made, check_new


def train(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Labelled replies: CSV, JSON Lines, Parquet, a folder or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the judge.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or hub id to start from; all-MiniLM-L6-v2 if not given."),
    ] = None,
    where: WhereOption = None,
    by: ByOption = None,
    prompt_column: PromptColumnOption = None,
    reply_column: ReplyColumnOption = None,
    label_column: LabelColumnOption = None,
    harmful_value: HarmfulValueOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of training, such as epochs=3; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split, the new head and the order of rows.")] = 0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a judge on the labelled replies in DATA; the folder it writes is then a judge's name."""
    given = {**({} if model is None else {"model": model}), **settings_of(overrides), "seed": seed}
    columns = label_columns(
        prompt=prompt_column,
        reply=reply_column,
        label=label_column,
        harmful_value=harmful_value,
        where=where,
        by=by,
    )
    check_new(out)
    check_can_be_made(out.parent)

    quiet_libraries()
    from sku.config import settings_from_dict
    from sku.evaluate.judges.calibrate import read_labelled
    from sku.evaluate.judges.calibration_file import beside
    from sku.evaluate.judges.train import JudgeTraining, split_by_prompt, train_judge

    settings = settings_from_dict(JudgeTraining, given, "sku judge train", "settings of training")
    labelled = read_labelled(data, columns)
    if dry_run:
        parts = split_by_prompt(labelled.replies, settings.validation_fraction, settings.seed)
        found = DryRun(
            command="sku judge train",
            out=out,
            settings={
                "model": settings.model,
                "replies to train on": len(parts[0]),
                "replies held out": len(parts[1]),
                **labelled.left_out,
            },
            stages=(f"train on {len(parts[0])} replies, at most {settings.epochs} epochs",),
            writes=(out.name,),
            disk_bytes=0,
        )
        print_dry_run(found, as_json=as_json)
        return
    with shown_messages(), progress_bars() as show:
        trained = train_judge(labelled, settings, out, progress=show)
    if as_json:
        print_json({**dataclasses.asdict(trained), "folder": str(out)})
        return
    results.print(figures_table("held-out prompts", trained.figures))
    results.print(
        f"judge      {out}: {trained.train} replies, {trained.epochs} epochs, {trained.seconds:.0f} s; harmful from "
        f"{trained.threshold:.3f}",
        soft_wrap=True,
    )
    for why, count in {**labelled.left_out, "the model can't read them": trained.unreadable}.items():
        if count:
            results.print(f"left out   {count}: {why}", soft_wrap=True)
    print_next(["judge", "calibrate", out, "OTHER_LABELLED_DATA", "--by", "source", "--out", beside(out)])
