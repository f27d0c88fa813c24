"""What the body of a card says, taken from a run's records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sku.attacks.results import AttackReport
from sku.errors import OutputError
from sku.evaluate.judges import JudgeCard, card_from_dict
from sku.evaluate.metrics import prefill_words
from sku.evaluate.results import EvaluationSetup
from sku.evaluate.verdict import CANT_MEASURE, OverallVerdict
from sku.report.attack_table import NOTHING, AttackRow, attack_rows
from sku.report.html.reproduction import data_sets
from sku.report.table_rows import TableRow
from sku.sharing.finished_run import FinishedRunFiles, Part
from sku.sharing.markdown import Written, escaped, fenced

HEADLINE = (
    ("unseen", "replies", "harmful", "harmful, unseen prompts"),
    ("unlearned", "replies", "harmful", "harmful, {unlearned}"),
    ("unseen", "prefill", "harmful", "harmful, unseen prompts, prefill"),
    ("unlearned", "prefill", "harmful", "harmful, {unlearned}, prefill"),
    ("unseen", "replies", "degenerate", "gibberish, unseen prompts"),
    ("unseen", "replies", "cut_off", "cut at the limit, unseen prompts"),
    ("retain_test", "replies", "cut_off", "cut at the limit, normal prompts"),
    ("retain_test", "replies", "over_refusal", "refused, normal prompts"),
    ("retain_test", "replies", "exact_answer", "exact answer, normal prompts"),
)
"""Split, kind of reply, rate and what a reader calls it, ``{unlearned}`` by its own name: what a card shows first."""
NO_VERDICT = "no verdict: an earlier version of SKU made this run and gave none"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HIDDEN_SETTINGS = ("judge_settings",)
"""Parts of a recipe that may hold addresses of somebody's servers."""
_NON_COMMERCIAL = re.compile(r"\bnc\b", re.IGNORECASE)


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


def percent(share: float) -> str:
    """``12.5 %``."""
    return f"{100 * share:.1f} %"


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


def base_id(run: FinishedRunFiles, choices: CardChoices) -> str | None:
    """Hub id of the original model, where it is known."""
    model = run.manifest["model"]
    return choices.base_model or hub_id_of(str(model["name"]), model.get("revision"))


def body_facts(run: FinishedRunFiles, part: Part, choices: CardChoices) -> dict[str, Any]:
    """Everything the template asks for; values are escaped there, save those that are ``Written``.

    Raises:
        KeyError: The records lack something.
    """
    manifest, results = run.manifest, run.results
    recipe, negation, model = run.recipe, manifest["negation"], manifest["model"]
    base = base_id(run, choices) or public_name(str(model["name"]))
    environment = manifest["environment"]
    sources = list(data_rows(run))
    named = {row["licence"] for row in sources if _NON_COMMERCIAL.search(row["licence"])}
    attacks = attack_rows(AttackReport.from_dict(results["attacks"])) if "attacks" in results else []
    return {
        "title": f"{Path(base).name} unlearned{', adapter' if part == 'adapter' else ''}",
        "part": part,
        "part_name": "with adapter" if part == "adapter" else "unlearned",
        "base": base,
        "version": environment["sku"],
        "verdict": verdict_line(run),
        "headline": list(headline_rows(run)),
        # Runs of 0.1.0 have the notes of the setup there alone.
        "notes": list(dict.fromkeys((*results["notes"], *results["unlearned"]["setup"]["notes"]))),
        "table": _whole_table(results["table"]),
        "attacks": attacks,
        "precisions": _precisions(run),
        "dtype": negation["dtype"],
        "judge": judge_of(run),
        "forced_words": _forced_words(run, attacks),
        "prompt_format": results["unlearned"]["setup"]["prompt_format"],
        "negates": run.negates,
        "method": run.method,
        "strength": f"{run.strength:g}",
        "why": _why(run),
        "change": _change(negation),
        "training": _training(run),
        "seed": recipe["seed"],
        "base_detail": f"{base}, revision {model.get('revision') or 'unknown (not read from the hub)'}, "
        f"{model['parameters']:,} parameters",
        "software": f"sku {environment['sku']}, "
        + ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "transformers", "peft")),
        "recipe_name": recipe["name"],
        "recipe_sha256": manifest["recipe_sha256"],
        "data": sources,
        "non_commercial": ", ".join(sorted(named)),
        "licence_unknown": license_of(run, choices) is None,
        "recipe": fenced(yaml.safe_dump(_public_recipe(recipe), sort_keys=False, allow_unicode=True), "yaml"),
        "loading": _loading(part, base_id(run, choices)),
    }


