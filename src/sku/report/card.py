"""The model card of a finished run: Hugging Face front matter, figures with intervals, limits, origin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined, UndefinedError

from sku.errors import EvaluationError, OutputError
from sku.evaluate.changes import RateChange
from sku.report.card_metadata import CardChoices, base_id, card_metadata, license_of, public_name
from sku.report.key_figures import ON_CARD, KeyFigure, key_figures
from sku.report.markdown import Written, escaped, fenced, table
from sku.report.read_run import Part, RecordedRun, read_run
from sku.report.robustness import ATTACK_COLUMNS, AttackRow, attack_rows, precision_rows, rate_text
from sku.report.tables import NOTHING, percent
from sku.storage import write_text

CARD_FILE = "README.md"
_HIDDEN_SETTINGS = ("judge_settings",)
"""Parts of a recipe that may hold addresses of somebody's servers."""
_NON_COMMERCIAL = re.compile(r"\bnc\b", re.IGNORECASE)


def write_cards(folder: Path, choices: CardChoices | None = None, *, within_run: bool = False) -> dict[Part, Path]:
    """Writes ``README.md`` into the unlearned model and, where there is one, the adapter of a run.

    Args:
        folder: Of the run.
        choices: What a user says of licence and base model beyond the recipe.
        within_run: As in ``read_run``.

    Returns:
        The cards.

    Raises:
        OutputError: There is nothing to write a card of, or it can't be written.
        EvaluationError: The run is not finished, or its results are broken.
    """
    run = read_run(folder, replies=False, within_run=within_run)
    parts = run.parts()
    if not parts:
        raise OutputError(f"{folder} holds neither an unlearned model nor an adapter: run it again")
    cards = {part: place / CARD_FILE for part, place in parts.items()}
    for part, path in cards.items():
        write_text(path, model_card(run, part, choices or CardChoices()))
    return cards


def read_card(folder: Path) -> dict[str, Any]:
    """The front matter of the card of a model or adapter.

    Raises:
        OutputError: There is none, or it is not one of a model.
    """
    try:
        metadata = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=False).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OutputError(f"{folder} has no model card that can be read ({error}): write it with sku card") from error
    assert isinstance(metadata, dict)
    return metadata


def model_card(run: RecordedRun, part: Part, choices: CardChoices) -> str:
    """The card of a part of a run: Markdown with front matter; equal runs give equal cards.

    Raises:
        EvaluationError: The manifest lacks what a card needs.
    """
    environment = Environment(undefined=StrictUndefined, finalize=escaped, keep_trailing_newline=True)
    template = (resources.files("sku") / "report" / "templates" / "model_card.md.jinja").read_text(encoding="utf-8")
    try:
        shown = list(key_figures(run.comparison, ON_CARD))
        data = card_metadata(run, part, choices, shown)
        body = environment.from_string(template).render(**_facts(run, part, choices, shown))
    except (KeyError, TypeError, AttributeError, IndexError, UndefinedError) as error:
        raise EvaluationError(
            f"the records in {run.folder} lack what a card needs ({error!r}): run it again"
        ) from error
    body = re.sub(r"\n{3,}", "\n\n", body)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _facts(run: RecordedRun, part: Part, choices: CardChoices, shown: Sequence[KeyFigure]) -> dict[str, Any]:
    """Everything the template asks for; values are escaped there, save those that are ``Written``."""
    comparison = run.comparison
    base = base_id(run, choices) or public_name(str(run.manifest["model"]["name"]))
    sources = list(_data_rows(run))
    named = {licence for _, _, _, licence, *_ in sources if _NON_COMMERCIAL.search(licence)}
    attacks = [] if run.attacks is None else attack_rows(run.attacks)
    return {
        "title": f"{Path(base).name} unlearned{', adapter' if part == 'adapter' else ''}",
        "run": run,
        "part": part,
        "base": base,
        "place": Written(base_id(run, choices) or "BASE_MODEL"),
        "headline": table(
            ("", "with adapter" if part == "adapter" else "unlearned", "95 %", "base"), _headline_rows(shown)
        ),
        # Runs of 0.1.0 have the notes of the setup there alone.
        "notes": list(dict.fromkeys((*comparison.notes, *comparison.unlearned.setup.notes))),
        "table": table(
            ("", "base", "unlearned", "95 %", "change (95 %)"),
            ((row.label, row.before, row.after, row.interval, row.change) for row in run.table),
        ),
        "attacks": table(ATTACK_COLUMNS, map(dataclasses.astuple, attacks), left=(0, 1)) if attacks else "",
        "precisions": _precision_table(run),
        "judge": comparison.unlearned.judge,
        "prefill_words": _prefill_words(run, attacks),
        "strength": f"{run.strength:g}",
        "made": table(("", ""), _made_rows(run, base), left=(0, 1)),
        "data": table(
            ("set", "source", "revision", "licence", "pairs read", "SHA-256"), sources, left=(0, 1, 2, 3, 5)
        ),
        "non_commercial": ", ".join(sorted(named)),
        "licence_unknown": license_of(run, choices) is None,
        "recipe": fenced(yaml.safe_dump(_public_recipe(run.recipe), sort_keys=False, allow_unicode=True), "yaml"),
    }


