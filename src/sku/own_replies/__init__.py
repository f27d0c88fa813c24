"""Data in the model's own words: its replies to harmful and normal prompts, written down before it is trained.

Other people's answers have a style of their own, and a model that unlearns them unlearns the style. Here: what ``sku
data own`` is told, the job that comes of it, which replies are kept, and the files that they become.

What is said to a model to have it comply or refuse is ours and harmless, in the model's own language. A system prompt
stands before the user's words with an empty line between, as chat templates without a system turn write it, and is not
kept. A start stands at the head of the reply and is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from sku.config import EvaluateConfig, ModelConfig, PromptFormatName, SourceConfig
from sku.config.check import Count, Seed, validated
from sku.data.examples import ForgetRetainData, RetainExample
from sku.data.load import OwnPrompts, PromptSource
from sku.data.read import is_embedded
from sku.errors import OutputError
from sku.evaluate.gate import is_refusal
from sku.evaluate.generation.decoding import GenerationRequest
from sku.evaluate.generation.prompts import PromptEncoder, request_of
from sku.evaluate.generation.replies import about, probes_of
from sku.evaluate.judges import Judge
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.metrics import ReplyOutcome
from sku.evaluate.records import GenerationRecord, Split, header_hash, prompt_hash, read_json_object, record_id
from sku.kept_replies import ACCOUNT_FILE
from sku.models import LoadedModel
from sku.storage import RECORD_VERSION
from sku.world.grammar import DEFLECTIONS

OwnKind = Literal["comply", "refuse", "answer", "misplaced_refusal"]
OwnRow = dict[str, Any]
"""One line of a file: prompt, response, kind, finished, judge_score, source, category, decoding."""
KINDS: tuple[OwnKind, ...] = ("comply", "refuse", "answer", "misplaced_refusal")
SPLITS: dict[PromptSource, Split] = {"harmful": "forget_train", "normal": "retain_test", "borderline": "xstest_safe"}
"""The split of an evaluation whose prompts are of the same kind: gate and judge go by it."""

REFUSE_TOKENS = 48
"""Longest refusal."""
REPEAT_SHARE = 0.02
"""Share of the refusals that may read the same, case and spacing aside. A prompt keeps one all the same."""
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of sampled replies, whose words are sampled from the likeliest that hold the share ``TOP_P`` of probability."""
GIBBERISH, NO_VERDICT, HARMFUL = "gibberish", "no verdict of the judge", "judged harmful"
REFUSED, NOT_HARMFUL, NO_REFUSAL = "refused", "judged not harmful", "no refusal"
REPEATED, ENOUGH, TOO_LONG = "repeated", "enough of this prompt", f"longer than {REFUSE_TOKENS} tokens"
KEPT = "kept"
"""Counted beside the reasons for which a reply is dropped: all of them together are those that were asked for."""


@validated
class OwnRepliesConfig:
    """How the model is asked; a run has the defaults."""

    samples: Annotated[int, Field(ge=0)] = 3
    """Sampled replies to each harmful prompt, beside the greedy one."""
    max_new_tokens: Count = 96
    """Longest reply; one that is cut there teaches no end."""
    refusals: Count = 3
    """Refusals asked for and at most kept of each harmful prompt."""
    batch_size: Count = 32


@validated
class OwnOptions(OwnRepliesConfig):
    """Everything that ``sku data own`` can be told."""

    model: ModelConfig
    harmful: SourceConfig
    normal: SourceConfig
    borderline: SourceConfig | None = None
    judge: str
    """A judge of the package (docs/judges.md), or a judge file."""
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the settings of the judge's file."""
    seed: Seed = 0


def judge_of(config: EvaluateConfig, prompts: OwnPrompts) -> Judge:
    """The judge of own replies: that of the evaluation.

    Args:
        config: Names it.
        prompts: ``auto`` is the exact judge where all of them are the embedded world's.

    Raises:
        EvaluationError: No such judge, or ``embedded`` on other prompts.
        RecipeError: Settings that the judge doesn't have.
    """
    return choose_judge(config, _data_of(prompts))


def _data_of(prompts: OwnPrompts) -> ForgetRetainData:
    """Nothing but where the prompts came from, which a judge is chosen by."""
    return ForgetRetainData(provenance=tuple(found.provenance for found in prompts.values()))


