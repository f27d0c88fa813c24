"""Evaluation of one model: ask, write down, judge, count.

``generations.jsonl``, ``fluency.jsonl`` and ``perplexity.jsonl`` hold all that a model was needed for; the rest is
computed from these rows (``measure``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, PromptFormatName, plain_data
from sku.data.examples import Example, ForgetRetainData
from sku.data.prompts import resolve_prompt_format
from sku.data.tokenization import TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate import asking, batching
from sku.evaluate.backends import (
    CHECKED_PROMPTS,
    BackendCheck,
    GenerationBackend,
    choose_backend,
    compare_replies,
)
from sku.evaluate.fingerprint import fingerprint, probes_of
from sku.evaluate.generation import GenerationRequest, decoding_settings, generate_replies, stop_token_ids
from sku.evaluate.judges import Judge, choose_judge
from sku.evaluate.measure import measure
from sku.evaluate.outcomes import find_faults
from sku.evaluate.partial_files import PartialFile
from sku.evaluate.perplexity import SHUFFLES, score_examples, score_fluency
from sku.evaluate.processes import Processes, current_processes
from sku.evaluate.record_files import (
    FLUENCY_FILE,
    GENERATIONS_FILE,
    OUTCOMES_FILE,
    PERPLEXITY_FILE,
    create_private_folder,
    header_hash,
    read_if_same,
    write_rows,
)
from sku.evaluate.records import UNANSWERED, ExampleLoss, FluencyRecord, GenerationRecord, Split
from sku.evaluate.results import EvaluationResult, EvaluationSetup, write_result
from sku.evaluate.row_sampling import Drawing
from sku.evaluate.sampling import record_id
from sku.models import load_model

Progress = Callable[[str, int, int], None]
"""Called with what is being done (``backend check``, ``replies``, ``samples``, ``perplexity``, ``fluency``), the
number done and their total."""
Row = TypeVar("Row", GenerationRecord, FluencyRecord, ExampleLoss)

SAMPLES_BY_GENERATE = (
    "the drawn replies were written by the backend generate, as generate_batch can't give each reply its own seed"
)
SELF_SCORED = (
    "no base model was given, so word salad was looked for with the evaluated model itself, which may find its own "
    "word salad fluent"
)


def evaluate(
    model: PreTrainedModel | PeftModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    data: ForgetRetainData,
    *,
    config: EvaluateConfig | None = None,
    judge: Judge | None = None,
    prompt_format: PromptFormatName = "auto",
    base_model: PreTrainedModel | PeftModel | None = None,
    output_dir: Path | None = None,
    model_name: str | None = None,
    model_source: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measures what a model answers to harmful and to normal prompts, and the perplexity of fixed answers.

    Under ``accelerate launch`` or ``torchrun`` every process must call this with the same arguments: they share the
    batches, the first one judges and writes, and all return the same result.

    Args:
        model: The model, or a folder, hub id or ``embedded`` to load with ``sku.models.load_model``. Its dropout is
            switched off for the time of the evaluation; it is not changed.
        tokenizer: Of the model; None with a name, whose own tokenizer is then used.
        data: The splits ``unlearned``, ``unseen`` and ``retain_test`` are measured; of ``benign``, where there is one,
            the perplexity alone.
        config: Numbers of prompts, lengths, judge; the defaults of ``EvaluateConfig`` if None.
        judge: Any judge, in place of the one that the config names.
        prompt_format: As in training.
        base_model: The original model: asked whether replies are word salad. The model itself if None, with a note
            in the result. Its tokenizer must be the same.
        output_dir: Folder for the rows and ``evaluation.json``, made with mode 0700. Rows that are already there and
            were made by the same model from the same prompts are reused, those of an interrupted run too. Nothing is
            written if None.
        model_name: Recorded; the name it was loaded by, or ``name_or_path`` of its configuration if None.
        model_source: Folder or hub id that holds the same weights, for the backend ``vllm``; that of ``model``
            where it is a name.
        seed: Decides which prompts are drawn, and the drawn replies.
        progress: Called after each batch.

    Returns:
        The result, with its rows.

    Raises:
        EvaluationError: Nothing to measure, a judge that does not fit, non-finite losses, too little GPU memory, a
            backend that fails, or another process that does.
        ModelError: The model can't be loaded, or the prompt format doesn't fit its tokenizer.
        OutputError: The folder can't be written.
    """
    config = EvaluateConfig() if config is None else config
    processes = current_processes()
    if isinstance(model, str | Path):
        model_source = model if model_source is None else model_source
        loaded = load_model(model)
        model_name = loaded.name if model_name is None else model_name
        model, tokenizer = loaded.model, loaded.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise EvaluationError("a model was given without its tokenizer: give both, or the model's name")
    judges: list[Judge] = []  # In the main process alone: a judge may be a large model.
    processes.on_main(lambda: judges.append(choose_judge(config, data) if judge is None else judge))
    if output_dir is not None:
        processes.on_main(lambda: create_private_folder(output_dir))
    asked = cast(PreTrainedModel, model)
    run = _Run(
        model=asked,
        name=model_name or str(getattr(asked.config, "name_or_path", "") or "unnamed"),
        writer=asking.Writer(
            tokenizer=tokenizer,
            prompt_format=resolve_prompt_format(prompt_format, tokenizer),
            window=asking.window_of(asked),
        ),
        config=config,
        seed=seed,
        folder=output_dir,
        source=model_source,
        processes=processes,
        progress=progress,
        notes=data.notes(),
    )
    rows = run.rows(asking.draw(data, config, seed), cast("PreTrainedModel | None", base_model))
    return processes.on_main(lambda: _judged(*rows, judges[0], output_dir))


