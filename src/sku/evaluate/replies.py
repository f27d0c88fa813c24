"""The one way to ask a model and to judge what it says, and the replies of one evaluation, saved batch by batch.

Of the base model, asked here or given: where prefills begin, and what is scored where the data has no answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.errors import EvaluationError
from sku.evaluate.asking import Writer
from sku.evaluate.backends import GenerationBackend, GenerationRequest, Sampling, choose_backend, decoding_settings
from sku.evaluate.batching import ALONE, Processes, Progress, evaluation_mode
from sku.evaluate.generation import fingerprint, generate_replies, probes_of
from sku.evaluate.judges import Judge
from sku.evaluate.metrics import ReplyOutcome, decide_outcomes, passes_surface_checks
from sku.evaluate.perplexity import score_fluency
from sku.evaluate.prefills import by_id, choose_starts
from sku.evaluate.records import (
    GENERATIONS_FILE,
    HARMFUL_SPLITS,
    NORMAL_SPLITS,
    OWN_ANSWERS_FILE,
    STARTS_FILE,
    FluencyRecord,
    GenerationRecord,
    Reuse,
    Start,
    answers_words,
    header_hash,
    read_if_same,
    start_id,
)


@dataclass(frozen=True, kw_only=True)
class Asker:
    """How models are asked and their replies judged, the same for all that are set side by side."""

    base: PreTrainedModel
    """The original model, asked whether replies are word salad."""
    writer: Writer
    config: EvaluateConfig
    """For the length of replies, the size of a batch, and which answers are compared word for word."""
    stop_ids: Sequence[int]
    """Ids that end a reply."""
    judge: Judge | None = None
    """None where nothing is judged here."""
    seed: int = 0
    """Of the orders of words that the gate compares a reply with."""
    processes: Processes = ALONE

    def ask(
        self,
        model: PreTrainedModel,
        requests: Sequence[GenerationRequest],
        progress: Progress | None = None,
        **options: Any,
    ) -> list[GenerationRecord]:
        """A model's replies, its dropout off; ``options`` as of ``generate_replies``, which raises what this does."""
        with evaluation_mode(model):
            return generate_replies(
                model,
                self.writer.tokenizer,
                requests,
                stop_ids=self.stop_ids,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                window=self.writer.window,
                processes=self.processes,
                progress=progress,
                **options,
            )

    def fluency(self, records: Sequence[GenerationRecord], progress: Progress | None = None) -> list[FluencyRecord]:
        """The base model's losses on the replies that no surface rule has found gibberish already.

        Raises:
            EvaluationError: As ``score_fluency``.
        """
        with evaluation_mode(self.base):
            return score_fluency(
                self.base,
                passes_surface_checks(records),
                self.writer.scored_reply,
                seed=self.seed,
                batch_size=self.config.batch_size,
                processes=self.processes,
                progress=progress,
            )

    def outcomes(
        self, records: Sequence[GenerationRecord], fluency: Sequence[FluencyRecord] | None = None
    ) -> list[ReplyOutcome]:
        """What replies come to, by gate and judge.

        Args:
            records: Replies to harmful and normal prompts.
            fluency: Of them; asked of the base model here if None.

        Raises:
            EvaluationError: The judge or the base model fails.
        """
        assert self.judge is not None
        scored = self.fluency(records) if fluency is None else fluency
        return decide_outcomes(records, self.judge, scored)

    def answer(
        self, model: PreTrainedModel, requests: Sequence[GenerationRequest], progress: Progress | None = None
    ) -> dict[str, ReplyOutcome]:
        """Asks a model: id of each request -> what its reply comes to.

        Raises:
            EvaluationError: Generation or judge fails.
        """
        return {outcome.id: outcome for outcome in self.outcomes(self.ask(model, requests, progress))}

    def starts(self, requests: Sequence[GenerationRequest], progress: Progress | None = None) -> list[Start]:
        """The base model's own harmful replies, which prefills begin with.

        Raises:
            EvaluationError: As ``answer``.
        """
        replies = self.ask(self.base, requests, progress)
        return choose_starts(replies, self.outcomes(replies))


