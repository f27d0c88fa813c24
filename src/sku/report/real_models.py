"""One table of all models, methods and seeds: plain figures from the records of runs.

``sku results RUN... --table FILE.json`` writes it: one object per model, method and seed with ``KEYS``, and the
figures of the base model under ``base_``. A figure that a record doesn't have is null. Rates are shares from 0 to 1,
without correction; harmful rates are of the prompts that the judge had a verdict on for both base and unlearned model
of a run. A harmful rate stands twice: as the rules count it, and under
``..._judge`` as the judge alone has it. Rows have besides:

- ``intervals``: figure -> its 95 % interval, of those that are rates of replies;
- ``outcomes``: model -> split, kind and prefill -> hash of the prompt -> outcome, so that every paired test can be
  counted again; ``+`` behind it where the judge alone calls the reply harmful;
- ``recipe_sha256`` and ``environment``: the settings, the versions and the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from sku.config.data import FINAL
from sku.errors import EvaluationError
from sku.evaluate.metrics import ReplyOutcome
from sku.evaluate.records import (
    BORDERLINE,
    HARMFUL,
    OUTCOMES_FILE,
    from_plain,
    prompt_hash,
    read_json_object,
    read_rows,
)
from sku.evaluate.results import HarnessScores, main_metric

RUN_FILE = "results.json"
FIGURES = (
    "n", "harmful_unseen", "harmful_unseen_judge", "harmful_final", "harmful_final_judge", "harmful_other_source",
    "harmful_other_source_judge", "worst_prefill", "worst_prefill_judge", "xstest_unsafe", "xstest_unsafe_judge",
    "xstest_safe_refused", "benign_final_refused", "normal_refused", "borderline_refused", "gibberish",
    "sampled_any4", "worst_template", "kl_normal", "perplexity_ratio", "relearn_half_steps", "utility_accuracy",
)  # fmt: skip
"""Unseen prompts with a verdict; harmful replies to them, to the final prompts, to prompts of other sources, to unseen
prompts after the prefill that is the worst for the model, and to XSTest's unsafe prompts; refused of XSTest's safe,
the final benign, normal and borderline prompts; gibberish on the retain prompts; unseen prompts with a harmful reply
among four sampled ones; the worst template of the attack; KL to the base, nats a token, and perplexity as a multiple
of the base's, on normal answers; steps of relearning until half of the base's harm is back, at the number of pairs
where that takes the fewest, ``> 256`` where it never is; mean accuracy over the tasks of lm-eval."""
KEYS = ("model", "method", "seed", "verdict", *FIGURES)
FINAL_HARMFUL = f"{HARMFUL}{FINAL}"

Row = dict[str, Any]


def table_rows(folders: Iterable[Path]) -> list[Row]:
    """Reads finished runs: one row for each model, method and seed, in order.

    Raises:
        EvaluationError: A folder holds no results, or broken ones, or two runs have one model, method and seed.
    """
    rows: dict[tuple[Any, ...], tuple[Row, Path]] = {}
    for folder in folders:
        results = read_json_object(folder / RUN_FILE, "run again")
        row = {**run_row(results, str(folder / RUN_FILE)), "outcomes": _outcomes(folder)}
        which = (row["model"], row["method"], row["seed"])
        if which in rows:
            words = f"{row['method']} on {row['model']} with seed {row['seed']}"
            raise EvaluationError(f"{rows[which][1]} and {folder} both hold {words}: name one of them")
        rows[which] = row, folder
    return [rows[which][0] for which in sorted(rows)]


def run_row(results: Mapping[str, Any], where: str = RUN_FILE) -> Row:
    """All ``KEYS`` of one run, and ``FIGURES`` of its base under ``base_``, from what ``results.json`` holds.

    Raises:
        EvaluationError: It doesn't hold what a run writes.
    """
    try:
        recipe = results["manifest"]["recipe"]
        own, base = _of_run(results, "after", "unlearned"), _of_run(results, "before", "base")
        acquire = recipe["acquire"]
        twins = recipe["method"] == "sku" and acquire.get("twin", "none") != "none"
        method = _twins_words(recipe["negate"].get("twin")) if twins else recipe["method"]
        transform = recipe["negate"].get("transform")
        if transform is not None:
            method += f"+{PurePath(transform).stem}"
        if own["kl_normal"] is not None:
            base |= {"kl_normal": 0.0, "perplexity_ratio": 1.0}  # A base is not measured against itself.
        return {
            "model": PurePath(recipe["model"]["path"]).name,
            "method": method,
            "seed": recipe["seed"] if acquire["seed"] is None else acquire["seed"],
            "verdict": results["verdict"]["line"],
            **own,
            **{f"base_{key}": value for key, value in base.items()},
            "intervals": {
                key: [changes[rate]["after"]["low"], changes[rate]["after"]["high"]]
                for key, (changes, rate) in _changes(results).items()
                if rate in changes and own[key] is not None
            },
            "recipe_sha256": results["manifest"]["recipe_sha256"],
            "environment": results["manifest"]["environment"],
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationError(f"{where} is not that of a finished run of this version ({error}): run again") from None


def _twins_words(shares: Mapping[str, float] | None) -> str:
    """What a run of two twins is called: theirs is not the paper's method."""
    if shares is None:
        return "twins"
    if not shares["bad"]:
        return f"good twin alone ({shares['good']:g})"
    return f"twins ({shares['good']:g} good - {shares['bad']:g} bad)"


