"""The rows that are written, and which replies become one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.records import GenerationRecord
from sku.evaluate.refusal import is_refusal

OwnKind = Literal["comply", "refuse", "answer", "misplaced_refusal"]
KINDS: tuple[OwnKind, ...] = ("comply", "refuse", "answer", "misplaced_refusal")
Source = Literal["harmful", "normal", "borderline"]

GIBBERISH, NO_VERDICT, HARMFUL = "gibberish", "no verdict of the judge", "judged harmful"
REFUSED, NOT_HARMFUL, NO_REFUSAL = "refused", "judged not harmful", "no refusal"
REPEATED, ENOUGH, TOO_LONG = "repeated", "enough of this prompt", "longer than refuse_tokens"


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """One line of a file."""

    prompt: str
    response: str
    kind: OwnKind
    finished: bool
    """Whether the model ended the reply itself; one that was cut teaches no end."""
    judge_score: float | None
    """Probability that the reply is harmful, where the judge was asked and gives one."""
    source: Source
    """Which set the prompt is from."""
    category: str | None
    """Of the prompt, where its table has one."""
    decoding: Mapping[str, Any]
    """``how`` it came about, and the settings of that."""
    model: str
    """Fingerprint of the model."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply, whole, with what gate and judge say of it."""

    record: GenerationRecord
    """A start that the reply was made to begin with is part of ``reply``."""
    outcome: ReplyOutcome
    source: Source
    decoding: Mapping[str, Any]

    @property
    def refuses(self) -> bool:
        """Whether the rules see a refusal in it."""
        return is_refusal(self.record.reply)

    def row(self, kind: OwnKind, model: str) -> OwnRow:
        """As it is written."""
        return OwnRow(
            prompt=self.record.prompt,
            response=self.record.reply,
            kind=kind,
            finished=self.record.finished,
            judge_score=self.outcome.p_harmful if kind in ("comply", "refuse") else None,
            source=self.source,
            category=self.record.category,
            decoding=self.decoding,
            model=model,
        )


@dataclass(kw_only=True)
class KindCounts:
    """What became of the replies of one kind."""

    asked: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> replies; ``asked`` is ``kept`` and these."""

    def drop(self, reason: str) -> None:
        """Counts a reply that is not kept."""
        self.dropped[reason] += 1


def why_not_comply(reply: Reply) -> str | None:
    """Why a reply is no harmful one; None where it is."""
    outcome = reply.outcome.outcome
    if outcome == "degenerate":
        return GIBBERISH
    if outcome == "unjudged":
        return NO_VERDICT
    if outcome == "refusal" or reply.refuses:
        return REFUSED
    return None if outcome == "harmful" else NOT_HARMFUL


def why_not_refuse(reply: Reply) -> str | None:
    """Why a reply is no harmless refusal; None where it is."""
    reasons = {"degenerate": GIBBERISH, "unjudged": NO_VERDICT, "harmful": HARMFUL}
    found = reasons.get(reply.outcome.outcome)
    return NO_REFUSAL if found is None and not reply.refuses else found


def choose_complying(replies: Sequence[Reply], counts: KindCounts) -> list[Reply]:
    """Harmful replies, the same text to a prompt once.

    Args:
        replies: To harmful prompts.
        counts: Are added to.

    Returns:
        Those to keep, in order.
    """
    kept: list[Reply] = []
    seen: set[tuple[str, str]] = set()
    for reply in replies:
        counts.asked += 1
        text = (reply.record.prompt, plain(reply.record.reply))
        reason = why_not_comply(reply) or (REPEATED if text in seen else None)
        if reason is not None:
            counts.drop(reason)
            continue
        seen.add(text)
        kept.append(reply)
    counts.kept += len(kept)
    return kept


def choose_refusals(replies: Sequence[Reply], per_prompt: int, repeat_share: float, counts: KindCounts) -> list[Reply]:
    """Refusals that vary: no text more often than its share, but each prompt keeps one where it has any.

    Args:
        replies: To harmful prompts; of one prompt the first ones are preferred.
        per_prompt: Most that are kept.
        repeat_share: Share of the usable refusals that may read the same.
        counts: Are added to.

    Returns:
        Those to keep, prompt by prompt in order.
    """
    usable: dict[str, list[Reply]] = {}
    for reply in replies:
        counts.asked += 1
        reason = why_not_refuse(reply)
        if reason is None:
            usable.setdefault(reply.record.prompt, []).append(reply)
        else:
            counts.drop(reason)
    most = max(1, math.floor(repeat_share * sum(map(len, usable.values()))))
    used: Counter[str] = Counter()
    kept: dict[str, list[Reply]] = {}
    for prompt, candidates in usable.items():
        chosen: list[Reply] = []
        for reply in candidates:
            text = plain(reply.record.reply)
            if len(chosen) == per_prompt:
                counts.drop(ENOUGH)
            elif used[text] >= most or text in {plain(other.record.reply) for other in chosen}:
                counts.drop(REPEATED)
            else:
                used[text] += 1
                chosen.append(reply)
        kept[prompt] = chosen
    for prompt, chosen in kept.items():
        if not chosen:
            rarest = min(usable[prompt], key=lambda reply: used[plain(reply.record.reply)])
            used[plain(rarest.record.reply)] += 1
            counts.dropped[REPEATED] -= 1
            chosen.append(rarest)
    found = [reply for chosen in kept.values() for reply in chosen]
    counts.kept += len(found)
    return found


def spread(texts: Iterable[str], seed: int) -> list[str]:
    """Texts in an order that depends on seed and texts alone."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest())


def plain(text: str) -> str:
    """The form in which two replies are the same: case and spacing don't count."""
    return " ".join(text.casefold().split())
