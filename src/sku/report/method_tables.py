"""The tables of a method comparison: one row per method or control, and each method against a reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from jinja2 import StrictUndefined, Template

from sku.evaluate.metrics import HARM_WORDS, prefill_words, start_words
from sku.evaluate.records import NORMAL, prefills_in_order
from sku.evaluate.statistics import Estimate, holm
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.method_records import (
    BASE,
    NORMAL_KEY,
    PREFILL,
    RESAMPLES,
    UNSEEN_KEY,
    Counted,
    Difference,
    MethodRecord,
    Point,
    counted_of,
    difference_to,
    harm_bounds,
    perplexity_ratio,
    points_of,
    rate,
    worst_prefill,
)
from sku.report.words import NOTHING, bars_escaped, in_points, percent, table

OWN_WORD, BY_RULE = HARM_WORDS["harmful_ungated"], HARM_WORDS["harmful"]
RATES: Mapping[str, tuple[str, str, str]] = {
    # What the judge says without the gate: gibberish can count.
    "harmful_ungated_unseen": (f"{OWN_WORD}, unseen", UNSEEN_KEY, "harmful_ungated"),
    "harmful_unseen": (f"{BY_RULE}, unseen", UNSEEN_KEY, "harmful"),
    "prefill_ungated_unseen": (f"{OWN_WORD}, unseen", PREFILL, "harmful_ungated"),
    "prefill_unseen": (f"{BY_RULE}, unseen", PREFILL, "harmful"),
    "gibberish_unseen": ("gibberish, unseen", UNSEEN_KEY, "gibberish"),
    "gibberish_normal": ("gibberish, normal", NORMAL_KEY, "gibberish"),
    "over_refusal": ("over-refusal, normal", NORMAL_KEY, "over_refusal"),
    "exact_answers": ("exact answers, normal", NORMAL_KEY, "exact_answer"),
}
"""Measure -> heading, that of prefills goes on with the lengths tried; key of the replies; what is counted."""
RATIOS: Mapping[str, str] = {
    "perplexity_normal": "perplexity / base, normal",
    "perplexity_others": "perplexity / base, other answers",
    "perplexity_harmful_unseen": "perplexity / base, harmful unseen",
}
"""Measure -> heading; of the other sets the one with the largest ratio is shown."""
_TESTED = (UNSEEN_KEY, PREFILL)
"""Keys of the table of differences."""
REFERENCE = "sku"
"""Row that the others are compared with, where it is complete."""
_NOT_BRIEF = ("gibberish_normal", "perplexity_harmful_unseen", "utility_cost")


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One row of the comparison."""

    name: str
    title: str
    control: bool
    failed: bool
    """Every seed failed."""
    estimates: Mapping[str, Estimate]
    """Of ``RATES`` and ``RATIOS``, what was measured; after a prefill that is the worst for this row."""
    prefill_tokens: str | None
    """Key of that prefill."""
    prefill_lengths: tuple[str, ...]
    """All that were tried."""
    strength: float | None
    """Mean over seeds."""
    utility_cost: float | None
    """Mean over seeds, on the validation splits: up to 1 is within the utility budget."""
    bound_by: str
    """What is beyond its limit a little above the largest strength within the budget, with the number of seeds where
    they differ."""
    seeds: str
    """``3/3``, ``2/3 failed: reason``: how many seeds the numbers are from, and why the others are missing."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of harmful rates, over all prompts, where the table leaves some out: those without a verdict taken for harmless,
    and for harmful."""


def comparison_rows(records: Sequence[MethodRecord]) -> list[ComparisonRow]:
    """One row per method or control, also where every seed failed: methods in the order of the records, then controls.

    Perplexities are over the record named ``base``, absent where there is none.
    """
    base = next(iter(seeds_of(records, BASE)), None)
    counted = counted_of(records)
    return [_row(seeds_of(records, name), base, counted) for name in row_order(records)]


def row_order(records: Iterable[MethodRecord]) -> list[str]:
    """Names of the rows, in order; ``base`` is the first control."""
    control = {record.name: record.control for record in records}
    return sorted(control, key=lambda name: (control[name], name != BASE))


def comparison_markdown(records: Sequence[MethodRecord]) -> str:
    """All tables of a comparison: differences to SKU with their tests stand below, where SKU is complete."""
    rows = markdown_comparison(comparison_rows(records), legend_line(records))
    differs = points_of(seeds_of(records, REFERENCE))
    return f"{rows}\n{markdown_differences(records)}" if differs else rows


def brief_markdown(records: Sequence[MethodRecord]) -> str:
    """The main columns at equal utility, for a first page."""
    return markdown_comparison(comparison_rows(records), legend_line(records), left_out=_NOT_BRIEF)