_RATES = {
    "harmful_unseen": ("forget_test", "harmful"), "harmful_final": ("harmful:final", "harmful"),
    "xstest_unsafe": ("xstest_unsafe", "harmful"), "xstest_safe_refused": ("xstest_safe", "over_refusal"),
    "benign_final_refused": ("normal:final", "over_refusal"), "normal_refused": ("retain_test", "over_refusal"),
    "borderline_refused": (BORDERLINE, "over_refusal"), "gibberish": ("retain_test", "gibberish"),
}  # fmt: skip
"""Figure -> split, or category of normal prompts, and the rate there. Harmful ones stand as the judge's own too."""


def _changes(results: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Figure -> the changes of one set of prompts, and the rate that the figure is of."""
    # Gibberish is of all retain prompts, the borderline ones included.
    sets = {**results["replies"], **results["normal"]}
    found = {
        key: (results["replies"].get(split, {}) if key == "gibberish" else sets.get(split, {}), rate)
        for key, (split, rate) in _RATES.items()
    }
    return found | {
        f"{key}_judge": (changes, "harmful_ungated") for key, (changes, rate) in found.items() if rate == "harmful"
    }


def _of_run(results: Mapping[str, Any], side: Literal["before", "after"], name: str) -> Row:
    """Figures of one model of a run: ``before`` is its base, ``after`` the unlearned one."""
    replies, result = results["replies"], results[name]

    def share(changes: Mapping[str, Any], rate: str) -> float | None:
        return float(changes[rate][side]["value"]) if rate in changes else None

    def harmful(*sets: Mapping[str, Any], rate: str) -> float | None:
        """Of several sets together."""
        found = [changes[rate][side] for changes in sets if rate in changes]
        total = sum(one["total"] for one in found)
        return sum(one["count"] for one in found) / total if total else None

    unseen = replies.get("forget_test", {})
    others = [changes for split, changes in replies.items() if split.startswith(HARMFUL) and split != FINAL_HARMFUL]
    prefills = results["prefill_by_key"].get("forget_test", {}).values()
    agreement, perplexity = result["agreement"].get("retain_test"), results["perplexity"].get("retain_test")
    figures = {key: share(changes, rate) for key, (changes, rate) in _changes(results).items()} | {
        "n": unseen["harmful"][side]["total"] if "harmful" in unseen else None,
        "harmful_other_source": harmful(*others, rate="harmful"),
        "harmful_other_source_judge": harmful(*others, rate="harmful_ungated"),
        "worst_prefill": _largest(share(changes, "harmful") for changes in prefills),
        "worst_prefill_judge": _largest(share(changes, "harmful_ungated") for changes in prefills),
        "sampled_any4": share(results["leak"].get("forget_test", {}), "4"),
        "kl_normal": None if agreement is None else agreement["kl"],
        "perplexity_ratio": None if perplexity is None or side == "before" else perplexity["ratio"],
        "utility_accuracy": _accuracy(result["lm_eval"]),
        **_attacked(results.get("attacks"), side),
    }
    return {key: figures.get(key) for key in FIGURES}


def _attacked(attacks: Mapping[str, Any] | None, side: Literal["before", "after"]) -> Row:
    """The worst template, and the cost of relearning, which a base that is harmful unasked doesn't have."""
    if attacks is None:
        return {}
    who = "control" if side == "before" else "model"
    variants = [one[who]["variants"].values() for one in attacks["results"] if one["attack"] == "template"]
    found: Row = {"worst_template": _largest(rate["value"] for rates in variants for rate in rates)}
    relearned = attacks.get("relearn")
    if relearned is not None and relearned["results"] and side == "after":
        steps = [one["model"]["half_steps"] for one in relearned["results"]]
        known = [count for count in steps if count is not None]
        found["relearn_half_steps"] = min(known) if known else f"> {max(relearned['steps'])}"
    return found


def _outcomes(folder: Path) -> dict[str, dict[str, dict[str, str]]] | None:
    """What became of each reply, by hash of its prompt; sampled replies are left to their rates.

    None where the folder holds the results alone.
    """
    if not (folder / "evaluation").is_dir():
        return None
    found: dict[str, dict[str, dict[str, str]]] = {}
    for model in ("base", "unlearned"):
        _, rows = read_rows(folder / "evaluation" / model / OUTCOMES_FILE, ReplyOutcome)
        own = found.setdefault(model, {})
        for row in rows:
            if row.kind != "sample":
                name = "/".join(filter(None, (row.split, row.kind, row.prefill_key)))
                own.setdefault(name, {})[prompt_hash(row.id)] = f"{row.outcome}{'+' if row.judged_harmful else ''}"
    return found


def _largest(shares: Iterable[float | None]) -> float | None:
    return max((found for found in shares if found is not None), default=None)


def _accuracy(plain: Any) -> float | None:
    """Mean over the tasks that were asked for, each by its main metric; over all parts where a tag was asked for."""
    if plain is None:
        return None
    scores = from_plain(HarnessScores, plain, "lm_eval")
    found = {
        name: task.metrics[metric] for name, task in scores.tasks.items() if (metric := main_metric(task)) is not None
    }
    # A tag has no score of its own.
    names = scores.asked if {*scores.asked} <= found.keys() else tuple(found)
    return math.fsum(found[name] for name in names) / len(names) if names else None
