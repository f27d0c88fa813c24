"""The one way to ask a model and to judge what it says, and the replies of one evaluation, saved batch by batch."""

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
from sku.evaluate.asking import Writer, choose_starts
from sku.evaluate.backends import (
    CHECKED_PROMPTS,
    BackendCheck,
    GenerationBackend,
    Sampling,
    choose_backend,
    compare_replies,
)
from sku.evaluate.batching import ALONE, Processes, Progress, evaluation_mode
from sku.evaluate.generation import GenerationRequest, decoding_settings, generate_replies
from sku.evaluate.judges import Judge
from sku.evaluate.outcomes import ReplyOutcome, decide_outcomes, unclear
from sku.evaluate.perplexity import score_fluency
from sku.evaluate.record_files import GENERATIONS_FILE, header_hash, read_rows
from sku.evaluate.records import FluencyRecord, GenerationRecord, Start
from sku.evaluate.reuse import Reuse


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
                unclear(records),
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
        return decide_outcomes(
            records,
            self.judge,
            {record.id: record for record in scored},
            short_answer_words=self.config.short_answer_words,
        )

    def answer(
        self, model: PreTrainedModel, requests: Sequence[GenerationRequest], progress: Progress | None = None
    ) -> dict[str, ReplyOutcome]:
        """Asks a model: id of each request -> what its reply comes to.

        Raises:
            EvaluationError: Generation or judge fails.
        """
        return {outcome.id: outcome for outcome in self.outcomes(self.ask(model, requests, progress))}

    def starts(self, requests: Sequence[GenerationRequest], progress: Progress | None = None) -> list[Start]:
        """What the prefills of harmful prompts begin with: the base model's own harmful replies where it gives any.

        Raises:
            EvaluationError: As ``answer``.
        """
        replies = self.ask(self.base, requests, progress)
        return choose_starts(replies, self.outcomes(replies))


@dataclass(frozen=True, kw_only=True)
class SavedReplies:
    """The replies of one evaluation: greedy, drawn and after a prefill, by any backend."""

    asker: Asker
    model: PreTrainedModel
    source: str | Path | None
    """Folder or hub id of the same weights, for backends that load them by themselves."""
    reuse: Reuse
    report: Callable[[str], Progress | None]
    """Name of a stage to its progress."""

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
        return Sampling(temperature=self.config.temperature, top_p=self.config.top_p, seed=self.asker.seed)

    def notes(self, check: BackendCheck | None) -> tuple[str, ...]:
        """Sentences that a reader of the replies needs."""
        note = None if check is None else check.note(self.config.backend)
        return () if note is None else (note,)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        header: Mapping[str, Any],
        prefills: Callable[[Sequence[GenerationRecord]], Sequence[GenerationRequest]] = lambda _replies: (),
    ) -> tuple[list[GenerationRecord], BackendCheck | None]:
        """Replies, or those of an earlier run that asked the same; and what ``generate`` says to some of them.

        Args:
            requests: Without a prefill, those for sampled replies last.
            header: What the replies are made from, besides the requests.
            prefills: Called in every process with the replies to ``requests``; what it gives is asked next. It may
                depend on them, as the base model's prefills begin with its own words.

        Returns:
            The replies, those after a prefill last.
        """
        header = {
            **header,
            "prompt_format": self.asker.writer.prompt_format.name,
            "seed": self.asker.seed,
            "requests": requests_hash(requests),
        }
        greedy, samples = ([row for row in requests if (row.kind == "sample") is part] for part in (False, True))
        known, asked_before = self.reuse.processes.on_main(lambda: self._known(header))
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
        if known is None or asked_before != requests_hash(prefilled):
            known = [*free, *ask(prefilled, "prefill")]
            self.reuse.write(GENERATIONS_FILE, {**header, "prefill": requests_hash(prefilled)}, known)
        self.reuse.close(GENERATIONS_FILE, header, GenerationRecord)
        return known, check

    def _known(self, header: Mapping[str, Any]) -> tuple[list[GenerationRecord] | None, str | None]:
        """All replies of a finished file that asked the same, and the hash of its prefills; twice None without one.

        What is asked with a prefill may be known only when the rest is answered, so the partial file's header does
        not name it: its rows are taken where their start is the same.
        """
        if self.reuse.folder is None:
            return None, None
        try:
            found, rows = read_rows(self.reuse.folder / GENERATIONS_FILE, GenerationRecord)
        except EvaluationError:
            return None, None
        prefill = found.pop("prefill", None)
        return (rows, prefill) if header_hash(found) == header_hash(header) else (None, None)

    def _check(
        self, greedy: Sequence[GenerationRequest], known: Sequence[GenerationRecord] | None
    ) -> BackendCheck | None:
        """Compares another backend's first replies, which may be known, with those of ``generate``."""
        if self.config.backend == "generate":
            return None
        some = greedy[:CHECKED_PROMPTS]
        plain = self.asker.ask(self.model, some, self.report("backend check"))
        others = self.asker.ask(self.model, some, backend=self.backend) if known is None else known[: len(some)]
        return compare_replies(self.config.backend, plain, others)


def requests_hash(requests: Sequence[GenerationRequest]) -> str:
    """Hash of all that is asked, for the header of the replies."""
    return header_hash({"requests": [dataclasses.asdict(request) for request in requests]})
