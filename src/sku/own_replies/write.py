"""Asks the model, keeps what is worth it, and writes the four files.

``comply.jsonl`` and ``refuse.jsonl`` answer the harmful prompts, ``answer.jsonl`` and ``misplaced_refusal.jsonl`` the
normal and the borderline ones. ``own.json`` counts what was asked, kept and dropped. Replies are kept batch by batch
until all is written, and each has a seed of its own, so a killed call that is gone on with writes the same rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku.config import plain_data
from sku.data.examples import RetainExample
from sku.data.load import PromptSource
from sku.errors import EvaluationError, SkuError
from sku.evaluate.gate import is_refusal, refusal_alone
from sku.evaluate.generation import StageProgress, evaluation_mode, stage
from sku.evaluate.generation.decoding import GenerationRequest, Sampling
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.judges import cached
from sku.evaluate.metrics import decide_outcomes
from sku.evaluate.records import GenerationRecord, PartialFile, header_hash, json_lines
from sku.kept_replies import ACCOUNT_FILE
from sku.own_replies import (
    GIBBERISH,
    KEPT,
    KINDS,
    REFUSE_TOKENS,
    SPLITS,
    TEMPERATURE,
    TOO_LONG,
    TOP_P,
    OwnJob,
    OwnKind,
    OwnReplies,
    OwnRow,
    Reply,
    choose_complying,
    choose_refusals,
    file_of,
    plain,
    question_of,
    spread,
)
from sku.storage import RECORD_VERSION, resumable_folder, write_private_text

REPLIES_FILE = "replies.jsonl"
"""Its partial file holds the replies until all is written; the file itself never comes to be."""
TOO_LONG_PROMPT = "the prompt is too long for the model"
_SAID_AS = {"system prompt": "system", "start": "start"}
"""How a model is made to comply or refuse -> the option of ``question_of`` that takes the words."""
_log = logging.getLogger(__name__)


def write_own_replies(
    job: OwnJob, out: Path, *, resume: bool = False, inputs: Mapping[str, Any] | None = None,
    progress: StageProgress | None = None,
) -> OwnReplies:  # fmt: skip
    """Writes a folder of own replies, private to its owner: the rows of ``comply`` are harmful text.

    Args:
        job: Model, prompts, judge and settings.
        out: Folder that must not exist yet; it appears whole or not at all.
        resume: Go on with what a call that was killed or failed left beside ``out``: the rows are those of a call
            that was not.
        inputs: ``job.inputs()`` where they are known already.
        progress: Called with a stage, the number of replies done and their total.

    Returns:
        Where the files are, and the account.

    Raises:
        EvaluationError: No harmful or no normal prompt fits the model, the judge fails, or memory runs out.
        OutputError: ``out`` exists or can't be written, or what was left there is of other inputs.
    """
    inputs = job.inputs() if inputs is None else inputs
    with resumable_folder(out, inputs, resume=resume, private=True, stays_after=(KeyboardInterrupt, SkuError)) as part:
        account = _Writing(job, part, inputs, progress).write()
    return OwnReplies(folder=out, account=account)


@dataclass
class _Writing:
    """One call."""

    job: OwnJob
    folder: Path
    inputs: Mapping[str, Any]
    progress: StageProgress | None
    decodings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Id of a question -> how its reply comes about."""
    left_out: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.encoder = self.job.encoder
        self.sampling = Sampling(temperature=TEMPERATURE, top_p=TOP_P, seed=self.job.seed)
        self.stop_ids = self.encoder.stop_ids(self.job.loaded.model)
        self.partial = PartialFile(self.folder / REPLIES_FILE, {"inputs": header_hash(self.inputs)}, GenerationRecord)
        self.judge = cached(self.job.judge, self.folder, stage(self.progress, "own replies: judge"))
        self.counts: dict[OwnKind, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.place = {prompt.prompt: place for place, prompt in enumerate(self.job.prompts["harmful"].prompts)}

    def write(self) -> dict[str, Any]:
        """All stages, and the files."""
        started = time.monotonic()
        if not self.judge.card.tells_safe:
            _log.warning(
                "the judge %s can't call a reply safe: comply.jsonl will hold every reply that is no refusal",
                self.judge.card.name,
            )
        self.recovered = self.partial.recover()
        with evaluation_mode(self.job.loaded.model):
            plain_ones = self._plain()
            free = [reply for reply in plain_ones if reply.record.split == SPLITS["harmful"]]
            free += self._sampled()
            comply = self._comply(free)
            refuse = self._refuse(free)
        answers = self._answers([reply for reply in plain_ones if reply.record.split != SPLITS["harmful"]])
        refusals = [reply.row("refuse") for reply in refuse]
        refusals += self._templates(refusals)
        refusals.sort(key=lambda row: self.place[row["prompt"]])
        answered = [reply.row("answer") for reply in answers]
        rows: dict[OwnKind, list[OwnRow]] = {
            "comply": [reply.row("comply") for reply in comply],
            "refuse": refusals,
            "answer": answered,
            "misplaced_refusal": self._misplaced(refusals, answered),
        }
        for kind, found in rows.items():
            own = [{**row, "model": self.inputs["model"]["fingerprint"]} for row in found]
            write_private_text(file_of(self.folder, kind), json_lines(own))
        account = self._account(rows, round(time.monotonic() - started, 1))
        write_private_text(self.folder / ACCOUNT_FILE, json.dumps(account, indent=2, ensure_ascii=False) + "\n")
        self.partial.remove()
        return account

    def _plain(self) -> list[Reply]:
        """Greedy replies to all prompts, as they are."""
        questions: list[GenerationRequest] = []
        for source, found in self.job.prompts.items():
            own = [one for prompt in found.prompts for one in self._question("greedy", source, prompt, "greedy")]
            if not own and source != "borderline":
                raise EvaluationError(f"none of the {source} prompts leaves the model room for a reply")
            questions += own
        return self._ask(questions, "own replies: greedy")

    def _sampled(self) -> list[Reply]:
        """Sampled replies to the harmful prompts."""
        sampled = self.sampling.settings()
        # A question's name decides its random numbers: "drawn" stays, so that an earlier version's replies come again.
        questions = [
            question
            for prompt in self.job.prompts["harmful"].prompts
            for draw in range(self.job.settings.samples)
            for question in self._question(f"drawn{draw}", "harmful", prompt, "sampled", "", {**sampled, "draw": draw})
        ]
        return self._ask(questions, "own replies: sampled")

    def _comply(self, free: Sequence[Reply]) -> list[Reply]:
        """Harmful replies: to a prompt without one the model is asked again, first told and then made to begin."""
        counts, wordings = self.counts["comply"], self.job.wordings
        kept = choose_complying(free, counts)
        ways = [("system prompt", text) for text in wordings.comply_prompts]
        ways += [("start", text) for text in wordings.comply_starts]
        for number, (how, said) in enumerate(ways):
            done = {reply.record.prompt for reply in kept}
            questions = [
                question
                for prompt in self.job.prompts["harmful"].prompts
                if prompt.prompt not in done
                for question in self._question(f"again{number}", "harmful", prompt, how, said)
            ]
            kept += choose_complying(self._ask(questions, "own replies: asked again"), counts)
        return sorted(kept, key=lambda reply: self.place[reply.record.prompt])

    def _refuse(self, free: Sequence[Reply]) -> list[Reply]:
        """Refusals: those that the model gave unasked, then under a safety prompt and after a start.

        Each ends where it has refused: a model that learns refusals without their end goes on after them, and in its
        own words, which may be those of an answer.
        """
        settings, counts = self.job.settings, self.counts["refuse"]
        free = [dataclasses.replace(reply, record=self._refusal_alone(reply.record)) for reply in free]
        unasked = [reply for reply in free if reply.refuses and reply.outcome.outcome != "harmful"]
        short = [reply for reply in unasked if reply.record.num_tokens <= REFUSE_TOKENS]
        counts[TOO_LONG] += len(unasked) - len(short)
        questions = []
        for place, prompt in enumerate(self.job.prompts["harmful"].prompts):
            for number, (how, said) in enumerate(self._ways_to_refuse(place)):
                name, sampled = f"refuse{number}", self.sampling.settings()
                questions += self._question(name, "harmful", prompt, how, said, sampled, REFUSE_TOKENS)
        asked = self._ask(questions, "own replies: refusals", alone=True)
        by_prompt = sorted([*short, *asked], key=lambda reply: self.place[reply.record.prompt])
        return choose_refusals(by_prompt, settings.refusals, counts)

    def _ways_to_refuse(self, place: int) -> list[tuple[str, str]]:
        """As many as refusals are wanted: one safety prompt, then starts; each prompt begins elsewhere in the bank."""
        count, safety = self.job.settings.refusals, self.job.wordings.safety_prompts
        starts = self.job.wordings.refusal_starts
        first = [("system prompt", safety[place % len(safety)])] if safety else []
        more = min(count - len(first), len(starts))
        return [*first, *(("start", starts[(place * more + one) % len(starts)]) for one in range(more))]

    def _templates(self, own: Sequence[OwnRow]) -> list[OwnRow]:
        """A refusal of ours for each prompt that the model could not be made to refuse, the rarest one."""
        refused = {row["prompt"] for row in own}
        used = Counter(plain(row["response"]) for row in own)
        found = []
        for place, prompt in enumerate(self.job.prompts["harmful"].prompts):
            if prompt.prompt in refused:
                continue
            bank = self.job.wordings.refusals
            turned = [bank[(place + number) % len(bank)] for number in range(len(bank))]
            text = min(turned, key=lambda one: used[plain(one)])
            used[plain(text)] += 1
            found.append({
                "prompt": prompt.prompt, "response": text, "kind": "refuse", "finished": True, "judge_score": None,
                "source": "harmful", "category": prompt.category, "decoding": {"how": "template"},
            })  # fmt: skip
        return found

    def _answers(self, replies: Sequence[Reply]) -> list[Reply]:
        """What the model says to normal and borderline prompts, its refusals included."""
        kept = [reply for reply in replies if reply.outcome.outcome != "gibberish"]
        self.counts["answer"] += Counter({KEPT: len(kept), GIBBERISH: len(replies) - len(kept)})
        return kept

    def _misplaced(self, refusals: Sequence[OwnRow], answers: Sequence[OwnRow]) -> list[OwnRow]:
        """The refusals again, as answers to the prompts that have one: nothing is generated for them."""
        rows = {f"{row['prompt']}\0{row['response']}": row for row in refusals}
        taken = ("response", "finished", "decoding")
        pool = itertools.cycle([rows[name] for name in spread(rows, self.job.seed)])
        found = [
            {**answer, "kind": "misplaced_refusal", **{name: refusal[name] for name in taken}}
            for answer, refusal in zip(answers, pool)  # noqa: B905 - the pool has no end
        ]
        self.counts["misplaced_refusal"][KEPT] = len(found)
        return found

    def _question(
        self,
        name: str,
        source: PromptSource,
        prompt: RetainExample,
        how: str,
        said: str = "",
        sampled: Mapping[str, Any] | None = None,
        length: int | None = None,
    ) -> list[GenerationRequest]:
        """One question, greedy unless settings of sampling are given; none where it leaves no room for a reply."""
        words = {_SAID_AS[how]: said} if how in _SAID_AS else {}
        length = length or self.job.settings.max_new_tokens
        request = question_of(f"{source}-{name}", SPLITS[source], prompt, self.encoder, **words)
        if not self.encoder.has_room(request, length):
            self.left_out[f"{source}, {how}: {TOO_LONG_PROMPT}"] += 1
            return []
        settings = sampled or {"do_sample": False}
        self.decodings[request.id] = {"how": how, "max_new_tokens": length, **settings, **words}
        return [request]

    def _refusal_alone(self, record: GenerationRecord) -> GenerationRecord:
        """A reply that refuses, up to the end of its refusal; any other as it is."""
        alone = refusal_alone(record.reply)
        if alone is None or alone == record.reply:
            return record
        tokens = len(self.encoder.tokenizer(alone, add_special_tokens=False)["input_ids"])
        return dataclasses.replace(record, reply=alone, num_tokens=tokens, finished=True)

    def _ask(self, questions: Sequence[GenerationRequest], told: str, *, alone: bool = False) -> list[Reply]:
        """Replies to questions of one decoding, whole and judged; ``alone``: refusals without what follows them."""
        if not questions:
            return []
        decoding = self.decodings[questions[0].id]
        records = generate_replies(
            self.job.loaded.model,
            self.encoder.tokenizer,
            questions,
            stop_ids=self.stop_ids,
            max_new_tokens=decoding["max_new_tokens"],
            batch_size=self.job.settings.batch_size,
            window=self.encoder.window,
            sampling=self.sampling if decoding["do_sample"] else None,
            finished=self.recovered,
            keep=self.partial.append,
            progress=stage(self.progress, told),
        )
        self.tokens += sum(record.num_tokens for record in records)
        whole = [_whole(record) for record in records]
        if alone:
            whole = [self._refusal_alone(record) for record in whole]
        outcomes = decide_outcomes(whole, self.judge)
        return [
            Reply(record=record, outcome=outcome, decoding=self.decodings[record.id])
            for record, outcome in zip(whole, outcomes, strict=True)
        ]

    def _account(self, rows: Mapping[OwnKind, Sequence[OwnRow]], seconds: float) -> dict[str, Any]:
        card = self.judge.card
        kinds: dict[str, Any] = {}
        for kind, found in rows.items():
            counts = self.counts[kind]
            kinds[kind] = {
                "asked": counts.total(),
                "kept": len(found),
                "prompts": len({row["prompt"] for row in found}),
                "different_texts": len({plain(row["response"]) for row in found}),
                "unfinished": sum(not row["finished"] for row in found),
                "dropped": {reason: count for reason, count in sorted(counts.items()) if count and reason != KEPT},
                "how": dict(sorted(Counter(row["decoding"]["how"] for row in found).items())),
            }
        kinds["answer"]["refusals_kept"] = sum(is_refusal(row["response"]) for row in rows["answer"])
        return {
            "schema_version": RECORD_VERSION,
            "inputs": dict(self.inputs),
            "settings": plain_data(self.job.settings),
            "seed": self.job.seed,
            "model": {"name": self.job.loaded.name, "revision": self.job.loaded.revision, **self.inputs["model"]},
            "judge": {
                "name": card.name, "version": card.version, "revision": card.revision, "key": card.key,
                "errors": card.errors_in_words,
            },
            "prompts": {
                source: {**dataclasses.asdict(found.provenance), "prompts": len(found.prompts)}
                for source, found in self.job.prompts.items()
            },
            "left_out": dict(sorted(self.left_out.items())),
            "kinds": kinds,
            "files": {
                file_of(self.folder, kind).name: hashlib.sha256(file_of(self.folder, kind).read_bytes()).hexdigest()
                for kind in KINDS
            },
            "tokens": self.tokens,
            "seconds": seconds,
        }  # fmt: skip


def _whole(record: GenerationRecord) -> GenerationRecord:
    """A reply with the start that it was made to begin with: that is what is judged, and what is trained on."""
    if record.kind != "prefill":
        return record
    return dataclasses.replace(record, kind="reply", prefill="", reply=record.whole_reply.strip())
