"""The model card of a finished run: Hugging Face front matter, figures with intervals, limits, origin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError

from sku.errors import EvaluationError, OutputError
from sku.evaluate.changes import PerplexityChange, RateChange
from sku.report.read_run import Part, RecordedRun, read_run
from sku.report.tables import ON_CARD, KeyFigure, key_figures
from sku.report.words import (
    ATTACK_COLUMNS,
    RELEARN_COLUMNS,
    Written,
    attack_rows,
    escaped,
    fenced,
    one_line,
    percent,
    relearn_rows,
    table,
)
from sku.storage import write_text

CARD_FILE = "README.md"
TAG = "sku"
"""Among the tags of every card that SKU writes."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TAGS = ("unlearning", "machine-unlearning", TAG, "arxiv:2402.10058")
KNOWN_LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m bigscience-bloom-rail-1.0 creativeml-openrail-m afl-3.0 "
    "artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma "
    "unknown other".split()
)
"""What the hub takes for ``license``; anything else is ``other`` with a name."""
_HIDDEN_SETTINGS = ("judge_settings",)
"""Parts of a recipe that may hold addresses of somebody's servers."""
_NON_COMMERCIAL = re.compile(r"\bnc\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CardChoices:
    """What a user says of a model beyond its recipe.

    Raises:
        OutputError: The base model is no hub id.
    """

    license: str | None = None
    """Of the model, in place of that on the base's own card."""
    base_model: str | None = None
    """Hub id of the base, where the run read it from a folder."""

    def __post_init__(self) -> None:
        base = self.base_model
        if base is not None and not (HUB_ID.fullmatch(base) and public_name(base) == base):
            raise OutputError(
                f"--base-model is {base}; it must be a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
            )


Reflection = Literal["bad", "twins", "good", "none"]
"""The bad model; the base with the bad twin added and the good one subtracted; the base without the good twin's change
alone; no hazardous model."""
ACKNOWLEDGEMENT = "--i-know-this-is-the-bad-model"
"""Option of the commands that hand out an adapter."""


def twin_shares(recipe: Mapping[str, Any]) -> tuple[float, float] | None:
    """Shares of the bad and the good twin in what a recipe subtracts; None where there are no twins."""
    if recipe["method"] != "sku" or recipe["acquire"].get("twin", "none") == "none":
        return None
    shares = recipe["negate"]["twin"]
    return float(shares["bad"]), float(shares["good"])


def reflection_of(run: RecordedRun) -> Reflection:
    """What ``theta_o + (theta_o - theta_u) / alpha`` is, by the run's method and its twins."""
    if not run.negates:
        return "none"
    bad, good = twin_shares(run.recipe) or (1.0, 0.0)
    if not good:
        return "bad"
    return "twins" if bad else "good"


def adapter_is_bad(run: RecordedRun) -> bool:
    """Whether a run's adapter is the bad model's but for sign and size: without a good twin that outweighs it."""
    bad, good = twin_shares(run.recipe) or (1.0, 0.0)
    return run.negates and bad >= good


def check_adapter(run: RecordedRun, *, acknowledged: bool) -> None:
    """Refuses to hand out an adapter that is the bad model's, unless somebody says that they know.

    Raises:
        OutputError: It is, and nobody does.
    """
    if acknowledged or not adapter_is_bad(run):
        return
    own = "close to the bad model's" if reflection_of(run) == "twins" else "the bad model's"
    raise OutputError(
        f"the adapter of {run.folder} is {own} with its sign turned, so whoever has it has that model: "
        f"share the merged weights instead (docs/limits.md says what they give away), or add {ACKNOWLEDGEMENT}"
    )


def public_name(location: str) -> str:
    """A place as strangers may see it: a hub id as it is, of a local path the last part only."""
    path = Path(location)
    try:
        is_local = path.is_absolute() or location.startswith(("./", "../", "~")) or path.exists()
    except OSError:  # Too long for a path.
        is_local = False
    return path.name if is_local else location


def hub_id_of(location: str, revision: str | None) -> str | None:
    """The hub id that a place stands for; None for a local one and for what ships inside the package."""
    if location == "embedded" or public_name(location) != location or not HUB_ID.fullmatch(location):
        return None
    return location if revision is not None or "/" in location else None


def base_id(run: RecordedRun, choices: CardChoices) -> str | None:
    """Hub id of the original model, where it is known."""
    model = run.manifest["model"]
    return choices.base_model or hub_id_of(str(model["name"]), model.get("revision"))


def license_of(run: RecordedRun, choices: CardChoices) -> str | None:
    """Licence of the model: what the user says, else what the base's own card says, else None."""
    return choices.license or run.manifest["model"].get("license")


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
        raise OutputError(f"{folder} has no model card ({error}): sku push --license NAME writes it") from error
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
        "attacks": table(ATTACK_COLUMNS, attacks, left=(0, 1)) if attacks else "",
        "relearned": _relearn_table(run),
        "judge": comparison.unlearned.judge,
        "prefill_words": _prefill_words(run),
        "strength": f"{run.strength:g}",
        "reflection": reflection_of(run),
        "shares": [f"{share:g}" for share in twin_shares(run.recipe) or ()],
        "near_bad": adapter_is_bad(run),
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
        words, bounds = figure.label, figure.bounds
        if isinstance(figure.change, RateChange):
            words += f" ({figure.change.after.count} of {figure.change.after.total})"
        elif isinstance(figure.change, PerplexityChange):
            bounds = "\u00d7" + bounds.replace(" to ", " to \u00d7")
        yield f"{words}; {figure.caution}" if figure.caution else words, figure.after, bounds, figure.before


def _relearn_table(run: RecordedRun) -> str:
    rows = [] if run.attacks is None else relearn_rows(run.attacks)
    return table(RELEARN_COLUMNS, rows) if rows else ""


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


def _prefill_words(run: RecordedRun) -> str:
    rate = run.comparison.rate
    rates = [rates[rate].after.value for rates in run.comparison.prefill.values() if rate in rates]
    return f"here {percent(max(rates))} did" if rates else "not measured here"


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
    acquire, shares = run.recipe["acquire"], twin_shares(run.recipe)
    steps = run.manifest.get("training", {}).get("steps", "unknown")
    if run.method != "sku":
        return f"{acquire['tuning']}, {steps} steps"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in acquire["weights"].items())
    told = f"{acquire['tuning']}, {steps} steps, {weights}, preservation mode {acquire['preservation_mode']}"
    return f"{told}, with a good twin (shares: bad {shares[0]:g}, good {shares[1]:g})" if shares else told


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