def _headline_rows(shown: Sequence[KeyFigure]) -> Iterator[tuple[str, ...]]:
    """The key figures with intervals; of rates the counts, too."""
    for figure in shown:
        words = figure.label
        if isinstance(figure.change, RateChange):
            words += f" ({figure.change.after.count} of {figure.change.after.total})"
        yield f"{words}; {figure.caution}" if figure.caution else words, figure.after, figure.bounds, figure.before


def _precision_table(run: RecordedRun) -> str:
    if run.precisions is None:
        return ""
    columns = ("harmful, unseen", "worst prefill, unseen", "gibberish, unseen", "perplexity, normal", "change kept")
    return table(
        ("format", *columns),
        (
            (
                row.precision,
                *map(rate_text, (row.harmful, row.prefill, row.gibberish)),
                NOTHING if row.perplexity is None else f"\u00d7{row.perplexity:.4g}",
                NOTHING if row.kept is None else percent(row.kept),
            )
            for row in precision_rows(run.precisions)
        ),
    )


def _data_rows(run: RecordedRun) -> Iterator[tuple[str, ...]]:
    """Where the data came from, a row for each set."""
    for name, source, location, revision, sha256, rows_read, licence in run.reproduction.data:
        yield name.replace("_", " "), f"{public_name(location)} ({source})", revision, licence, rows_read, sha256


def _made_rows(run: RecordedRun, base: str) -> Iterator[tuple[str, str]]:
    manifest, recipe, environment = run.manifest, run.recipe, run.manifest["environment"]
    model, packages = manifest["model"], environment["packages"]
    revision = model.get("revision") or "unknown (not read from the hub)"
    versions = (f"{name} {packages[name]}" for name in ("torch", "transformers", "peft"))
    yield "method", run.method
    yield "alpha" if run.negates else "strength", f"{run.strength:g}: {_why(run)}"
    yield "change", _change(manifest["negation"])
    yield "training", _training(run)
    yield "seed", str(recipe["seed"])
    yield "base model", f"{base}, revision {revision}, {model['parameters']:,} parameters"
    yield "software", f"sku {environment['sku']}, {', '.join(versions)}"
    yield "recipe", f"{recipe['name']}, SHA-256 {manifest['recipe_sha256']}"


def _prefill_words(run: RecordedRun, attacks: Sequence[AttackRow]) -> str:
    rates = [rates["harmful"].after.value for rates in run.comparison.prefill.values() if "harmful" in rates]
    told = [f"here {percent(max(rates))} did"] if rates else []
    if attacks:
        told.append("see the attacks above")
    return ", ".join(told) or "not measured here"


def _why(run: RecordedRun) -> str:
    if run.sweep is not None and run.sweep.pick is not None:
        alpha, why = run.sweep.pick.alpha, run.sweep.pick.why
    else:
        pick = run.manifest.get("sweep") or {"alpha": None, "why": ""}
        alpha, why = pick["alpha"], str(pick["why"])
    return why if alpha == run.strength else "given in the recipe, not chosen by a search"


def _change(negation: Mapping[str, Any]) -> str:
    share = negation["task_vector_norm"] / negation["base_norm"] if negation["base_norm"] else 0.0
    return (
        f"{negation['changed_weights']} tensors, task vector {100 * share:.3g} % of their norm, saved as "
        f"{negation['dtype']}, {100 * negation['survival']:.4g} % of the change survived rounding"
    )


def _training(run: RecordedRun) -> str:
    acquire = run.recipe["acquire"]
    steps = run.manifest.get("training", {}).get("steps", "unknown")
    if run.method != "sku":
        return f"{acquire['tuning']}, {steps} steps"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in acquire["weights"].items())
    told = f"{acquire['tuning']}, {steps} steps, {weights}, preservation mode {acquire['preservation_mode']}"
    if acquire.get("twin", "none") == "none":
        return told
    shares = run.recipe["negate"]["twin"]
    return f"{told}, with a good twin (shares: bad {shares['bad']:g}, good {shares['good']:g})"


def _public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without local folders and settings of judges; ``methods`` and ``compare`` are not of this model."""

    def shown(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: shown(name, entry) for name, entry in value.items() if name not in _HIDDEN_SETTINGS}
        if isinstance(value, list):
            return [shown(key, entry) for entry in value]
        return public_name(value) if isinstance(value, str) and "/" in value else value

    method = recipe["method"]
    own = {name: value for name, value in recipe.items() if name not in ("methods", "compare")}
    if method in recipe.get("methods", {}):
        own["methods"] = {method: recipe["methods"][method]}
    plain = shown("", own)
    assert isinstance(plain, dict)
    return plain
