"""The replies of one evaluation: greedy ones, forced starts and drawn ones, by any backend, saved batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.evaluate import batching
from sku.evaluate.asking import Writer
from sku.evaluate.backends import CHECKED_PROMPTS, BackendCheck, GenerationBackend, choose_backend, compare_replies
from sku.evaluate.generation import GenerationRequest, decoding_settings, generate_replies
from sku.evaluate.partial_files import PartialFile
from sku.evaluate.record_files import GENERATIONS_FILE, header_hash
from sku.evaluate.records import GenerationRecord
from sku.evaluate.reuse import Reuse
from sku.evaluate.row_sampling import Drawing

SAMPLES_BY_GENERATE = (
    "the drawn replies were written by the backend generate, as generate_batch can't give each reply its own seed"
)


@dataclass(frozen=True, kw_only=True)
class ReplyStages:
    """What asking a model needs."""

    model: PreTrainedModel
    writer: Writer
    config: EvaluateConfig
    seed: int
    source: str | Path | None
    """Folder or hub id of the same weights, for backends that load them by themselves."""
    reuse: Reuse
    report: Callable[[str], batching.Progress | None]
    """Name of a stage to its progress."""

    def decoding(self, stop_ids: Sequence[int]) -> dict[str, Any]:
        """Every setting that decides the replies, drawn ones included."""
        greedy = decoding_settings(stop_ids, self.config.max_new_tokens)
        drawn = {**greedy, **self._drawing().settings(), "number": self.config.samples}
        return {**greedy, "backend": self.config.backend, "samples": drawn if self.config.samples else None}

    def _drawing(self) -> Drawing:
        return Drawing(temperature=self.config.temperature, top_p=self.config.top_p, seed=self.seed)

    def notes(self, check: BackendCheck | None) -> tuple[str, ...]:
        """Sentences that a reader of the replies needs."""
        config = self.config
        own = (
            None if check is None else check.note(config.backend),
            SAMPLES_BY_GENERATE if config.samples and config.backend == "generate_batch" else None,
        )
        return tuple(note for note in own if note is not None)

    def generate(
        self, requests: Sequence[GenerationRequest], stop_ids: Sequence[int], header: Mapping[str, Any]
    ) -> tuple[list[GenerationRecord], BackendCheck | None]:
        """Replies, or those of an earlier run that asked the same; and what ``generate`` says to some of them."""
        asked = header_hash({"requests": [dataclasses.asdict(request) for request in requests]})
        header = {**header, "prompt_format": self.writer.prompt_format.name, "seed": self.seed, "requests": asked}
        greedy = [request for request in requests if request.kind != "sample"]
        checks: list[BackendCheck | None] = []

        def make() -> list[GenerationRecord]:
            backend = choose_backend(
                self.config, self.model, source=self.source, seed=self.seed, processes=self.reuse.processes.count
            )
            checks.append(self._check(greedy, stop_ids, lambda some: self._ask(some, stop_ids, backend=backend)))
            return self._make_replies(greedy, requests[len(greedy) :], stop_ids, backend, header)

        records = self.reuse.rows(GENERATIONS_FILE, header, GenerationRecord, make)
        if not checks:
            checks.append(self._check(greedy, stop_ids, lambda some: records[: len(some)]))
        return records, checks[0]

    def _make_replies(
        self,
        greedy: Sequence[GenerationRequest],
        samples: Sequence[GenerationRequest],
        stop_ids: Sequence[int],
        backend: GenerationBackend,
        header: Mapping[str, Any],
    ) -> list[GenerationRecord]:
        """Greedy replies, then drawn ones; each batch is saved, and found again by the next run."""
        folder = self.reuse.folder
        partial = None if folder is None else PartialFile(folder / GENERATIONS_FILE, header, GenerationRecord)
        saved: dict[str, Any] = {}
        if partial is not None:
            saved = {"finished": self.reuse.processes.on_main(partial.recover), "keep": partial.append}
        records = self._ask(greedy, stop_ids, backend=backend, progress=self.report("replies"), **saved)
        if samples:
            records += self._ask(
                samples,
                stop_ids,
                backend=None if self.config.backend == "generate_batch" else backend,
                drawing=self._drawing(),
                progress=self.report("samples"),
                **saved,
            )
        return records

    def _ask(
        self, requests: Sequence[GenerationRequest], stop_ids: Sequence[int], **options: Any
    ) -> list[GenerationRecord]:
        return generate_replies(
            self.model,
            self.writer.tokenizer,
            requests,
            stop_ids=stop_ids,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            window=self.writer.window,
            processes=self.reuse.processes,
            **options,
        )

    def _check(
        self,
        greedy: Sequence[GenerationRequest],
        stop_ids: Sequence[int],
        answer: Callable[[Sequence[GenerationRequest]], Sequence[GenerationRecord]],
    ) -> BackendCheck | None:
        """Compares another backend's first replies with those of ``generate``."""
        if self.config.backend == "generate":
            return None
        some = greedy[:CHECKED_PROMPTS]
        plain = self._ask(some, stop_ids, progress=self.report("backend check"))
        return compare_replies(self.config.backend, plain, answer(some))