def _judged(
    setup: EvaluationSetup,
    generations: Sequence[GenerationRecord],
    fluency: Sequence[FluencyRecord],
    losses: Sequence[ExampleLoss],
    judge: Judge,
    folder: Path | None,
) -> EvaluationResult:
    """Judges, counts, and writes what came out."""
    result = measure(setup, generations, fluency, losses, judge)
    if folder is not None:
        write_rows(folder / OUTCOMES_FILE, {"judge": judge.card.name}, result.outcomes)
        write_result(folder, result)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What every step of one evaluation needs."""

    model: PreTrainedModel
    name: str
    writer: asking.Writer
    config: EvaluateConfig
    seed: int
    folder: Path | None
    source: str | Path | None
    processes: Processes
    progress: Progress | None
    notes: tuple[str, ...]

    def rows(
        self, drawn: Mapping[Split, list[Example]], base_model: PreTrainedModel | None
    ) -> tuple[EvaluationSetup, list[GenerationRecord], list[FluencyRecord], list[ExampleLoss]]:
        """All that a model is needed for, in every process."""
        requests, left_out = asking.requests(drawn, self.writer, self.config)
        probes = probes_of(requests)
        stop_ids = stop_token_ids(self.model, self.writer.tokenizer, self.writer.end_of_turn())
        decoding = self._decoding(stop_ids)
        with batching.evaluation_mode(self.model):
            about = {
                "name": self.name,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "fingerprint": fingerprint(self.model, probes),
            }
            generations, check = self._generate(requests, stop_ids, {"model": about, "decoding": decoding})
            losses = self._losses(drawn, about, left_out)
        scorer = self.model if base_model is None else base_model
        with batching.evaluation_mode(scorer):
            fluency = self._fluency(scorer, probes, generations)
        setup = EvaluationSetup(
            model=about,
            prompt_format=self.writer.prompt_format.name,
            decoding=decoding,
            config=plain_data(self.config),
            seed=self.seed,
            fluency_scorer="self" if base_model is None else "base",
            left_out=left_out,
            backend_check=None if check is None else dataclasses.asdict(check),
            notes=self._all_notes(check, base_model is None),
        )
        return setup, generations, fluency, losses

    def _decoding(self, stop_ids: Sequence[int]) -> dict[str, Any]:
        """Every setting that decides the replies, drawn ones included."""
        greedy = decoding_settings(stop_ids, self.config.max_new_tokens)
        drawn = {**greedy, **self._drawing().settings(), "number": self.config.samples}
        return {**greedy, "backend": self.config.backend, "samples": drawn if self.config.samples else None}

    def _drawing(self) -> Drawing:
        return Drawing(temperature=self.config.temperature, top_p=self.config.top_p, seed=self.seed)

    def _all_notes(self, check: BackendCheck | None, self_scored: bool) -> tuple[str, ...]:
        config = self.config
        own = (
            None if check is None else check.note(config.backend),
            SAMPLES_BY_GENERATE if config.samples and config.backend == "generate_batch" else None,
            SELF_SCORED if self_scored else None,
        )
        return (*self.notes, *(note for note in own if note is not None))

    def _generate(
        self, requests: Sequence[GenerationRequest], stop_ids: Sequence[int], header: Mapping[str, Any]
    ) -> tuple[list[GenerationRecord], BackendCheck | None]:
        """Replies, or those of an earlier run that asked the same; and what ``generate`` says to some of them."""
        asked = header_hash({"requests": [dataclasses.asdict(request) for request in requests]})
        header = {**header, "prompt_format": self.writer.prompt_format.name, "seed": self.seed, "requests": asked}
        greedy = [request for request in requests if request.kind != "sample"]
        checks: list[BackendCheck | None] = []

        def make() -> list[GenerationRecord]:
            backend = choose_backend(
                self.config, self.model, source=self.source, seed=self.seed, processes=self.processes.count
            )
            checks.append(self._check(greedy, stop_ids, lambda some: self._ask(some, stop_ids, backend=backend)))
            return self._make_replies(greedy, requests[len(greedy) :], stop_ids, backend, header)

        records = self._reuse_or_make(GENERATIONS_FILE, header, GenerationRecord, make)
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
        partial = (
            None if self.folder is None else PartialFile(self.folder / GENERATIONS_FILE, header, GenerationRecord)
        )
        saved: dict[str, Any] = {}
        if partial is not None:
            saved = {"finished": self.processes.on_main(partial.recover), "keep": partial.append}
        records = self._ask(greedy, stop_ids, backend=backend, progress=self._report("replies"), **saved)
        if samples:
            records += self._ask(
                samples,
                stop_ids,
                backend=None if self.config.backend == "generate_batch" else backend,
                drawing=self._drawing(),
                progress=self._report("samples"),
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
            processes=self.processes,
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
        plain = self._ask(some, stop_ids, progress=self._report("backend check"))
        return compare_replies(self.config.backend, plain, answer(some))

    def _losses(
        self, drawn: Mapping[Split, list[Example]], about: Mapping[str, str], left_out: dict[str, int]
    ) -> list[ExampleLoss]:
        """Losses on the dataset's own answers; answers without a token are added to ``left_out``."""
        named: list[tuple[str, Split, TokenizedExample]] = []
        for split, examples in drawn.items():
            for example in examples if split not in UNANSWERED else ():
                tokenized = self.writer.scored(example.prompt, example.answer)
                if tokenized is None:
                    reason = f"{split}: perplexity, as no token of the answer fits"
                    left_out[reason] = left_out.get(reason, 0) + 1
                else:
                    named.append((record_id(split, "reply", example.prompt), split, tokenized))

        def score() -> list[ExampleLoss]:
            scores = score_examples(
                self.model,
                [tokenized for _, _, tokenized in named],
                batch_size=self.config.batch_size,
                processes=self.processes,
                progress=self._report("perplexity"),
            )
            return [
                ExampleLoss(id=name, split=split, nll=nll, tokens=tokens)
                for (name, split, _), (nll, tokens) in zip(named, scores, strict=True)
            ]

        texts = header_hash({"texts": [(name, list(entry.input_ids), list(entry.labels)) for name, _, entry in named]})
        return self._reuse_or_make(PERPLEXITY_FILE, {"model": about, "texts": texts}, ExampleLoss, score)

    def _fluency(
        self, scorer: PreTrainedModel, probes: Sequence[Sequence[int]], generations: Sequence[GenerationRecord]
    ) -> list[FluencyRecord]:
        """The base model's losses on the replies that no surface rule has found degenerate already."""
        unclear = [record for record in generations if not find_faults(record, None)]
        header = {
            "scorer": fingerprint(scorer, probes),
            "shuffles": SHUFFLES,
            "seed": self.seed,
            "texts": header_hash({"texts": [(entry.id, entry.forced_start, entry.reply) for entry in unclear]}),
        }
        return self._reuse_or_make(
            FLUENCY_FILE,
            header,
            FluencyRecord,
            lambda: score_fluency(
                scorer,
                unclear,
                self.writer.scored,
                seed=self.seed,
                batch_size=self.config.batch_size,
                processes=self.processes,
                progress=self._report("fluency"),
            ),
        )

    def _reuse_or_make(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        if self.folder is None:
            return make()
        path = self.folder / file
        rows = self.processes.on_main(lambda: read_if_same(path, header, row_type))
        if rows is None:
            rows = made = make()
            self.processes.on_main(lambda: write_rows(path, header, made))
        if self.processes.is_main:
            PartialFile(path, header, row_type).remove()
        return rows

    def _report(self, stage: str) -> batching.Progress | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)
