"""The front matter of a card, as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from sku.sharing.card_facts import (
    CardChoices,
    base_id,
    data_rows,
    headline,
    headline_name,
    hub_id_of,
    is_unmeasured,
    license_of,
    public_name,
)
from sku.sharing.card_file import TAG
from sku.sharing.finished_run import FinishedRunFiles, Part
from sku.sharing.markdown import one_line

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


def card_metadata(run: FinishedRunFiles, part: Part, choices: CardChoices) -> ModelCardData:
    """The front matter.

    Args:
        run: A finished run.
        part: What it is the card of.
        choices: What a user says beyond the recipe.

    Returns:
        Only what is known: no licence, base model or data set is guessed.

    Raises:
        KeyError: The records lack something.
    """
    base = base_id(run, choices)
    name = one_line(f"{public_name(str(run.manifest['model']['name']))}-unlearned")
    extra: dict[str, Any] = {}
    if base is not None:
        extra["base_model_relation"] = "adapter" if part == "adapter" else "finetune"
    licence = license_of(run, choices)
    known = licence is not None and licence.lower() in KNOWN_LICENSES
    return ModelCardData(
        license=None if licence is None else licence.lower() if known else "other",
        license_name=None if licence is None or known else re.sub(r"[^a-z0-9.]+", "-", one_line(licence).lower()),
        base_model=base,
        library_name="peft" if part == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *([] if run.method == "sku" else [one_line(run.method)])],
        datasets=_hub_datasets(run) or None,
        model_name=name,
        eval_results=_eval_results(run),
        **extra,
    )


def _hub_datasets(run: FinishedRunFiles) -> list[str]:
    found = (hub_id_of(source["location"], source.get("revision")) for source in run.manifest["data"]["sources"])
    return list(dict.fromkeys(name for name in found if name is not None))


def _eval_results(run: FinishedRunFiles) -> list[EvalResult]:
    """The headline figures; values are per cent, or a ratio for a perplexity."""
    names = {row["name"]: row["source"] for row in data_rows(run)}
    judge = run.results["unlearned"]["judge"]["name"]
    found = []
    for split, kind, rate, title in headline(run):
        change = run.results[kind].get(split, {}).get(rate)
        if change is None or is_unmeasured(run, rate, change):
            continue  # A leaderboard shows a figure without what stands beside it.
        after = change["after"]
        found.append(
            _result(
                split,
                names["retain" if split == "retain_test" else "forget"],
                f"{rate}_{kind}",
                round(100 * after["value"], 2),
                headline_name(run, split, kind, title),
                {
                    "low": round(100 * after["low"], 2),
                    "high": round(100 * after["high"], 2),
                    "prompts": after["total"],
                    "base": round(100 * change["before"]["value"], 2),
                    "judge": one_line(judge),
                },
            )
        )
    for split in ("retain_test", "unseen"):
        change = run.results["perplexity"].get(split)
        if change is not None:
            bounds = {"low": round(change["low"], 4), "high": round(change["high"], 4), "examples": change["examples"]}
            name = names["retain" if split == "retain_test" else "forget"]
            found.append(
                _result(
                    split,
                    name,
                    "perplexity_ratio",
                    round(change["ratio"], 4),
                    "perplexity / base's perplexity",
                    bounds,
                )
            )
    return found


def _result(split: str, source: str, kind: str, value: float, title: str, details: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="custom",
        dataset_name=one_line(source),
        dataset_split=split,
        metric_type=kind,
        metric_value=value,
        metric_name=title,
        metric_args=details,
    )