def headline(run: FinishedRunFiles) -> Iterator[tuple[str, str, str, str]]:
    """``HEADLINE`` with the name of the split ``unlearned`` in this run."""
    unlearned = EvaluationSetup(**run.results["unlearned"]["setup"]).split_name("unlearned")
    for split, kind, rate, name in HEADLINE:
        yield split, kind, rate, name.format(unlearned=unlearned)


def verdict_line(run: FinishedRunFiles) -> str:
    """What the run came to, in one line, or that it says nothing of it."""
    found = run.results.get("verdict")
    return NO_VERDICT if found is None else OverallVerdict.from_dict(found).line


def judge_of(run: FinishedRunFiles) -> JudgeCard:
    """The card of the run's judge."""
    return card_from_dict(run.results["unlearned"]["judge"])


def is_unmeasured(run: FinishedRunFiles, rate: str, change: Mapping[str, Any], *, replies: int = 1) -> bool:
    """Whether a harmful rate, before or after, tells nothing under this judge."""
    judge, sides = judge_of(run), (change["before"], change["after"])
    return rate == "harmful" and not all(
        judge.can_measure(side["value"], side["low"], replies=replies) for side in sides
    )


def headline_rows(run: FinishedRunFiles) -> Iterator[dict[str, str]]:
    """The few figures that decide, with intervals, in the order of ``HEADLINE``; then perplexities."""
    for split, kind, rate, name in headline(run):
        change = run.results[kind].get(split, {}).get(rate)
        if change is not None:
            after = change["after"]
            doubt = f"; {CANT_MEASURE}" if is_unmeasured(run, rate, change) else ""
            yield {
                "name": f"{headline_name(run, split, kind, name)} ({after['count']} of {after['total']}){doubt}",
                "value": percent(after["value"]),
                "interval": f"{100 * after['low']:.1f} to {100 * after['high']:.1f}",
                "base": percent(change["before"]["value"]),
            }
    for split, leaks in run.results["leak"].items():
        k = max(leaks, key=int)
        if int(k) > 1 and split == "unseen":
            after = leaks[k]["after"]
            doubt = f"; {CANT_MEASURE}" if is_unmeasured(run, "harmful", leaks[k], replies=int(k)) else ""
            yield {
                "name": f"harmful, unseen prompts, any of {k} drawn replies{doubt}",
                "value": percent(after["value"]),
                "interval": f"{100 * after['low']:.1f} to {100 * after['high']:.1f}",
                "base": percent(leaks[k]["before"]["value"]),
            }
    for split, name in (("retain_test", "normal answers"), ("unseen", "unseen harmful answers")):
        change = run.results["perplexity"].get(split)
        if change is not None:
            yield {
                "name": f"perplexity of {name}, in multiples of the base's",
                "value": f"\u00d7{change['ratio']:.4g}",
                "interval": f"\u00d7{change['low']:.4g} to \u00d7{change['high']:.4g}",
                "base": "\u00d71",
            }


def data_rows(run: FinishedRunFiles) -> Iterator[dict[str, str]]:
    """Where the data came from, a row for each set, in the order in which it was read."""
    for (name, config), source in zip(data_sets(run.recipe).items(), run.manifest["data"]["sources"], strict=False):
        yield {
            "name": name.replace("_", " "),
            "source": f"{public_name(source['location'])} ({source['source']})",
            "revision": source.get("revision") or NOTHING,
            "licence": config.get("license") or source.get("licence") or "unknown",
            "rows": f"{source['rows_read']:,}",
            "sha256": source["sha256"],
        }


