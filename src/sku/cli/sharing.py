"""``sku push``: a finished run's model for other people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import errors, notes, print_json, results
from sku.cli.options import JsonOption
from sku.quiet import quiet_imports

AcknowledgedOption = Annotated[
    bool,
    typer.Option(
        "--i-know-this-is-the-bad-model", help="Hand out an adapter that is the bad model's with its sign turned."
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished sku run.")]


def push(
    run: RunArgument,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to: NAMESPACE/NAME.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter instead of the whole model.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that everybody sees; private otherwise.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, made where it doesn't exist; main otherwise.")
    ] = None,
    model_license: Annotated[
        str | None,
        typer.Option("--license", help="Licence on the card, which is written anew, such as apache-2.0."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="HUB_ID", help="Hub id of the base on the card, which is written anew.")
    ] = None,
    acknowledged: AcknowledgedOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list files and sizes, upload nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a finished run's model with its card, nothing else. Bad models and replies are never uploaded."""
    quiet_imports()
    from sku.push import plan_push, upload
    from sku.report.card import CardChoices, write_cards

    choices = CardChoices(license=model_license, base_model=base_model)
    if choices != CardChoices() and not dry_run:
        write_cards(run, choices)
    plan = plan_push(run, repo_id, "adapter" if adapter else "model", acknowledged=acknowledged)
    url = None
    if not dry_run:
        notes.print(f"uploading {len(plan.files)} files, {plan.size / 2**20:,.1f} MiB, to {repo_id}")
        try:
            url = upload(plan, public=public, revision=revision)
        except KeyboardInterrupt:
            errors.print("interrupted: nothing was committed; the same command goes on")
            raise typer.Exit(130) from None
    if as_json:
        listed = [{"path": file.name, "bytes": file.size} for file in plan.files]
        print_json({"repo_id": repo_id, "files": listed, "bytes": plan.size, "url": url})
        return
    for file in plan.files:
        results.print(f"{file.size:>16,}  {file.name}")
    results.print(f"{plan.size:>16,}  bytes in {len(plan.files)} files")
    results.print(f"\nuploaded  {url}" if url else "\nnothing was uploaded (--dry-run)")
