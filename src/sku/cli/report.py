"""``sku report``, ``sku results``, ``sku push``: a finished run as one HTML file; tables from records; the upload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import errors, notes, print_json, print_verdict
from sku.cli.console import results as console
from sku.cli.options import JsonOption
from sku.errors import OutputError, RecipeError
from sku.kept_replies import REPORT_FILE
from sku.progress import quiet_imports, quiet_libraries


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; report.html in the run's folder.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write every picture into this folder too, as PNG and SVG.")
    ] = None,
    replies: Annotated[
        bool,
        typer.Option(
            "--replies/--no-replies", help="With the replies of both models, the harmful ones blurred, or without any."
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run: one HTML file that needs no network, to read, search and print."""
    from sku.report.page import write_report  # Imports matplotlib and scipy.

    written = write_report(run, out or run / REPORT_FILE, plots=plots, replies=replies)
    if as_json:
        print_json({
            "verdict": written.verdict, "report": str(written.path), "plots": [str(path) for path in written.plots],
            "holds_harmful_replies": replies,
        })  # fmt: skip
        return
    print_verdict(written.verdict)
    console.print(f"report    {written.path}")
    if written.plots:
        console.print(f"plots     {plots}: {len(written.plots)} files")
    if replies:
        console.print("private   it holds harmful replies; --no-replies leaves them out")


def results(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folder of sku compare; with --table any number of run folders.",
        ),
    ],
    update: Annotated[
        Path | None,
        typer.Option(
            help="Markdown file: what stands between <!-- results:NAME --> and <!-- end:NAME -->, NAME that of "
            "FOLDER, is written anew."
        ),
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Only the main columns at equal utility; the marks are then NAME-brief.")
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Write this JSON file and nothing else: one object for each model, method and seed of all FOLDERs."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the tables of a comparison, or one of many runs, from their folders: no model, no data."""
    quiet_libraries()
    if table is not None:
        if brief or update is not None:
            raise RecipeError("--table is written alone: leave out --update and --brief")
        _write_table(folders, table, as_json=as_json)
        return
    if len(folders) > 1:
        raise RecipeError(f"{len(folders)} folders are named, and these tables are of one: add --table FILE.json")
    _comparison(folders[0], update, brief=brief, as_json=as_json)


def _comparison(folder: Path, update: Path | None, *, brief: bool, as_json: bool) -> None:
    from sku.report.method_records import read_records
    from sku.report.method_tables import brief_markdown, comparison_markdown
    from sku.report.words import replace_block

    records = read_records(folder)
    text = brief_markdown(records) if brief else comparison_markdown(records)
    if update is not None:
        mark = f"{folder.name}-brief" if brief else folder.name
        try:
            update.write_text(replace_block(update.read_text("utf-8"), mark, text, str(update)), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{update} can't be read or written: {error.strerror or error}") from error
    if as_json:
        print_json({"markdown": text, "written": [] if update is None else [str(update)]})
    elif update is None:
        console.print(text)
    else:
        console.print(f"updated   {update}")


def _write_table(folders: list[Path], table: Path, *, as_json: bool) -> None:
    from sku.report.real_models import table_rows
    from sku.storage import write_json

    rows = table_rows(folders)
    write_json(table, rows)
    if as_json:
        print_json(rows)
    else:
        console.print(f"table     {table}, {len(rows)} rows")


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished sku run.")],
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
    acknowledged: Annotated[
        bool,
        typer.Option(
            "--i-know-this-is-the-bad-model", help="Hand out an adapter that is the bad model's with its sign turned."
        ),
    ] = False,
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
    url, size = None, sum(plan.files.values())
    if not dry_run:
        notes.print(f"uploading {len(plan.files)} files, {size / 2**20:,.1f} MiB, to {repo_id}")
        try:
            url = upload(plan, public=public, revision=revision)
        except KeyboardInterrupt:
            errors.print("interrupted: nothing was committed; the same command goes on")
            raise typer.Exit(130) from None
    if as_json:
        listed = [{"path": name, "bytes": bytes_} for name, bytes_ in plan.files.items()]
        print_json({"repo_id": repo_id, "files": listed, "bytes": size, "url": url})
        return
    for name, bytes_ in plan.files.items():
        console.print(f"{bytes_:>16,}  {name}")
    console.print(f"{size:>16,}  bytes in {len(plan.files)} files")
    console.print(f"\nuploaded  {url}" if url else "\nnothing was uploaded (--dry-run)")
