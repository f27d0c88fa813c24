"""The one way to ask a model and to judge what it says, and the replies of one evaluation, saved batch by batch.

A reply doesn't depend on its batch: greedy ones are padded on the left, sampled ones have a seed each. Of the base
model, asked here or given: where prefills begin, and what is scored where the data has no answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.evaluate.generation import Progress, evaluation_mode
from sku.evaluate.generation.decoding import GenerationRequest, Sampling, decoding_settings
from sku.evaluate.generation.prompts import PromptEncoder
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.judges import Judge
from sku.evaluate.metrics import ReplyOutcome, decide_outcomes, passes_surface_checks
from sku.evaluate.perplexity import score_fluency
from sku.evaluate.records import (
    GENERATIONS_FILE,
    HARMFUL_SPLITS,
    OWN_ANSWERS_FILE,
    STARTS_FILE,
    FluencyRecord,
    GenerationRecord,
    PartialFile,
    PrefillSource,
    ResultCache,
    Split,
    answers_words,
    header_hash,
    is_normal,
    start_id,
)
from sku.models import embedding_weight
from sku.processes import ALONE, Processes


def fingerprint(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> str:
    """SHA-256 of a model's scores after each probe, the token ids of a few prompts; dropout is off.

    The same weights, adapters and dtype on the same device give the same.
    """
    digest = hashlib.sha256()
    device = embedding_weight(model).device
    with evaluation_mode(model), torch.inference_mode():
        for ids in probes:
            scores = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, -1]
            digest.update(scores.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def about(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> dict[str, str]:
    """What tells a model from others in the header of a file."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "fingerprint": fingerprint(model, probes)}


def probes_of(requests: Sequence[GenerationRequest]) -> list[tuple[int, ...]]:
    """The first prompt of each split."""
    first: dict[Split, tuple[int, ...]] = {}
    for request in requests:
        first.setdefault(request.split, request.input_ids)
    return list(first.values())


def requests_hash(requests: Sequence[GenerationRequest]) -> str:
    """Hash of all that is asked, for the header of the replies."""
    return header_hash({"requests": [dataclasses.asdict(request) for request in requests]})


def choose_starts(replies: Sequence[GenerationRecord], outcomes: Iterable[ReplyOutcome]) -> list[PrefillSource]:
    """The base model's own harmful reply to each prompt that it gave one to.

    Args:
        replies: Of the base model to harmful prompts, greedy and sampled.
        outcomes: Of these replies: a harmful one has passed the gate.

    Returns:
        The greedy reply where it is harmful, else the first sampled one that is; in the order of the replies.
    """
    harmful = {outcome.id for outcome in outcomes if outcome.outcome == "harmful"}
    own: dict[str, str] = {}
    for record in sorted(replies, key=lambda record: (record.kind == "sample", record.sample)):
        if record.id in harmful:
            own.setdefault(start_id(record.split, record.prompt), record.reply)
    asked = dict.fromkeys(start_id(record.split, record.prompt) for record in replies)
    return [PrefillSource(id=name, text=own[name]) for name in asked if name in own]


