"""The model card of a finished run: Hugging Face front matter, figures with intervals, limits, origin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from sku.errors import OutputError
from sku.report.read_run import Part, RecordedRun, fits_schema, read_run
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
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigscience-bloom-rail-1.0 bigscience-openrail-m "
    "bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 "
    "cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 "
    "fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 "
    "lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by "
    "ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib".split()
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


def model_card(run: RecordedRun, part: Part, choices: CardChoices) -> str:
    """The card of a part of a run: Markdown with front matter; equal runs give equal cards.

    Raises:
        EvaluationError: The manifest lacks what a card needs.
    """
    environment = Environment(undefined=StrictUndefined, finalize=escaped, keep_trailing_newline=True)
    template = (resources.files("sku") / "report" / "templates" / "model_card.md.jinja").read_text(encoding="utf-8")
    with fits_schema(run.folder):
        shown = list(key_figures(run.comparison, ON_CARD))
        data = card_metadata(run, part, choices, shown)
        body = environment.from_string(template).render(**_facts(run, part, choices, shown))
    body = re.sub(r"\n{3,}", "\n\n", body)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _facts(run: RecordedRun, part: Part, choices: CardChoices, shown: Sequence[KeyFigure]) -> dict[str, Any]:
    """Everything the template asks for; values are escaped there, save those that are ``Written``."""
    base = base_id(run, choices)
    licences = {licence for *_, licence in run.data if _NON_COMMERCIAL.search(licence)}
    return {
        "run": run,
        "part": part,
        "base": base or public_name(str(run.manifest["model"]["name"])),
        "place": Written(base or "BASE_MODEL"),
        "figures": shown,
        "attacks": [] if run.attacks is None else attack_rows(run.attacks),
        "attack_columns": ATTACK_COLUMNS,
        "relearned": [] if run.attacks is None else relearn_rows(run.attacks),
        "relearn_columns": RELEARN_COLUMNS,
        "table": table,
        "judge": run.comparison.unlearned.judge,
        "prefill_words": _prefill_words(run),
        "strength": f"{run.strength:g}",
        "why": _why(run),
        "reflection": reflection_of(run),
        "shares": [f"{share:g}" for share in twin_shares(run.recipe) or ()],
        "near_bad": adapter_is_bad(run),
        "public_name": public_name,
        "non_commercial": ", ".join(sorted(licences)),
        "licence_unknown": license_of(run, choices) is None,
        "recipe": fenced(yaml.safe_dump(_public_recipe(run.recipe), sort_keys=False, allow_unicode=True)),
    }


def _prefill_words(run: RecordedRun) -> str:
    rate = run.comparison.rate
    rates = [rates[rate].after.value for rates in run.comparison.prefill.values() if rate in rates]
    return f"here {percent(max(rates))} did" if rates else "not measured here"


def _why(run: RecordedRun) -> str:
    pick = run.manifest.get("sweep") or {}
    chosen = pick.get("alpha") == run.strength
    return str(pick["why"]) if chosen else "given in the recipe, not chosen by a search"


def _public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without local folders and settings of judges; other ``methods`` are not of this model."""

    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: shown(entry) for name, entry in value.items() if name not in _HIDDEN_SETTINGS}
        if isinstance(value, list):
            return [shown(entry) for entry in value]
        return public_name(value) if isinstance(value, str) and "/" in value else value

    own = {name: value for name, value in recipe.items() if name != "methods"}
    methods = {name: value for name, value in recipe.get("methods", {}).items() if name == recipe["method"]}
    return {name: shown(value) for name, value in (own | ({"methods": methods} if methods else {})).items()}


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
    """The headline figures; values are per cent, or a ratio to the base's for a perplexity."""
    names = {name: one_line(f"{public_name(location)} ({source})") for name, source, location, *_ in run.data}
    for row in shown:
        if row.caution:  # A leaderboard shows a figure without it.
            continue
        low, value, high = (round(100 * number if row.is_share else number, 4) for number in row.numbers)
        yield EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=names["retain" if row.split == "retain_test" else "forget"],
            dataset_split=row.split,
            metric_type=row.metric,
            metric_value=value,
            metric_name=row.label,
            metric_args={"low": low, "high": high, "judge": one_line(run.comparison.unlearned.judge.name)},
        )
