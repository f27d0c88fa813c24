"""``sku card``, ``sku push``: a finished run's model for other people."""

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


def card(
    run: RunArgument,
    model_license: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the model, such as apache-2.0, in place of the recipe's."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="HUB_ID", help="Hub id of the base, where the run read it from a folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write README.md of the unlearned model and its adapter from the run's records. What is there is replaced."""
    from sku.report.card import CardChoices, write_cards

    cards = write_cards(run, CardChoices(license=model_license, base_model=base_model))
    if as_json:
        print_json({part: str(path) for part, path in cards.items()})
        return
    for part, path in cards.items():
        results.print(f"{part:<10}{path}")


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
    acknowledged: AcknowledgedOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list files and sizes, upload nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a finished run's model with its card, nothing else. Bad models and replies are never uploaded."""
    quiet_imports()
    from sku.push import plan_push, upload

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
