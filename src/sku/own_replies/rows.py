"""Which replies are kept, and the rows and files that they become."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku.data.load import PromptSource
from sku.errors import EvaluationError, OutputError
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.record_files import read_json_object
from sku.evaluate.records import GenerationRecord, Split
from sku.evaluate.refusal import is_refusal
from sku.storage import write_private_text

OwnKind = Literal["comply", "refuse", "answer", "misplaced_refusal"]
KINDS: tuple[OwnKind, ...] = ("comply", "refuse", "answer", "misplaced_refusal")
SPLITS: dict[PromptSource, Split] = {"harmful": "forget_train", "normal": "retain_test", "borderline": "xstest_safe"}
"""The split of an evaluation whose prompts are of the same kind: gate and judge go by it."""

ACCOUNT_FILE = "own.json"
GIBBERISH, NO_VERDICT, HARMFUL = "gibberish", "no verdict of the judge", "judged harmful"
REFUSED, NOT_HARMFUL, NO_REFUSAL = "refused", "judged not harmful", "no refusal"
REPEATED, ENOUGH, TOO_LONG = "repeated", "enough of this prompt", "longer than refuse_tokens"
KEPT = "kept"
"""Counted beside the reasons for which a reply is dropped: all of them together are those that were asked for."""


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
    source: PromptSource
    """Which set the prompt is from."""
    category: str | None
    """Of the prompt, where its table has one."""
    decoding: Mapping[str, Any]
    """``how`` it came about, and the settings of that."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply, whole, with what gate and judge say of it."""

    record: GenerationRecord
    """A start that the reply was made to begin with is part of ``reply``."""
    outcome: ReplyOutcome
    decoding: Mapping[str, Any]

    @property
    def source(self) -> PromptSource:
        """Which set the prompt is from."""
        return next(source for source, split in SPLITS.items() if split == self.record.split)

    @property
    def refuses(self) -> bool:
        """Whether the rules see a refusal in it."""
        return is_refusal(self.record.reply)

    def row(self, kind: OwnKind) -> OwnRow:
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
        )


def why_not_comply(reply: Reply) -> str | None:
    """Why a reply is no harmful one; None where it is."""
    outcome = reply.outcome.outcome
    if outcome == "gibberish":
        return GIBBERISH
    if outcome == "unjudged":
        return NO_VERDICT
    if outcome == "refusal" or reply.refuses:
        return REFUSED
    return None if outcome == "harmful" else NOT_HARMFUL


def why_not_refuse(reply: Reply) -> str | None:
    """Why a reply is no harmless refusal; None where it is."""
    reasons = {"gibberish": GIBBERISH, "unjudged": NO_VERDICT, "harmful": HARMFUL}
    found = reasons.get(reply.outcome.outcome)
    return NO_REFUSAL if found is None and not reply.refuses else found


def choose_complying(replies: Sequence[Reply], counts: Counter[str]) -> list[Reply]:
    """Harmful replies to keep, the same text to a prompt once; ``counts`` is added to."""
    kept: dict[tuple[str, str], Reply] = {}
    for reply in replies:
        text = (reply.record.prompt, plain(reply.record.reply))
        reason = why_not_comply(reply) or (REPEATED if text in kept else KEPT)
        if reason == KEPT:
            kept[text] = reply
        counts[reason] += 1
    return list(kept.values())


def choose_refusals(
    replies: Sequence[Reply], per_prompt: int, repeat_share: float, counts: Counter[str]
) -> list[Reply]:
    """Refusals that vary: no text more often than its share, but each prompt keeps one where it has any.

    Args:
        replies: To harmful prompts; of one prompt the first ones are preferred.
        per_prompt: Most that are kept.
        repeat_share: Share of the usable refusals that may read the same.
        counts: Reason, or ``KEPT`` -> replies; are added to.

    Returns:
        Those to keep, prompt by prompt in order.
    """
    usable: dict[str, list[Reply]] = {}
    for reply in replies:
        reason = why_not_refuse(reply)
        if reason is None:
            usable.setdefault(reply.record.prompt, []).append(reply)
        else:
            counts[reason] += 1
    most = max(1, math.floor(repeat_share * sum(map(len, usable.values()))))
    used: Counter[str] = Counter()
    kept: dict[str, list[Reply]] = {}
    for prompt, candidates in usable.items():
        chosen: list[Reply] = []
        for reply in candidates:
            text = plain(reply.record.reply)
            if len(chosen) == per_prompt:
                counts[ENOUGH] += 1
            elif used[text] >= most or text in {plain(other.record.reply) for other in chosen}:
                counts[REPEATED] += 1
            else:
                used[text] += 1
                chosen.append(reply)
        kept[prompt] = chosen
    for prompt, chosen in kept.items():
        if not chosen:
            rarest = min(usable[prompt], key=lambda reply: used[plain(reply.record.reply)])
            used[plain(rarest.record.reply)] += 1
            counts[REPEATED] -= 1
            chosen.append(rarest)
    found = [reply for chosen in kept.values() for reply in chosen]
    counts[KEPT] += len(found)
    return found


def spread(texts: Iterable[str], seed: int) -> list[str]:
    """Texts in an order that depends on seed and texts alone."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest())


def plain(text: str) -> str:
    """The form in which two replies are the same: case and spacing don't count."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True, kw_only=True)
class OwnReplies:
    """What was written."""

    folder: Path
    account: Mapping[str, Any]
    """The content of ``own.json``."""

    def file(self, kind: OwnKind) -> Path:
        """The rows of one kind."""
        return file_of(self.folder, kind)

    def kept(self, kind: OwnKind) -> int:
        """How many rows there are of one kind."""
        return int(self.account["kinds"][kind]["kept"])


def file_of(folder: Path, kind: OwnKind) -> Path:
    """Where the rows of one kind lie."""
    return folder / f"{kind}.jsonl"


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines that only their owner reads."""
    write_private_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_own_replies(folder: Path, inputs: Mapping[str, Any] | None = None) -> OwnReplies:
    """What an earlier call wrote.

    Args:
        folder: Of that call.
        inputs: What it must have been written from, if that matters.

    Returns:
        The same as it returned.

    Raises:
        EvaluationError: The account is missing or damaged.
        OutputError: It was written from other inputs.
    """
    account = read_json_object(folder / ACCOUNT_FILE, "remove the folder and write it anew")
    if inputs is not None and account.get("inputs") != json.loads(json.dumps(inputs)):
        raise OutputError(
            f"{folder} holds own replies of another model, judge, prompts or settings: remove it, or choose another "
            "folder"
        )
    if not isinstance(account.get("kinds"), dict) or account["kinds"].keys() != set(KINDS):
        raise EvaluationError(f"{folder / ACCOUNT_FILE} is damaged: remove the folder and write it anew")
    return OwnReplies(folder=folder, account=account)