def markdown_comparison(rows: Sequence[ComparisonRow], legend: str, *, left_out: Collection[str] = ()) -> str:
    """The rows as a Markdown table, with a legend under it; a column that no row has a number for is left out.

    So are measures that are ``left_out``; with the utility cost goes what it is bound by.
    """
    tried = {key for row in rows for key in row.prefill_lengths}
    prefilled = f", {prefill_words(tried)}"
    headings = {name: heading + prefilled * (key == PREFILL) for name, (heading, key, _) in RATES.items()} | {**RATIOS}
    columns = [
        (heading, [_cell(row, name, tried) for row in rows])
        for name, heading in headings.items()
        if name not in left_out and any(name in row.estimates for row in rows)
    ]
    columns.append(("strength", [NOTHING if row.strength is None else f"{row.strength:.3g}" for row in rows]))
    if "utility_cost" not in left_out and any(row.utility_cost is not None for row in rows):
        costs = [row.utility_cost for row in rows]
        shown = [NOTHING if cost is None else f"{cost:.2f}" if cost < 100 else f"{cost:.2g}" for cost in costs]
        columns.append(("utility cost", shown))
        columns.append(("bound by", [row.bound_by or NOTHING for row in rows]))
    columns = [("method", [row.title for row in rows]), *columns, ("seeds", [row.seeds for row in rows])]
    names, cells = zip(*columns, strict=True)
    return f"{table(names, zip(*cells, strict=True), cell=bars_escaped)}\n{legend}\n"


def markdown_differences(records: Sequence[MethodRecord]) -> str:
    """Harmful rates of each row minus those of ``REFERENCE``, as a Markdown table with a legend under it.

    Some seed of the reference has a point. p-values are Holm-corrected over the whole table.
    """
    own = seeds_of(records, REFERENCE)
    names = [name for name in row_order(records) if name != REFERENCE]
    counted, hit = counted_of(records), deciding_hit(records)
    found = {
        (name, key): difference
        for name in names
        for key in _TESTED
        if (difference := difference_to(seeds_of(records, name), own, key, hit, counted)) is not None
    }
    corrected = dict(zip(found, holm([difference.p_value for difference in found.values()]), strict=True))
    keys = [key for key in _TESTED if any(tested == key for _, tested in found)]
    tried = prefills_tried(points_of(records))
    at = " for the two together" if len(tried) > 1 else ""
    harm = HARM_WORDS[hit]
    headings = {UNSEEN_KEY: f"{harm}, unseen", PREFILL: f"{harm}, unseen, {prefill_words(tried)}{at}"}
    rows = [
        (
            seeds_of(records, name)[0].title,
            *(cell for key in keys for cell in _difference(found.get((name, key)), corrected.get((name, key), 1))),
        )
        for name in names
    ]
    columns = ("method", *(heading for key in keys for heading in (headings[key], "p")))
    return (
        f"{table(columns, rows, cell=bars_escaped)}\nRate of the row minus the rate of {own[0].title}, in points: "
        "below 0 the row is less harmful. p: two-sided paired permutation test over prompts, Holm-corrected over the "
        f"{len(found)} tests of this table. {legend_line(records)}\n"
    )


def legend_line(records: Sequence[MethodRecord]) -> str:
    """What a reader must know of the numbers: strength, intervals, seeds, prompts and judge."""
    complete = [record for record in records if record.point is not None]
    if not complete:
        return "No run is complete and has a strength within the utility budget."
    counted = counted_of(records)
    shown = points_of(complete, counted)[0]
    legend = (resources.files("sku.report") / "templates" / "legend.md.jinja").read_text(encoding="utf-8")
    told: str = Template(legend, undefined=StrictUndefined, trim_blocks=True).render(
        resamples=RESAMPLES,
        seeds=len({record.seed for record in complete}),
        asked=", ".join(prompts_asked(shown)),
        prefills=len(shown.prefills),
        left_out=sum(not has for key in counted if key.startswith(_TESTED) for has in counted[key]),
        judge=judge_sentence(records),
    )
    return told


def deciding_hit(records: Iterable[MethodRecord]) -> str:
    """The harmful rate that decides under the judge of a comparison: ``JudgeCard.deciding_rate``."""
    return next((record.judge.deciding_rate for record in records if record.judge is not None), "harmful_ungated")


def judge_sentence(records: Sequence[MethodRecord]) -> str:
    """Who judged, and whether its errors hide what the base model's harm is: then no row shows that harm fell.

    Nothing is said of a judge that was not calibrated, or without a base model.
    """
    judge = next((record.judge for record in records if record.judge is not None), None)
    if judge is None:
        return "Judge: not named."
    bound = " (an upper bound of the harmful share)" if judge.name == "refusal_rules" else ""
    harm = rate(points_of(seeds_of(records, BASE)), UNSEEN_KEY, judge.deciding_rate)
    doubt = ""
    if harm is not None and not judge.can_measure(harm.value, harm.low):
        doubt = f"; {CANT_MEASURE}: harmless replies alone could give the base model's harmful rate"
    return f"Judge: {judge.name}{bound}{doubt}."


ASKED = {UNSEEN_KEY: "unseen harmful prompts", NORMAL_KEY: "normal prompts"}
"""Key of ``Point.replies`` -> what a reader calls those prompts."""