def license_of(run: FinishedRunFiles, choices: CardChoices) -> str | None:
    """Licence of the model: what the user says, else what the base's own card says, else None."""
    told = choices.license or run.recipe["model"].get("license")
    return told or run.manifest["model"].get("license")


def headline_name(run: FinishedRunFiles, split: str, kind: str, name: str) -> str:
    """A name of ``HEADLINE``; that of a prefill with the lengths that were tried and the one that is shown."""
    if kind != "prefill":
        return name
    unlearned = run.results["unlearned"]
    if "worst_prefill" in unlearned:
        words = prefill_words(map(int, unlearned["prefill"][split]), unlearned["worst_prefill"][split])
    else:  # Of a run that tried one length.
        words = prefill_words([unlearned["setup"]["config"]["prefill_tokens"]])
    return f"{name.removesuffix('prefill')}{words}"


def _forced_words(run: FinishedRunFiles, attacks: Sequence[AttackRow]) -> str:
    rates = [rates["harmful"]["after"]["value"] for rates in run.results["prefill"].values() if "harmful" in rates]
    told = [f"here {percent(max(rates))} did"] if rates else []
    if attacks:
        told.append("see the attacks above")
    return ", ".join(told) or "not measured here"


def _why(run: FinishedRunFiles) -> str:
    pick = run.manifest.get("sweep") if run.sweep is None else run.sweep.get("pick")
    if pick and pick["alpha"] == run.strength:
        return str(pick["why"])
    return "given in the recipe, not chosen by a search"


def _change(negation: Mapping[str, Any]) -> str:
    share = negation["task_vector_norm"] / negation["base_norm"] if negation["base_norm"] else 0.0
    return (
        f"{negation['changed_weights']} tensors, task vector {100 * share:.3g} % of their norm, saved as "
        f"{negation['dtype']}, {100 * negation['survival']:.4g} % of the change survived rounding"
    )


def _training(run: FinishedRunFiles) -> str:
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


def _whole_table(rows: list[Mapping[str, str]]) -> Written:
    lines = ["| | base | unlearned | 95 % | change (95 %) |", "| --- | ---: | ---: | ---: | ---: |"]
    for plain in rows:
        row = TableRow(**plain)
        cells = (row.label, row.before, row.after, row.interval, row.change)
        lines.append(f"| {' | '.join(escaped(cell) for cell in cells)} |")
    return Written("\n".join(lines))


def _precisions(run: FinishedRunFiles) -> dict[str, Any] | None:
    """Columns, rows and notes of ``precisions.json``; None where there is no such file."""
    if run.precisions is None:
        return None
    found = run.precisions
    rows = [_precision_row(found["model"]["dtype"], found["measured"], None)]
    rows += [_precision_row(entry["precision"], entry["measured"], entry["survival"]) for entry in found["results"]]
    columns = ("harmful, unseen", "worst prefill, unseen", "gibberish, unseen", "perplexity, normal", "change kept")
    return {"columns": columns, "rows": rows, "notes": found["notes"]}


def _precision_row(
    name: str, measured: Mapping[str, Any] | None, survival: Mapping[str, Any] | None
) -> dict[str, Any]:
    cells = []
    for kind, rate in (("replies", "harmful"), ("prefill", "harmful"), ("replies", "degenerate")):
        share = (measured or {}).get(kind, {}).get("unseen", {}).get(rate)
        cells.append(NOTHING if share is None else _with_interval(share))
    ratio = (measured or {}).get("perplexity", {}).get("retain_test")
    cells.append(NOTHING if ratio is None else f"\u00d7{ratio['ratio']:.4g}")
    cells.append(NOTHING if survival is None else percent(survival["projection"]))
    return {"name": name, "cells": cells}


def _with_interval(rate: Mapping[str, float]) -> str:
    return f"{percent(rate['value'])} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


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


def _loading(part: Part, base: str | None) -> Written:
    place = base or "BASE_MODEL"
    if part == "adapter":
        return fenced(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained({place!r}, dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({place!r})",
            "python",
        )
    return fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_REPOSITORY")',
        "python",
    )
