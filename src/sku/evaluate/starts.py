"""Where a prefill begins: with the base model's own harmful reply, else with the dataset's harmful answer.

Words of another model are unlikely under the model that is asked, and may be easier to refuse than its own. Base,
unlearned model and every attack get the same starts, so that their replies can be paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sku.data.examples import Example
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.records import GenerationRecord, Split, Start
from sku.evaluate.sampling import start_id

Starts = Mapping[str, Start]
"""By id."""
NO_BASE = (
    "no base model was given, so every prefill begins with the dataset's harmful answer, which another model may have "
    "written"
)


def by_id(starts: Iterable[Start]) -> dict[str, Start]:
    """The form in which starts are looked up."""
    return {start.id: start for start in starts}


def start_of(split: Split, example: Example, starts: Starts) -> Start:
    """The start of one prompt: the dataset's answer where none is known."""
    name = start_id(split, example.prompt)
    return starts.get(name) or Start(id=name, source="data", text=example.answer)


def choose_starts(replies: Sequence[GenerationRecord], outcomes: Iterable[ReplyOutcome]) -> list[Start]:
    """One start for each prompt that the base model was asked.

    Args:
        replies: Of the base model to harmful prompts, greedy and sampled.
        outcomes: Of these replies: a harmful one has passed the gate. Without any, all starts are the dataset's.

    Returns:
        The greedy reply where it is harmful, else the first sampled one that is, else the dataset's answer; in the
        order of the replies.
    """
    harmful = {outcome.id for outcome in outcomes if outcome.outcome == "harmful"}
    asked = {start_id(record.split, record.prompt): record for record in replies}
    own: dict[str, str] = {}
    for record in sorted(replies, key=lambda record: (record.kind == "sample", record.sample)):
        if record.id in harmful:
            own.setdefault(start_id(record.split, record.prompt), record.reply)
    return [
        Start(id=name, source="own", text=own[name])
        if name in own
        else Start(id=name, source="data", text=record.reference)
        for name, record in asked.items()
    ]


def count_sources(starts: Iterable[Start]) -> dict[str, int]:
    """``own`` and ``data`` -> number of prompts."""
    sources = [start.source for start in starts]
    return {"own": sources.count("own"), "data": sources.count("data")}


def starts_note(counts: Mapping[str, int]) -> str:
    """Whose words the prefills of an evaluation begin with."""
    own, total = counts["own"], sum(counts.values())
    others = "" if own == total else "; the others begin with the dataset's harmful answer"
    return f"the prefill of {own} of {total} prompts begins with the base model's own harmful reply{others}"
