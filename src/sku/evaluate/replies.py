"""The replies of one evaluation: greedy, drawn and after a prefill, by any backend, saved batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.errors import EvaluationError
from sku.evaluate import batching
from sku.evaluate.asking import Writer
from sku.evaluate.backends import CHECKED_PROMPTS, BackendCheck, GenerationBackend, choose_backend, compare_replies
from sku.evaluate.generation import GenerationRequest, decoding_settings, generate_replies
from sku.evaluate.partial_files import PartialFile
from sku.evaluate.record_files import GENERATIONS_FILE, header_hash, read_rows, write_rows
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
        self,
        requests: Sequence[GenerationRequest],
        stop_ids: Sequence[int],
        header: Mapping[str, Any],
        prefills: Callable[[Sequence[GenerationRecord]], Sequence[GenerationRequest]] = lambda _replies: (),
    ) -> tuple[list[GenerationRecord], BackendCheck | None]:
        """Replies, or those of an earlier run that asked the same; and what ``generate`` says to some of them.

        Args:
            requests: Without a prefill, those for drawn replies last.
            stop_ids: Ids that end a reply.
            header: What the replies are made from, besides the requests.
            prefills: Called in every process with the replies to ``requests``; what it gives is asked next. It may
                depend on them, as the base model's prefills begin with its own words.

        Returns:
            The replies, those after a prefill last.
        """
        header = {
            **header,
            "prompt_format": self.writer.prompt_format.name,
            "seed": self.seed,
            "requests": _hash_of(requests),
        }
        files = _Files(self.reuse, header)
        greedy = [request for request in requests if request.kind != "sample"]
        backends: list[GenerationBackend] = []

        def ask(asked: Sequence[GenerationRequest], stage: str, **options: Any) -> list[GenerationRecord]:
            saved = {"finished": files.recovered(), "keep": files.keep} if files.folder is not None else {}
            return self._ask(asked, stop_ids, progress=self.report(stage), **saved, **options)

        def backend() -> GenerationBackend:
            if not backends:
                count = self.reuse.processes.count
                found = choose_backend(self.config, self.model, source=self.source, seed=self.seed, processes=count)
                backends.append(found)
            return backends[0]

        free, found = files.finished()
        if free is None:
            check = self._check(greedy, stop_ids, lambda some: self._ask(some, stop_ids, backend=backend()))
            free = ask(greedy, "replies", backend=backend())
            if len(requests) > len(greedy):
                drawn_by = None if self.config.backend == "generate_batch" else backend()
                free += ask(requests[len(greedy) :], "samples", backend=drawn_by, drawing=self._drawing())
        else:
            known = free
            check = self._check(greedy, stop_ids, lambda some: known[: len(some)])
        forced = prefills(free)
        if found is None or files.prefill != _hash_of(forced):
            found = [*free, *(ask(forced, "prefill", backend=backend()) if forced else [])]
            files.write(found, _hash_of(forced))
        files.close()
        return found, check

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


def _hash_of(requests: Sequence[GenerationRequest]) -> str:
    return header_hash({"requests": [dataclasses.asdict(request) for request in requests]})


class _Files:
    """``generations.jsonl`` and its partial file.

    What is asked with a prefill may be known only when the rest is answered, so the partial file's header does not
    name it: its rows are taken where their start is the same.
    """

    def __init__(self, reuse: Reuse, header: Mapping[str, Any]) -> None:
        self.folder, self._on_main, self._header = reuse.folder, reuse.processes.on_main, header
        self.prefill: str | None = None
        """Hash of the prefills of the finished file."""
        self._recovered: list[GenerationRecord] | None = None

    def finished(self) -> tuple[list[GenerationRecord] | None, list[GenerationRecord] | None]:
        """Free replies and all replies of a finished file that asked the same; twice None without one."""
        if self.folder is None:
            return None, None
        self.prefill, rows = self._on_main(self._read)
        free = None if rows is None else [record for record in rows if record.kind != "prefill"]
        return free, rows

    def _read(self) -> tuple[str | None, list[GenerationRecord] | None]:
        try:
            header, rows = read_rows(self._path, GenerationRecord)
        except EvaluationError:
            return None, None
        prefill = header.pop("prefill", None)
        return (prefill, rows) if header_hash(header) == header_hash(self._header) else (None, None)

    def recovered(self) -> list[GenerationRecord]:
        """Replies of an interrupted run."""
        if self._recovered is None:
            self._recovered = self._on_main(self._partial.recover)
        return self._recovered

    def keep(self, records: Sequence[GenerationRecord]) -> None:
        """Saves a batch."""
        self._partial.append(records)

    def write(self, records: Sequence[GenerationRecord], prefill: str) -> None:
        """Writes the finished file."""
        if self.folder is not None:
            self._on_main(lambda: write_rows(self._path, {**self._header, "prefill": prefill}, records))

    def close(self) -> None:
        """Removes the partial file."""
        if self.folder is not None:
            self._on_main(self._partial.remove)

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / GENERATIONS_FILE

    @property
    def _partial(self) -> PartialFile[GenerationRecord]:
        return PartialFile(self._path, self._header, GenerationRecord)