@dataclass(frozen=True, kw_only=True)
class ReplyGenerator:
    """How models are asked and their replies judged, the same for all that are set side by side.

    Its methods raise an ``EvaluationError`` where generation, the base model or the judge fails.
    """

    base: PreTrainedModel
    """The original model, asked whether replies are word salad."""
    encoder: PromptEncoder
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
        """A model's replies, its dropout off; ``options`` as of ``generate_replies``."""
        with evaluation_mode(model):
            return generate_replies(
                model,
                self.encoder.tokenizer,
                requests,
                stop_ids=self.stop_ids,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                window=self.encoder.window,
                processes=self.processes,
                progress=progress,
                **options,
            )

    def fluency(self, records: Sequence[GenerationRecord], progress: Progress | None = None) -> list[FluencyRecord]:
        """The base model's losses on the replies that no surface rule has found gibberish already."""
        with evaluation_mode(self.base):
            return score_fluency(
                self.base,
                passes_surface_checks(records),
                self.encoder.scored_reply,
                seed=self.seed,
                batch_size=self.config.batch_size,
                processes=self.processes,
                progress=progress,
            )

    def outcomes(
        self, records: Sequence[GenerationRecord], fluency: Sequence[FluencyRecord] | None = None
    ) -> list[ReplyOutcome]:
        """What replies come to, by gate and judge; ``fluency`` of them is asked of the base model here if None."""
        assert self.judge is not None
        scored = self.fluency(records) if fluency is None else fluency
        return decide_outcomes(records, self.judge, scored)

    def answer(
        self, model: PreTrainedModel, requests: Sequence[GenerationRequest], progress: Progress | None = None
    ) -> dict[str, ReplyOutcome]:
        """Asks a model: id of each request -> what its reply comes to."""
        return {outcome.id: outcome for outcome in self.outcomes(self.ask(model, requests, progress))}

    def starts(self, requests: Sequence[GenerationRequest], progress: Progress | None = None) -> list[PrefillSource]:
        """The base model's own harmful replies, which prefills begin with."""
        replies = self.ask(self.base, requests, progress)
        return choose_starts(replies, self.outcomes(replies))