@dataclass(frozen=True, kw_only=True)
class SavedReplies:
    """The replies of one evaluation: greedy, drawn and after a prefill, by any backend; and the base model's."""

    asker: Asker
    model: PreTrainedModel
    source: str | Path | None
    """Folder or hub id of the same weights, for backends that load them by themselves."""
    reuse: Reuse
    report: Callable[[str], Progress | None]
    """Name of a stage to its progress."""
    base: PreTrainedModel | None
    given: Sequence[Start] | None
    """Of the base model's own evaluation, which is then not asked again."""

    @property
    def config(self) -> EvaluateConfig:
        """Backend, lengths and numbers."""
        return self.asker.config

    @cached_property
    def backend(self) -> GenerationBackend:
        """What ``evaluate.backend`` names, once it is needed."""
        processes = self.asker.processes.count
        return choose_backend(self.config, self.model, source=self.source, seed=self.asker.seed, processes=processes)

    def decoding(self) -> dict[str, Any]:
        """Every setting that decides the replies, drawn ones included."""
        greedy = decoding_settings(self.asker.stop_ids, self.config.max_new_tokens)
        drawn = {**greedy, **self._sampling().settings(), "number": self.config.samples}
        return {**greedy, "backend": self.config.backend, "samples": drawn if self.config.samples else None}

    def _sampling(self) -> Sampling:
        return Sampling(temperature=1.0, top_p=1.0, seed=self.asker.seed)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        header: Mapping[str, Any],
        prefills: Callable[[Sequence[GenerationRecord]], Sequence[GenerationRequest]] = lambda _replies: (),
    ) -> tuple[list[GenerationRecord], dict[str, int] | None]:
        """Replies, or those of an earlier run that asked the same; and what ``generate`` says to some of them.

        Args:
            requests: Without a prefill, those for sampled replies last.
            header: What the replies are made from, besides the requests.
            prefills: Called in every process with the replies to ``requests``; what it gives is asked next. It may
                depend on them, as the base model's prefills begin with its own words.

        Returns:
            The replies, those after a prefill last; and ``compare_replies`` of a backend other than ``generate``.
        """
        header = {
            **header,
            "prompt_format": self.asker.writer.prompt_format.name,
            "seed": self.asker.seed,
            "requests": requests_hash(requests),
        }
        greedy, samples = ([row for row in requests if (row.kind == "sample") is part] for part in (False, True))
        folder = self.reuse.folder
        known: list[GenerationRecord] | None = None
        if folder is not None:
            read = functools.partial(read_if_same, folder / GENERATIONS_FILE, header, GenerationRecord)
            known = self.reuse.processes.run_on_rank0(read)
        free = None if known is None else [record for record in known if record.kind != "prefill"]
        check = self._check(greedy, free)

        @functools.cache
        def saved() -> dict[str, Any]:
            return self.reuse.saved(GENERATIONS_FILE, header, GenerationRecord)

        def ask(asked: Sequence[GenerationRequest], stage: str, **options: Any) -> list[GenerationRecord]:
            options = {"backend": self.backend, **saved(), **options}
            return self.asker.ask(self.model, asked, self.report(stage), **options) if asked else []

        if free is None:
            free = [*ask(greedy, "replies"), *ask(samples, "samples", sampling=self._sampling())]
        prefilled = prefills(free)
        # No part of the header: what prefills begin with may be known only when the rest is answered.
        begun = [(row.id, row.prefill) for row in known or () if row.kind == "prefill"]
        if known is None or begun != [(row.id, row.prefill) for row in prefilled]:
            known = [*free, *ask(prefilled, "prefill")]
            self.reuse.write(GENERATIONS_FILE, header, known)
        self.reuse.close(GENERATIONS_FILE, header, GenerationRecord)
        return known, check

    def _check(
        self, greedy: Sequence[GenerationRequest], known: Sequence[GenerationRecord] | None
    ) -> dict[str, int] | None:
        """Compares another backend's first replies, which may be known, with those of ``generate``."""
        if self.config.backend == "generate":
            return None
        some = greedy[:CHECKED_PROMPTS]
        plain = self.asker.ask(self.model, some, self.report("backend check"))
        others = self.asker.ask(self.model, some, backend=self.backend) if known is None else known[: len(some)]
        return compare_replies(self.config.backend, plain, others)

    def starts(
        self,
        requests: Sequence[GenerationRequest],
        free: Sequence[GenerationRecord],
        fluency: Callable[[Sequence[GenerationRecord]], Sequence[FluencyRecord]],
    ) -> list[Start]:
        """The base model's own harmful replies, as far as they are known, kept in ``starts.jsonl``.

        Args:
            requests: Without a prefill.
            free: The evaluated model's replies to them.
            fluency: Gives the base model's losses on these, should they be the base model's own.
        """
        asked = [request for request in requests if request.split in HARMFUL_SPLITS]
        harmful = [record for record in free if record.split in HARMFUL_SPLITS]
        base = self.base
        if self.given is not None or base is None:
            names = {start_id(request.split, request.prompt) for request in asked}
            chosen = [start for start in self.given or () if start.id in names]
            texts = header_hash({"starts": [dataclasses.asdict(start) for start in chosen]})
            return self.reuse.rows(STARTS_FILE, {"given": texts}, Start, lambda: chosen)
        judge = self.asker.judge
        header = {
            "base": fingerprint(base, probes_of(asked)),
            "decoding": self.decoding(),
            "prompt_format": self.asker.writer.prompt_format.name,
            "requests": requests_hash(asked),
            "seed": self.asker.seed,
            "judge": None if judge is None else judge.card.key,
        }

        def make() -> list[Start]:
            own = base is self.model
            said = harmful if own else self._ask_base(base, asked)
            scored = fluency(free) if own else self.asker.fluency(said, self.report("fluency"))
            return self.reuse.processes.run_on_rank0(lambda: choose_starts(said, self.asker.outcomes(said, scored)))

        return self.reuse.rows(STARTS_FILE, header, Start, make)

    def answers(self, requests: Sequence[GenerationRequest], generations: Sequence[GenerationRecord]) -> list[Start]:
        """The base model's replies to normal prompts that have no answer, kept in ``own_answers.jsonl``.

        None where there is neither a base nor what it was asked before.

        Args:
            requests: Without a prefill.
            generations: The evaluated model's replies.
        """
        asked = [request for request in _unanswered(requests) if request.kind == "reply"]
        base, given, folder = self.base, self.given, self.reuse.folder
        if not asked or (given is None and base is None):
            if folder is not None:  # Of an earlier evaluation.
                self.reuse.processes.run_on_rank0(lambda: (folder / OWN_ANSWERS_FILE).unlink(missing_ok=True))
            return []
        wanted = {request.id: start_id(request.split, request.prompt) for request in asked}
        header: dict[str, Any] = {"requests": header_hash({"requests": [*wanted]})}
        if given is not None:
            known = by_id(given)
            found = [known[name] for name in wanted.values() if name in known]
            header["given"] = header_hash({"texts": [start.text for start in found]})
            return self.reuse.rows(OWN_ANSWERS_FILE, header, Start, lambda: found)
        assert base is not None
        header |= {"base": fingerprint(base, probes_of(asked)), "decoding": self.decoding()}

        def make() -> list[Start]:
            said = generations if base is self.model else self._ask_base(base, asked)
            texts = {record.id: record.reply for record in said if record.id in wanted}
            return [Start(id=wanted[name], text=texts[name]) for name in wanted]

        return self.reuse.rows(OWN_ANSWERS_FILE, header, Start, make)

    def _ask_base(self, base: PreTrainedModel, asked: Sequence[GenerationRequest]) -> list[GenerationRecord]:
        """The base model's replies, where its own evaluation is not at hand; none is written."""
        # vLLM would read weights from a folder that is not known here.
        config = dataclasses.replace(self.config, backend="generate")
        stages = dataclasses.replace(
            self,
            asker=dataclasses.replace(self.asker, config=config),
            model=base,
            source=None,
            reuse=Reuse(folder=None, processes=self.reuse.processes),
            report=lambda stage: self.report(f"base, {stage}"),
        )
        return stages.generate(asked, {})[0]


