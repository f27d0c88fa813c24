"""Evaluation of one model: ask, write down, judge, count.

``generations.jsonl``, ``fluency.jsonl`` and ``perplexity.jsonl`` hold all that a model was needed for; the rest is
computed from these rows (``measure``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, PromptFormatName, plain_data
from sku.data.examples import Example, ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate import agreement, asking, batching
from sku.evaluate.fingerprint import fingerprint, probes_of
from sku.evaluate.generation import GenerationRequest, stop_token_ids
from sku.evaluate.judges import Judge, choose_judge
from sku.evaluate.judges.cache import cached
from sku.evaluate.measure import measure
from sku.evaluate.outcomes import decide_outcomes, find_faults
from sku.evaluate.perplexity import SHUFFLES, SURE_GAIN, score_examples, score_fluency
from sku.evaluate.processes import current_processes
from sku.evaluate.record_files import (
    FLUENCY_FILE,
    OUTCOMES_FILE,
    OWN_ANSWERS_FILE,
    PERPLEXITY_FILE,
    STARTS_FILE,
    create_private_folder,
    header_hash,
    write_rows,
)
from sku.evaluate.records import (
    HARMFUL_SPLITS,
    NORMAL_SPLITS,
    ExampleLoss,
    FluencyRecord,
    GenerationRecord,
    RelevanceRow,
    Split,
    Start,
)
from sku.evaluate.replies import ReplyStages
from sku.evaluate.results import EvaluationResult, EvaluationSetup, answers_words, write_result
from sku.evaluate.reuse import Reuse
from sku.evaluate.sampling import record_id, start_id
from sku.evaluate.starts import NO_BASE, Starts, by_id, choose_starts, count_sources, starts_note
from sku.evaluate.utility import UtilityStages, check_settings
from sku.models import load_model

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number done and their total: ``backend check``, ``replies``, ``samples``,
``prefill``, ``perplexity``, ``lm_eval``, ``fluency``, ``agreement``, ``cosine``,
``relevance``, ``judge``; ``base, replies`` and the like where the base model is asked first."""

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
    starts: Sequence[Start] | None = None,
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
        data: The splits ``unlearned`` (its ``visited`` examples where they are known), ``unseen`` and ``retain_test``
            are measured, and the sets of other sources (``normal``, ``harmful``).
        config: Numbers of prompts, lengths, judge; the defaults of ``EvaluateConfig`` if None.
        judge: Any judge, in place of the one that the config names.
        prompt_format: As in training.
        base_model: The original model: asked whether replies are word salad, and where no ``starts`` are given for
            the harmful replies that prefills begin with. The model itself if None, with a note in the result, and
            prefills then begin with the dataset's answers. Its tokenizer must be the same.
        output_dir: Folder for the rows and ``evaluation.json``, made with mode 0700. Rows that are already there and
            were made by the same model from the same prompts are reused, those of an interrupted run too. Nothing is
            written if None.
        model_name: Recorded; the name it was loaded by, or ``name_or_path`` of its configuration if None.
        model_source: Folder or hub id that holds the same weights, for the backend ``vllm``; that of ``model``
            where it is a name.
        starts: What prefills begin with: ``starts`` of the base model's result, so that both are asked the same
            without asking the base again.
        seed: Decides which prompts are drawn, and the drawn replies.
        progress: Called after each batch.

    Returns:
        The result, with its rows.

    Raises:
        DataError: The XSTest file can't be read.
        EvaluationError: Nothing to measure, a judge that does not fit, an unknown task, non-finite losses, too little
            GPU memory, a backend that fails, or another process that does.
        ModelError: A model can't be loaded, or the prompt format doesn't fit its tokenizer.
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
    processes.on_main(lambda: check_settings(config))
    if output_dir is not None:
        processes.on_main(lambda: create_private_folder(output_dir))
    judge_progress = None if progress is None else lambda done, total: progress("judge", done, total)
    judges = [cached(found, output_dir, judge_progress) for found in judges]
    asked = cast(PreTrainedModel, model)
    run = _Run(
        model=asked,
        name=model_name or str(getattr(asked.config, "name_or_path", "") or "unnamed"),
        writer=asking.Writer.of(asked, tokenizer, prompt_format),
        config=config,
        seed=seed,
        source=model_source,
        reuse=Reuse(folder=output_dir, processes=processes),
        progress=progress,
        data=data,
        judge=judges[0] if judges else None,
    )
    drawn = asking.draw(data, config, seed)
    rows = run.rows(drawn, cast("PreTrainedModel | None", base_model), starts)
    return processes.on_main(lambda: run.judged(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """All that came of a model, before it is judged."""

    setup: EvaluationSetup
    generations: list[GenerationRecord]
    fluency: list[FluencyRecord]
    losses: list[ExampleLoss]
    starts: list[Start]
    """Of prefills, and what is scored in place of answers."""
    relevance: list[RelevanceRow]
    fields: dict[str, Any]
    """Of the result; no judge decides them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What every step of one evaluation needs."""

    model: PreTrainedModel
    name: str
    writer: asking.Writer
    config: EvaluateConfig
    seed: int
    source: str | Path | None
    reuse: Reuse
    progress: Progress | None
    data: ForgetRetainData
    judge: Judge | None
    """In the main process."""

    def rows(self, drawn: asking.Drawn, base_model: PreTrainedModel | None, given: Sequence[Start] | None) -> _Rows:
        """All that a model is needed for, in every process."""
        requests, left_out = asking.requests(drawn, self.writer, self.config)
        probes = probes_of(requests)
        stop_ids = stop_token_ids(self.model, self.writer.tokenizer, self.writer.end_of_turn())
        replies = self._replies()
        decoding = replies.decoding(stop_ids)
        starts: list[Start] = []
        scorer = self.model if base_model is None else base_model
        fluency = _Fluency(run=self, scorer=scorer)

        def prefills(free: Sequence[GenerationRecord]) -> list[GenerationRequest]:
            if not self.config.prefill_tokens:
                return []
            asked = [request for request in requests if request.split in HARMFUL_SPLITS]
            starts.extend(self._starts(asked, free, fluency, base_model, given, stop_ids))
            forced, too_long = asking.prefills(
                drawn.harmful(), self.config.prefill_tokens, by_id(starts), self.writer, self.config.max_new_tokens
            )
            left_out.update(too_long)
            return forced

        with batching.evaluation_mode(self.model):
            about = {
                "name": self.name,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "fingerprint": fingerprint(self.model, probes),
            }
            utility = self._utility(about, left_out)
            header = {"model": about, "decoding": decoding}
            generations, check = replies.generate(requests, stop_ids, header, prefills)
            own = self._own_answers(requests, generations, base_model, given, stop_ids)
            texts = self._scored_texts(drawn.examples, by_id(own), left_out)
            losses = self._losses(texts, about)
            fields = utility.lm_eval()
        with batching.evaluation_mode(scorer):
            losses_of_replies = fluency.rows(probes, generations)
        fields |= {
            **utility.agreement(base_model, probes, texts),
            **utility.similarity(generations, losses_of_replies),
        }
        counts = count_sources(starts) if starts else {}
        setup = EvaluationSetup(
            model=about,
            prompt_format=self.writer.prompt_format.name,
            decoding=decoding,
            config=plain_data(self.config),
            seed=self.seed,
            fluency_scorer="self" if base_model is None else "base",
            left_out=left_out,
            backend_check=None if check is None else dataclasses.asdict(check),
            starts=counts,
            trained_on=asking.trained_on(self.data, drawn),
            notes=(
                *self.data.notes(),
                *asking.short_of_room(requests, self.writer, self.config),
                *replies.notes(check),
                *([SELF_SCORED] if base_model is None else []),
                *([starts_note(counts) if given or base_model is not None else NO_BASE] if counts else []),
                *_own_answers_notes(requests, own),
            ),
        )
        return _Rows(
            setup=setup,
            generations=generations,
            fluency=losses_of_replies,
            losses=losses,
            starts=[*starts, *own],
            relevance=utility.relevance(generations),
            fields=fields,
        )

    def judged(self, rows: _Rows) -> EvaluationResult:
        """Judges, counts, and writes what came out."""
        judge = self.judge
        assert judge is not None
        result = measure(rows.setup, rows.generations, rows.fluency, rows.losses, judge, rows.relevance)
        result = dataclasses.replace(result, starts=tuple(rows.starts), **rows.fields)
        folder = self.reuse.folder
        if folder is not None:
            write_rows(folder / OUTCOMES_FILE, {"judge": judge.card.name}, result.outcomes)
            write_result(folder, result)
        return result

    def _starts(
        self,
        asked: Sequence[GenerationRequest],
        free: Sequence[GenerationRecord],
        fluency: _Fluency,
        base: PreTrainedModel | None,
        given: Sequence[Start] | None,
        stop_ids: Sequence[int],
    ) -> list[Start]:
        """One start for each harmful prompt, kept in ``starts.jsonl``."""
        harmful = [record for record in free if record.split in HARMFUL_SPLITS]
        default = choose_starts(harmful, [])
        if given is not None or base is None:
            known = by_id(given or ())
            chosen = [known.get(start.id, start) for start in default]
            texts = header_hash({"starts": [dataclasses.asdict(start) for start in chosen]})
            return self.reuse.rows(STARTS_FILE, {"given": texts}, Start, lambda: chosen)
        judge = self.judge
        with batching.evaluation_mode(base):
            header = {
                "base": fingerprint(base, probes_of(asked)),
                "decoding": self._replies().decoding(stop_ids),
                "prompt_format": self.writer.prompt_format.name,
                "requests": header_hash({"requests": [dataclasses.asdict(request) for request in asked]}),
                "seed": self.seed,
                "judge": None if judge is None else judge.card.key,
            }

        def make() -> list[Start]:
            if base is self.model:
                replies, scored = harmful, fluency.of_free(free)
            else:
                replies = self._ask_base(base, asked, stop_ids)
                with batching.evaluation_mode(base):
                    scored = _Fluency(run=self, scorer=base).of_free(replies)
            return self.reuse.processes.on_main(lambda: self._judged_starts(replies, scored))

        return self.reuse.rows(STARTS_FILE, header, Start, make)

    def _own_answers(
        self,
        requests: Sequence[GenerationRequest],
        generations: Sequence[GenerationRecord],
        base: PreTrainedModel | None,
        given: Sequence[Start] | None,
        stop_ids: Sequence[int],
    ) -> list[Start]:
        """The base model's replies to normal prompts that have no answer, kept in ``own_answers.jsonl``.

        None where there is neither a base nor what it was asked before.
        """
        asked = [one for one in requests if one.kind == "reply" and one.split in NORMAL_SPLITS and not one.reference]
        if not asked or (given is None and base is None):
            folder = self.reuse.folder
            if folder is not None:  # Of an earlier evaluation.
                self.reuse.processes.on_main(lambda: (folder / OWN_ANSWERS_FILE).unlink(missing_ok=True))
            return []
        wanted = {request.id: start_id(request.split, request.prompt) for request in asked}
        header: dict[str, Any] = {"requests": header_hash({"requests": [*wanted]})}
        if given is not None:
            known = by_id(given)
            header["given"] = header_hash({"texts": [known[name].text for name in wanted.values() if name in known]})
        else:
            assert base is not None
            with batching.evaluation_mode(base):
                header["base"] = fingerprint(base, probes_of(asked))
            header["decoding"] = self._replies().decoding(stop_ids)

        def make() -> list[Start]:
            if given is not None:
                return [known[name] for name in wanted.values() if name in known]
            assert base is not None
            replies = generations if base is self.model else self._ask_base(base, asked, stop_ids)
            texts = {record.id: record.reply for record in replies if record.id in wanted}
            return [Start(id=wanted[name], source="own", text=texts[name]) for name in wanted]

        return self.reuse.rows(OWN_ANSWERS_FILE, header, Start, make)

    def _ask_base(
        self, base: PreTrainedModel, asked: Sequence[GenerationRequest], stop_ids: Sequence[int]
    ) -> list[GenerationRecord]:
        """The base model's replies, where its own evaluation is not at hand; none is written."""
        # vLLM would read weights from a folder that is not known here.
        backend = "generate" if self.config.backend == "vllm" else self.config.backend
        stages = dataclasses.replace(
            self._replies(),
            model=base,
            config=dataclasses.replace(self.config, backend=backend),
            source=None,
            reuse=Reuse(folder=None, processes=self.reuse.processes),
            report=lambda stage: self.report(f"base, {stage}"),
        )
        with batching.evaluation_mode(base):
            return stages.generate(asked, stop_ids, {})[0]

    def _judged_starts(self, replies: Sequence[GenerationRecord], scored: Sequence[FluencyRecord]) -> list[Start]:
        assert self.judge is not None
        outcomes = decide_outcomes(
            replies,
            self.judge,
            {record.id: record for record in scored},
            short_answer_words=self.config.short_answer_words,
        )
        return choose_starts(replies, outcomes)

    def _replies(self) -> ReplyStages:
        return ReplyStages(
            model=self.model,
            writer=self.writer,
            config=self.config,
            seed=self.seed,
            source=self.source,
            reuse=self.reuse,
            report=self.report,
        )

    def _scored_texts(
        self, drawn: Mapping[Split, Sequence[Example]], own: Starts, left_out: dict[str, int]
    ) -> list[agreement.ScoredText]:
        """The dataset's answers, or the base model's own; those without a token are added to ``left_out``."""
        texts: list[agreement.ScoredText] = []
        for split, examples in drawn.items():
            for example in examples:
                answer, with_end = example.answer, example.finished
                if not answer:
                    start = own.get(start_id(split, example.prompt))
                    if start is None:
                        continue  # Harmful prompts are only asked; of others a note says that there was no base.
                    answer, with_end = start.text, False  # It may have been cut.
                tokens = self.writer.scored(example.prompt, answer, with_end=with_end)
                if tokens is None:
                    reason = f"{split}: perplexity, as no token of the answer fits"
                    left_out[reason] = left_out.get(reason, 0) + 1
                else:
                    name = record_id(split, "reply", example.prompt)
                    texts.append(agreement.ScoredText(id=name, split=split, tokens=tokens))
        return texts

    def _losses(self, texts: Sequence[agreement.ScoredText], about: Mapping[str, str]) -> list[ExampleLoss]:
        """Losses on the dataset's own answers."""

        def score() -> list[ExampleLoss]:
            scores = score_examples(
                self.model,
                [text.tokens for text in texts],
                batch_size=self.config.batch_size,
                processes=self.reuse.processes,
                progress=self.report("perplexity"),
            )
            return [
                ExampleLoss(id=text.id, split=text.split, nll=nll, tokens=tokens)
                for text, (nll, tokens) in zip(texts, scores, strict=True)
            ]

        header = {"model": about, "texts": agreement.texts_hash(texts)}
        return self.reuse.rows(PERPLEXITY_FILE, header, ExampleLoss, score)

    def _utility(self, about: Mapping[str, str], left_out: dict[str, int]) -> UtilityStages:
        return UtilityStages(
            model=self.model,
            about=about,
            writer=self.writer,
            config=self.config,
            data=self.data,
            seed=self.seed,
            folder=self.reuse.folder,
            left_out=left_out,
            reuse_or_make=self.reuse.rows_of_main,
            processes=self.reuse.processes,
            report=self.report,
        )

    def report(self, stage: str) -> batching.Progress | None:
        """Progress of one stage."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)


class _Fluency:
    """The base model's losses on the replies that no surface rule has found degenerate already.

    Free replies are scored apart from those after a prefill: of the base model they are needed first.
    """

    def __init__(self, *, run: _Run, scorer: PreTrainedModel) -> None:
        self._run, self._scorer = run, scorer
        self._free: list[FluencyRecord] | None = None

    def of_free(self, free: Sequence[GenerationRecord]) -> list[FluencyRecord]:
        """Of all replies without a prefill, scored once."""
        if self._free is None:
            self._free = self._score(free)
        return self._free

    def rows(self, probes: Sequence[Sequence[int]], generations: Sequence[GenerationRecord]) -> list[FluencyRecord]:
        """Of all replies, or those of an earlier run."""
        free, forced = (
            [record for record in generations if (record.kind == "prefill") is part] for part in (False, True)
        )
        unclear = _unclear(generations)
        header = {
            "scorer": fingerprint(self._scorer, probes),
            "shuffles": [SHUFFLES, SURE_GAIN],
            "scored": "reply",
            "seed": self._run.seed,
            "texts": header_hash({"texts": [(entry.id, entry.forced_start, entry.reply) for entry in unclear]}),
        }
        return self._run.reuse.rows(
            FLUENCY_FILE, header, FluencyRecord, lambda: [*self.of_free(free), *self._score(forced)]
        )

    def _score(self, records: Sequence[GenerationRecord]) -> list[FluencyRecord]:
        return score_fluency(
            self._scorer,
            _unclear(records),
            self._run.writer.scored_reply,
            seed=self._run.seed,
            batch_size=self._run.config.batch_size,
            processes=self._run.reuse.processes,
            progress=self._run.report("fluency"),
        )


def _own_answers_notes(requests: Sequence[GenerationRequest], own: Sequence[Start]) -> tuple[str, ...]:
    """Whose words the perplexity and KL of prompts without answers are about."""
    splits = dict.fromkeys(one.split for one in requests if one.split in NORMAL_SPLITS and not one.reference)
    if not splits:
        return ()
    listed = ", ".join(map(answers_words, splits))
    if own:
        return (f"{listed}: there are none in the data, so the base model's own greedy replies are scored",)
    return (f"{listed}: there are none in the data, and no base model was given to write them, so none are scored",)


def _unclear(records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
    return [record for record in records if not find_faults(record, None)]
