"""What the base model says, asked here or given: where prefills begin, and what is scored where data has no answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sku.evaluate.asking import by_id, choose_starts
from sku.evaluate.generation import GenerationRequest, fingerprint, probes_of
from sku.evaluate.record_files import OWN_ANSWERS_FILE, STARTS_FILE, header_hash
from sku.evaluate.records import HARMFUL_SPLITS, NORMAL_SPLITS, FluencyRecord, GenerationRecord, Start, start_id
from sku.evaluate.replies import Asker, SavedReplies, requests_hash
from sku.evaluate.results import answers_words
from sku.evaluate.reuse import Reuse


@dataclass(frozen=True, kw_only=True)
class BaseWords:
    """What one evaluation needs of the base model's words."""

    replies: SavedReplies
    """Of the evaluated model."""
    base: PreTrainedModel | None
    given: Sequence[Start] | None
    """Of the base model's own evaluation, which is then not asked again."""

    @property
    def _asker(self) -> Asker:
        return self.replies.asker

    @property
    def _reuse(self) -> Reuse:
        return self.replies.reuse

    def starts(
        self,
        requests: Sequence[GenerationRequest],
        free: Sequence[GenerationRecord],
        fluency: Callable[[Sequence[GenerationRecord]], Sequence[FluencyRecord]],
    ) -> list[Start]:
        """One start for each harmful prompt, kept in ``starts.jsonl``.

        Args:
            requests: Without a prefill.
            free: The evaluated model's replies to them.
            fluency: Gives the base model's losses on these, should they be the base model's own.
        """
        asked = [request for request in requests if request.split in HARMFUL_SPLITS]
        harmful = [record for record in free if record.split in HARMFUL_SPLITS]
        base = self.base
        if self.given is not None or base is None:
            known = by_id(self.given or ())
            chosen = [known.get(start.id, start) for start in choose_starts(harmful, [])]
            texts = header_hash({"starts": [dataclasses.asdict(start) for start in chosen]})
            return self._reuse.rows(STARTS_FILE, {"given": texts}, Start, lambda: chosen)
        judge = self._asker.judge
        header = {
            "base": fingerprint(base, probes_of(asked)),
            "decoding": self.replies.decoding(),
            "prompt_format": self._asker.writer.prompt_format.name,
            "requests": requests_hash(asked),
            "seed": self._asker.seed,
            "judge": None if judge is None else judge.card.key,
        }

        def make() -> list[Start]:
            own = base is self.replies.model
            said = harmful if own else self._ask(base, asked)
            scored = fluency(free) if own else self._asker.fluency(said, self.replies.report("fluency"))
            return self._reuse.processes.on_main(lambda: choose_starts(said, self._asker.outcomes(said, scored)))

        return self._reuse.rows(STARTS_FILE, header, Start, make)

    def answers(self, requests: Sequence[GenerationRequest], generations: Sequence[GenerationRecord]) -> list[Start]:
        """The base model's replies to normal prompts that have no answer, kept in ``own_answers.jsonl``.

        None where there is neither a base nor what it was asked before.

        Args:
            requests: Without a prefill.
            generations: The evaluated model's replies.
        """
        asked = [request for request in _unanswered(requests) if request.kind == "reply"]
        base, given, folder = self.base, self.given, self._reuse.folder
        if not asked or (given is None and base is None):
            if folder is not None:  # Of an earlier evaluation.
                self._reuse.processes.on_main(lambda: (folder / OWN_ANSWERS_FILE).unlink(missing_ok=True))
            return []
        wanted = {request.id: start_id(request.split, request.prompt) for request in asked}
        header: dict[str, Any] = {"requests": header_hash({"requests": [*wanted]})}
        if given is not None:
            known = by_id(given)
            found = [known[name] for name in wanted.values() if name in known]
            header["given"] = header_hash({"texts": [start.text for start in found]})
            return self._reuse.rows(OWN_ANSWERS_FILE, header, Start, lambda: found)
        assert base is not None
        header |= {"base": fingerprint(base, probes_of(asked)), "decoding": self.replies.decoding()}

        def make() -> list[Start]:
            said = generations if base is self.replies.model else self._ask(base, asked)
            texts = {record.id: record.reply for record in said if record.id in wanted}
            return [Start(id=wanted[name], source="own", text=texts[name]) for name in wanted]

        return self._reuse.rows(OWN_ANSWERS_FILE, header, Start, make)

    def _ask(self, base: PreTrainedModel, asked: Sequence[GenerationRequest]) -> list[GenerationRecord]:
        """The base model's replies, where its own evaluation is not at hand; none is written."""
        config = self.replies.config
        # vLLM would read weights from a folder that is not known here.
        backend = "generate" if config.backend == "vllm" else config.backend
        stages = dataclasses.replace(
            self.replies,
            asker=dataclasses.replace(self._asker, config=dataclasses.replace(config, backend=backend)),
            model=base,
            source=None,
            reuse=Reuse(folder=None, processes=self._reuse.processes),
            report=lambda stage: self.replies.report(f"base, {stage}"),
        )
        return stages.generate(asked, {})[0]


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