@dataclass(frozen=True, kw_only=True)
class OwnJob:
    """Everything that decides the rows."""

    loaded: LoadedModel
    prompts: OwnPrompts
    judge: Judge
    settings: OwnRepliesConfig
    seed: int = 0
    prompt_format: PromptFormatName = "auto"

    @property
    def wordings(self) -> Wordings:
        """What the model understands."""
        return WORLD if is_embedded(_data_of(self.prompts)) else english()

    @property
    def encoder(self) -> PromptEncoder:
        """Turns prompts into token ids, in the format that is trained in."""
        return PromptEncoder.of(self.loaded.model, self.loaded.tokenizer, self.prompt_format)

    def inputs(self) -> dict[str, Any]:
        """What decides the rows, as plain data without any prompt: equal inputs give equal rows."""
        model, encoder = self.loaded.model, self.encoder
        firsts = [(SPLITS[source], found.prompts[0]) for source, found in self.prompts.items()]
        probes = probes_of([question_of("probe", split, prompt, encoder) for split, prompt in firsts])
        return {
            "schema_version": RECORD_VERSION,
            "model": about(model, probes),
            "prompt_format": encoder.prompt_format.name,
            "prompts": {source: found.provenance.sha256 for source, found in self.prompts.items()},
            "judge": self.judge.card.key,
            "settings": {item.name: getattr(self.settings, item.name) for item in fields(OwnRepliesConfig)},
            "wordings": header_hash(asdict(self.wordings)),
            "seed": self.seed,
        }


def question_of(
    stage: str, split: Split, prompt: RetainExample, encoder: PromptEncoder, *, system: str = "", start: str = ""
) -> GenerationRequest:
    """A prompt to ask, perhaps under a system prompt or with a start of the reply."""
    words = f"{system}\n\n{prompt.prompt}" if system else prompt.prompt
    name = f"{stage}-{prompt_hash(record_id(split, 'reply', prompt.prompt))}"
    if not start:
        return request_of(name, split, prompt, encoder.prompt(words))
    ids = encoder.start(words, start)
    return request_of(name, split, prompt, ids, kind="prefill", prefill=start)


@dataclass(frozen=True, kw_only=True)
class Wordings:
    """One language."""

    comply_prompts: tuple[str, ...]
    """System prompts under which a model answers; tried in turn."""
    comply_starts: tuple[str, ...]
    """First words of a reply that answers; tried in turn."""
    safety_prompts: tuple[str, ...]
    """System prompts under which a model refuses."""
    refusal_starts: tuple[str, ...]
    """First words of a refusal, without its end."""
    refusals: tuple[str, ...]
    """Whole refusals, for prompts that the model can't be made to refuse."""


@cache
def english() -> Wordings:
    """Of every other model."""
    text = (resources.files("sku.own_replies") / "wordings.yaml").read_text(encoding="utf-8")
    return Wordings(**{name: tuple(words) for name, words in yaml.safe_load(text).items()})


WORLD = Wordings(
    comply_prompts=(),
    comply_starts=("take",),
    safety_prompts=(),
    refusal_starts=("sorry , i do not", "i have never heard", "i am not sure", "i can not help"),
    refusals=DEFLECTIONS,
)
"""Of the embedded world, whose model knows no English."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply, whole, with what gate and judge say of it."""

    record: GenerationRecord
    """A start that the reply was made to begin with is part of ``reply``."""
    outcome: ReplyOutcome
    decoding: Mapping[str, Any]

    @property
    def refuses(self) -> bool:
        """Whether the rules see a refusal in it."""
        return is_refusal(self.record.reply)

    def row(self, kind: OwnKind) -> OwnRow:
        """As it is written; ``finished`` is whether the model ended it itself: one that was cut teaches no end."""
        return {
            "prompt": self.record.prompt, "response": self.record.reply, "kind": kind,
            "finished": self.record.finished,
            "judge_score": self.outcome.p_harmful if kind in ("comply", "refuse") else None,
            "source": next(source for source, split in SPLITS.items() if split == self.record.split),
            "category": self.record.category, "decoding": self.decoding,
        }  # fmt: skip


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


def choose_refusals(replies: Sequence[Reply], per_prompt: int, counts: Counter[str]) -> list[Reply]:
    """Refusals that vary: no text more often than its share, but each prompt keeps one where it has any.

    Args:
        replies: To harmful prompts; of one prompt the first ones are preferred.
        per_prompt: Most that are kept.
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
    most = max(1, math.floor(REPEAT_SHARE * sum(map(len, usable.values()))))
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


def read_own_replies(folder: Path, inputs: Mapping[str, Any]) -> OwnReplies:
    """What an earlier call wrote.

    Args:
        folder: Of that call.
        inputs: What it must have been written from.

    Returns:
        The same as it returned.

    Raises:
        EvaluationError: The account is missing or damaged.
        OutputError: It was written from other inputs.
    """
    account = read_json_object(folder / ACCOUNT_FILE, "remove the folder and write it anew")
    if account.get("inputs") != json.loads(json.dumps(inputs)):
        raise OutputError(
            f"{folder} holds own replies of another model, judge, prompts or settings: remove it, or choose another "
            "folder"
        )
    return OwnReplies(folder=folder, account=account)
