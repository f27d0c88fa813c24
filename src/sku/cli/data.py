"""``sku data``: look at what a run would train on, and have the model write it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sku.cli import options
from sku.cli.console import print_json, print_notes, printable, results
from sku.cli.data_own import own
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.data.inspect import DataDescription, ExampleView

LEARNED = "green underline"
"""Style of the tokens that are trained on."""

app = typer.Typer(help="Look at the data of a recipe, or have the model write it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at the data of a recipe, or have the model write it."""


app.command("own")(own)


@app.command("inspect")
def inspect(
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    show_harmful: Annotated[
        bool, typer.Option("--show-harmful", help="Print harmful answers; hidden behind length and hash otherwise.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show what was loaded, how it is split, and which tokens are trained on."""
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides, judged=False
    )

    quiet_libraries()
    from sku.data.inspect import describe_data
    from sku.data.load import load_data
    from sku.data.prompts import resolve_prompt_format
    from sku.models import load_tokenizer

    tokenizer = load_tokenizer(settings.model)
    description = describe_data(
        load_data(settings.data, settings.seed, forget_validation=settings.forget_validation),
        tokenizer,
        resolve_prompt_format(settings.model.prompt_format, tokenizer),
        max_length=settings.data.max_length,
        max_answer_tokens=settings.data.max_answer_tokens,
        show_harmful=show_harmful,
    )
    if as_json:
        print_json(dataclasses.asdict(description))
        return
    _print(description)


def _print(description: DataDescription) -> None:
    for source in description.provenance:
        results.print(f"{source.source}: {source.location}")
        facts = {"rows read": source.rows_read, **source.rows_left_out, "revision": source.revision}
        facts |= {"examples with a safe answer": source.safe_answers}
        facts |= {"licence": source.licence or "unknown", "sha256": source.sha256[:16]}
        results.print("  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value))
    results.print(f"prompt format {description.prompt_format}, at most {description.max_length} tokens")
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("split", "examples", "prompts", "left out", "shortened", "tokens", "learned"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for name, split in description.splits.items():
        report = split.tokenization
        lengths = ["/".join(str(values[p]) for p in (50, 90, 100)) for values in
                   (split.length_percentiles, split.learned_percentiles)]  # fmt: skip
        table.add_row(
            name,
            str(split.examples),
            str(split.groups),
            str(sum(report.left_out.values())),
            str(report.prompts_shortened + report.answers_shortened),
            *lengths,
        )
    results.print(table)
    results.print("tokens, learned: median / 90th percentile / most of an example")
    cut = [f"{name} {split.unfinished}" for name, split in description.splits.items() if split.unfinished]
    if cut:
        results.print(f"answers that were cut off and teach no end: {', '.join(cut)}")
    print_notes(description.notes)
    results.print(Text.assemble("\nTokens that are trained on stand in ", ("green", LEARNED), "."))
    for view in description.views:
        results.print(_tokens(view))


def _tokens(view: ExampleView) -> Text:
    line = Text(printable(f"{view.split}{f' ({view.category})' if view.category else ''}: "), style="bold")
    for token in view.tokens:
        line.append(printable(token.text), style=LEARNED if token.learned else "dim")
    return line