CHECKED_PROMPTS = 16


def compare_replies(
    backend: str, plain: Sequence[GenerationRecord], others: Sequence[GenerationRecord]
) -> dict[str, int]:
    """Counts replies that are the same word for word.

    Args:
        backend: For the message.
        plain: Greedy replies of ``generate``.
        others: Those of the backend, to the same requests in the same order.

    Returns:
        How many ``prompts`` were answered by both, and how many replies are ``equal``.

    Raises:
        EvaluationError: Fewer than half are equal: that is no rounding.
    """
    equal = sum(
        (one.reply, one.num_tokens, one.finished) == (other.reply, other.num_tokens, other.finished)
        for one, other in zip(plain, others, strict=True)
    )
    if 2 * equal < len(plain):
        raise EvaluationError(
            f"evaluate.backend {backend} gave the reply of generate to {equal} of {len(plain)} prompts only: it "
            "doesn't decode this model rightly; use evaluate.backend=generate"
        )
    return {"prompts": len(plain), "equal": equal}


def backend_notes(backend: str, check: Mapping[str, int] | None) -> tuple[str, ...]:
    """A sentence for the reader where a backend's replies differ from those of ``generate``."""
    if check is None or check["equal"] == check["prompts"]:
        return ()
    note = (
        f"{check['equal']} of {check['prompts']} greedy replies of the backend {backend} equal those of generate: "
        "other kernels round otherwise, and a near tie between two words then ends otherwise"
    )
    return (note,)


def requests_hash(requests: Sequence[GenerationRequest]) -> str:
    """Hash of all that is asked, for the header of the replies."""
    return header_hash({"requests": [dataclasses.asdict(request) for request in requests]})


def answers_notes(requests: Sequence[GenerationRequest], own: Sequence[Start]) -> tuple[str, ...]:
    """Whose words the perplexity and KL of prompts without answers are about."""
    splits = dict.fromkeys(request.split for request in _unanswered(requests))
    if not splits:
        return ()
    listed = ", ".join(map(answers_words, splits))
    if own:
        return (f"{listed}: there are none in the data, so the base model's own greedy replies are scored",)
    return (f"{listed}: there are none in the data, and no base model was given to write them, so none are scored",)


def _unanswered(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    return [request for request in requests if request.split in NORMAL_SPLITS and not request.reference]