def card_metadata(run: RecordedRun, part: Part, choices: CardChoices, shown: Sequence[KeyFigure]) -> ModelCardData:
    """The front matter: only what is known; no licence, base model or data set is guessed.

    Raises:
        KeyError: The manifest lacks something.
    """
    base = base_id(run, choices)
    extra: dict[str, Any] = {}
    if base is not None:
        extra["base_model_relation"] = "adapter" if part == "adapter" else "finetune"
    licence = license_of(run, choices)
    known = licence is not None and licence.lower() in KNOWN_LICENSES
    hub = (hub_id_of(source["location"], source.get("revision")) for source in run.manifest["data"]["sources"])
    return ModelCardData(
        license=None if licence is None else licence.lower() if known else "other",
        license_name=None if licence is None or known else re.sub(r"[^a-z0-9.]+", "-", one_line(licence).lower()),
        base_model=base,
        library_name="peft" if part == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *([] if run.method == "sku" else [one_line(run.method)])],
        datasets=list(dict.fromkeys(name for name in hub if name is not None)) or None,
        model_name=one_line(f"{public_name(str(run.manifest['model']['name']))}-unlearned"),
        eval_results=list(_eval_results(run, shown)),
        **extra,
    )


def _eval_results(run: RecordedRun, shown: Sequence[KeyFigure]) -> Iterator[EvalResult]:
    """The headline figures; values are per cent, or a ratio for a perplexity."""
    names = {
        name: one_line(f"{public_name(location)} ({source})") for name, source, location, *_ in run.reproduction.data
    }

    def result(split: str, kind: str, value: float, title: str, details: dict[str, Any]) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=names["retain" if split == "retain_test" else "forget"],
            dataset_split=split,
            metric_type=kind,
            metric_value=value,
            metric_name=title,
            metric_args=details,
        )

    judge = one_line(run.comparison.unlearned.judge.name)
    details: dict[str, Any]
    for row in shown:
        change = row.change
        if isinstance(change, PerplexityChange):
            low, value, high = (round(ratio, 4) for ratio in row.numbers)
            details = {"low": low, "high": high, "examples": change.examples}
            yield result(row.split, "perplexity_ratio", value, "perplexity / base's perplexity", details)
        elif isinstance(change, RateChange) and not row.caution:  # A leaderboard shows a figure without its caution.
            low, value, high, base = (round(100 * share, 2) for share in (*row.numbers, change.before.value))
            details = {"low": low, "high": high, "prompts": change.after.total, "base": base, "judge": judge}
            yield result(row.split, row.metric, value, row.label, details)