def prefills_tried(points: Iterable[Point]) -> list[str]:
    """Keys of the prefills that any of the points was asked with, in order."""
    return prefills_in_order(key for point in points for key in point.prefills)


def prompts_asked(point: Point) -> list[str]:
    """How many of each kind, such as ``100 unseen harmful prompts``, ``100/98 with a prefill (1 token/3 tokens)``."""
    asked = [f"{len(point.replies[key])} {words}" for key, words in ASKED.items() if key in point.replies]
    if point.prefills:
        counts = [len(point.replies[key]) for key in point.prefills.values()]
        shown = counts[:1] if len(set(counts)) == 1 else counts
        words = "/".join(map(start_words, point.prefills))
        asked.insert(1, f"{'/'.join(map(str, shown))} with a prefill ({words})")
    return asked


def _cell(row: ComparisonRow, name: str, tried: Collection[str]) -> str:
    """An estimate; after a prefill with its key, where several were tried."""
    shown = _estimate(row.estimates.get(name), name)
    if name in row.bounds:
        shown += " [{:.1f} to {:.1f}]".format(*(100 * bound for bound in row.bounds[name]))
    of_several = name in RATES and RATES[name][1] == PREFILL and len(tried) > 1 and row.prefill_tokens is not None
    return f"{shown}, {row.prefill_tokens}" if of_several else shown


def _bound_by(records: Sequence[MethodRecord]) -> str:
    """``KL on retain_validation``, or each with its number of seeds."""
    measured = [record for record in records if record.failure is None and record.name != BASE]
    found = Counter(record.bound_by or "nothing, up to the largest strength" for record in measured)
    return "; ".join(name if len(found) == 1 else f"{name} ({count})" for name, count in found.most_common())


def seeds_of(records: Iterable[MethodRecord], name: str) -> list[MethodRecord]:
    """The records of one row, in order of the seeds."""
    return sorted((record for record in records if record.name == name), key=lambda record: record.seed)


def _row(records: Sequence[MethodRecord], base: MethodRecord | None, counted: Counted) -> ComparisonRow:
    points, whole = points_of(records, counted), points_of(records)
    worst = worst_prefill(points, hit=deciding_hit(records))
    keys = {name: f"{PREFILL}/{worst}" if key == PREFILL else key for name, (_, key, _) in RATES.items()}
    strengths = [point.strength for point in points]
    costs = [point.cost for point in points]

    def ratio(split: str) -> Estimate | None:
        return None if base is None or base.point is None else perplexity_ratio(points, base.point, split)

    sets = dict.fromkeys(split for point in points for split in point.losses if split.startswith(NORMAL))
    others = [found for split in sets if (found := ratio(split)) is not None]
    estimates = {name: rate(points, keys[name], hit) for name, (_, _, hit) in RATES.items()} | {
        "perplexity_normal": ratio("retain_test"),
        "perplexity_others": max(others, key=lambda found: found.value, default=None),
        "perplexity_harmful_unseen": ratio("forget_test"),
    }
    return ComparisonRow(
        name=records[0].name,
        title=records[0].title,
        control=records[0].control,
        failed=all(record.failure is not None for record in records),
        estimates={name: found for name, found in estimates.items() if found is not None},
        prefill_tokens=worst,
        prefill_lengths=tuple(prefills_tried(points)),
        strength=sum(strengths) / len(strengths) if strengths else None,
        utility_cost=sum(costs) / len(costs) if costs else None,
        bound_by=_bound_by(records),
        bounds={
            name: harm_bounds(whole, keys[name], hit)
            for name, (_, _, hit) in RATES.items()
            if hit in HARM_WORDS and whole and not all(counted.get(keys[name], ()))
        },
        seeds=_seeds_text(records),
    )


def _seeds_text(records: Sequence[MethodRecord]) -> str:
    """``2/3 failed: reason; 1 without ...``: nothing that is missing goes unsaid."""
    missing = [record for record in records if record.point is None]
    reasons = Counter(
        "no strength within the utility budget" if record.failure is None else f"failed: {record.failure}"
        for record in missing
    )
    told = "; ".join(reason if count == len(missing) else f"{count} {reason}" for reason, count in reasons.items())
    return f"{len(records) - len(missing)}/{len(records)} {told}".strip()


def _estimate(estimate: Estimate | None, name: str) -> str:
    if estimate is None:
        return NOTHING
    if name in RATES:
        return f"{percent(estimate.value)} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
    value, low, high = (ratio_text(number) for number in (estimate.value, estimate.low, estimate.high))
    return f"\u00d7{value} ({low} to {high})"


def ratio_text(value: float) -> str:
    """A ratio with as many digits as say something: ``1.012``, ``66.87``, ``1.19e+10``."""
    return f"{value:.3f}" if value < 10 else f"{value:.4g}" if value < 10_000 else f"{value:.2e}"


def _difference(difference: Difference | None, p_value: float) -> tuple[str, str]:
    if difference is None:
        return NOTHING, NOTHING
    shown = in_points(difference.value, difference.low, difference.high)
    return shown, f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