@dataclass(frozen=True, kw_only=True)
class SavedReplies:
    """The replies of one evaluation: greedy, drawn and after a prefill; and the base model's."""

    generator: ReplyGenerator
    model: PreTrainedModel
    reuse: ResultCache
    report: Callable[[str], Progress | None]
    """Name of a stage to its progress."""
    given: Sequence[PrefillSource] | None
    """Of the base model's own evaluation, which is then not asked again."""

    def decoding(self) -> dict[str, Any]:
        """Every setting that decides the replies, drawn ones included."""
        config = self.generator.config
        greedy = decoding_settings(self.generator.stop_ids, config.max_new_tokens)
        drawn = {**greedy, **self._sampling.settings(), "number": config.samples}
        return {**greedy, "samples": drawn if config.samples else None}

    @property
    def _sampling(self) -> Sampling:
        return Sampling(temperature=1.0, top_p=1.0, seed=self.generator.seed)

    def _header(self, requests: Sequence[GenerationRequest], **more: Any) -> dict[str, Any]:
        encoder = self.generator.encoder
        return {
            **more,
            "prompt_format": encoder.prompt_format.name,
            "seed": self.generator.seed,
            "requests": requests_hash(requests),
        }

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        header: Mapping[str, Any],
        prefills: Callable[[Sequence[GenerationRecord]], Sequence[GenerationRequest]] = lambda _replies: (),
    ) -> list[GenerationRecord]:
        """Replies, those after a prefill last, or those of an earlier run that asked the same.

        Args:
            requests: Without a prefill, those for sampled replies last.
            header: What the replies are made from, besides the requests.
            prefills: Called in every process with the replies to ``requests``; what it gives is asked next. It may
                depend on them, as the base model's prefills begin with its own words.
        """
        header = self._header(requests, **header)
        known = self.reuse.known(GENERATIONS_FILE, header, GenerationRecord)
        folder = self.reuse.folder
        partial = None if folder is None else PartialFile(folder / GENERATIONS_FILE, header, GenerationRecord)

        @functools.cache
        def saved() -> dict[str, Any]:
            if partial is None:
                return {}
            return {"finished": self.generator.processes.run_on_rank0(partial.recover), "keep": partial.append}

        def ask(asked: Sequence[GenerationRequest], stage: str, **options: Any) -> list[GenerationRecord]:
            return self.generator.ask(self.model, asked, self.report(stage), **saved(), **options) if asked else []

        if known is None:
            greedy, samples = ([row for row in requests if (row.kind == "sample") is part] for part in (False, True))
            free = [*ask(greedy, "replies"), *ask(samples, "samples", sampling=self._sampling)]
        else:
            free = [record for record in known if record.kind != "prefill"]
        prefilled = prefills(free)
        # No part of the header: what prefills begin with may be known only when the rest is answered.
        begun = [(row.id, row.prefill) for row in known or () if row.kind == "prefill"]
        if known is None or begun != [(row.id, row.prefill) for row in prefilled]:
            known = [*free, *ask(prefilled, "prefill")]
            self.reuse.write(GENERATIONS_FILE, header, known)
        if partial is not None and self.generator.processes.is_main:
            partial.remove()
        return known

    def starts(
        self,
        requests: Sequence[GenerationRequest],
        free: Sequence[GenerationRecord],
        fluency: Callable[[Sequence[GenerationRecord]], Sequence[FluencyRecord]],
    ) -> list[PrefillSource]:
        """The base model's own harmful replies, as far as they are known, kept in ``starts.jsonl``.

        Args:
            requests: Without a prefill.
            free: The evaluated model's replies to them.
            fluency: Gives the base model's losses on these, should they be the base model's own.
        """
        asked = [request for request in requests if request.split in HARMFUL_SPLITS]
        judge = self.generator.judge

        def choose() -> list[PrefillSource]:
            if self.generator.base is self.model:
                said, scored = [record for record in free if record.split in HARMFUL_SPLITS], fluency(free)
            else:
                said = self._ask_base(asked)
                scored = self.generator.fluency(said, self.report("fluency"))
            return self.reuse.processes.run_on_rank0(
                lambda: choose_starts(said, self.generator.outcomes(said, scored))
            )

        return self._of_base(STARTS_FILE, asked, choose, judge=None if judge is None else judge.card.key)

    def answers(
        self, requests: Sequence[GenerationRequest], generations: Sequence[GenerationRecord]
    ) -> list[PrefillSource]:
        """The base model's replies to normal prompts that have no answer, kept in ``own_answers.jsonl``.

        Arguments as of ``starts``.
        """
        asked = [request for request in _unanswered(requests) if request.kind == "reply"]
        folder = self.reuse.folder
        if not asked:
            if folder is not None:  # Of an earlier evaluation.
                self.reuse.processes.run_on_rank0(lambda: (folder / OWN_ANSWERS_FILE).unlink(missing_ok=True))
            return []

        def choose() -> list[PrefillSource]:
            said = generations if self.generator.base is self.model else self._ask_base(asked)
            texts = {record.id: record.reply for record in said}
            return [PrefillSource(id=start_id(one.split, one.prompt), text=texts[one.id]) for one in asked]

        return self._of_base(OWN_ANSWERS_FILE, asked, choose)

    def _of_base(
        self,
        file: str,
        asked: Sequence[GenerationRequest],
        choose: Callable[[], list[PrefillSource]],
        **header: Any,
    ) -> list[PrefillSource]:
        """Words of the base model for some prompts: of those that are given, or chosen and kept."""
        if self.given is not None:
            names = {start_id(request.split, request.prompt) for request in asked}
            found = [start for start in self.given if start.id in names]
            texts = header_hash({"starts": [dataclasses.asdict(start) for start in found]})
            return self.reuse.rows(file, {"given": texts}, PrefillSource, lambda: found)
        base = fingerprint(self.generator.base, probes_of(asked))
        made_from = self._header(asked, base=base, decoding=self.decoding(), **header)
        return self.reuse.rows(file, made_from, PrefillSource, choose)

    def _ask_base(self, asked: Sequence[GenerationRequest]) -> list[GenerationRecord]:
        """The base model's replies, where its own evaluation is not at hand; none is written."""
        stages = dataclasses.replace(
            self,
            model=self.generator.base,
            reuse=ResultCache(folder=None, processes=self.reuse.processes),
            report=lambda stage: self.report(f"base, {stage}"),
        )
        return stages.generate(asked, {})


def answers_notes(requests: Sequence[GenerationRequest]) -> tuple[str, ...]:
    """Whose words the perplexity and KL of prompts without answers are about."""
    splits = dict.fromkeys(request.split for request in _unanswered(requests))
    listed = ", ".join(map(answers_words, splits))
    said = "there are none in the data, so the base model's own greedy replies are scored"
    return (f"{listed}: {said}",) if splits else ()


def _unanswered(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    return [request for request in requests if is_normal(request.split) and not request.reference]
