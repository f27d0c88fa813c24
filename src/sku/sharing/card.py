"""The model card of a finished run: Hugging Face front matter, figures with intervals, limits, origin."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from sku.errors import EvaluationError, OutputError
from sku.sharing.card_facts import CardChoices, body_facts
from sku.sharing.card_file import CARD_FILE
from sku.sharing.card_metadata import card_metadata
from sku.sharing.finished_run import FinishedRunFiles, Part, read_finished_run
from sku.sharing.markdown import escaped
from sku.storage import write_text


def write_cards(folder: Path, choices: CardChoices | None = None, *, within_run: bool = False) -> dict[Part, Path]:
    """Writes ``README.md`` into the unlearned model and, where there is one, the adapter of a run.

    Args:
        folder: Of the run.
        choices: What a user says of licence and base model beyond the recipe.
        within_run: As of ``read_finished_run``.

    Returns:
        The cards.

    Raises:
        OutputError: The run is not finished, or a card can't be written.
        EvaluationError: Its results are broken.
    """
    run = read_finished_run(folder, within_run=within_run)
    parts = run.parts()
    if not parts:
        raise OutputError(f"{folder} holds neither an unlearned model nor an adapter: run it again")
    cards = {part: place / CARD_FILE for part, place in parts.items()}
    for part, path in cards.items():
        write_text(path, model_card(run, part, choices or CardChoices()))
    return cards


def model_card(run: FinishedRunFiles, part: Part, choices: CardChoices) -> str:
    """The card as text.

    Args:
        run: A finished run.
        part: What it is the card of.
        choices: What a user says beyond the recipe.

    Returns:
        Markdown with front matter; equal runs give equal cards.

    Raises:
        EvaluationError: The results lack figures that a card needs.
    """
    environment = Environment(undefined=StrictUndefined, finalize=escaped, keep_trailing_newline=True)
    template = (resources.files("sku") / "sharing" / "templates" / "model_card.md.jinja").read_text(encoding="utf-8")
    try:
        data = card_metadata(run, part, choices)
        body = environment.from_string(template).render(**body_facts(run, part, choices))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise EvaluationError(
            f"the results in {run.folder} lack what a card needs ({error!r}): run it again"
        ) from error
    body = re.sub(r"\n{3,}", "\n\n", body)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
