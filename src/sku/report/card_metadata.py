"""The front matter of a card, as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from sku.errors import OutputError
from sku.evaluate.changes import PerplexityChange, RateChange
from sku.report.facts import data_sets
from sku.report.key_figures import KeyFigure
from sku.report.markdown import one_line
from sku.report.read_run import Part, RecordedRun

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


@dataclass(frozen=True, kw_only=True)
class CardChoices:
    """What a user says of a model beyond its recipe."""

    license: str | None = None
    """Of the model, in place of the recipe's ``model.license`` and of the base's own card."""
    base_model: str | None = None
    """Hub id of the base, where the run read it from a folder."""


def choices_of(model_license: str | None, base_model: str | None) -> CardChoices:
    """Checked choices.

    Raises:
        OutputError: The base model is no hub id.
    """
    if base_model is not None and not (HUB_ID.fullmatch(base_model) and public_name(base_model) == base_model):
        raise OutputError(
            f"--base-model is {base_model}; it must be a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return CardChoices(license=model_license, base_model=base_model)


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
    told = choices.license or run.recipe["model"].get("license")
    return told or run.manifest["model"].get("license")


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
        name: one_line(f"{public_name(source['location'])} ({source['source']})")
        for name, _, source in data_sets(run.manifest)
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
