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
from sku.data.prompts import resolve_prompt_format
from sku.errors import EvaluationError
from sku.evaluate import agreement, asking, batching
from sku.evaluate.fingerprint import fingerprint, probes_of
from sku.evaluate.generation import stop_token_ids
from sku.evaluate.judges import Judge, choose_judge
from sku.evaluate.judges.cache import cached
from sku.evaluate.measure import measure
from sku.evaluate.outcomes import find_faults
from sku.evaluate.perplexity import SHUFFLES, score_examples, score_fluency
from sku.evaluate.processes import current_processes
from sku.evaluate.record_files import (
    FLUENCY_FILE,
    OUTCOMES_FILE,
    PERPLEXITY_FILE,
    create_private_folder,
    header_hash,
    write_rows,
)
from sku.evaluate.records import (
    UNANSWERED,
    ExampleLoss,
    FluencyRecord,
    GenerationRecord,
    RelevanceRow,
    Split,
)
from sku.evaluate.replies import ReplyStages
from sku.evaluate.results import EvaluationResult, EvaluationSetup, write_result
from sku.evaluate.reuse import Reuse
from sku.evaluate.sampling import record_id
from sku.evaluate.utility import UtilityStages, check_settings
from sku.models import load_model

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number done and their total: ``backend check``, ``replies``, ``samples``,
``perplexity``, ``truthfulqa``, ``lm_eval``, ``fluency``, ``agreement``, ``cosine``, ``bleurt``, ``relevance``,
``judge``."""

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
        data: The splits ``unlearned`` (its ``visited`` examples where they are known), ``unseen`` and ``retain_test``
            are measured; of ``benign``, where there is one, the perplexity alone.
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
        DataError: The TruthfulQA or XSTest file can't be read.
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
        source=model_source,
        reuse=Reuse(folder=output_dir, processes=processes),
        progress=progress,
        data=data,
    )
    rows = run.rows(asking.draw(data, config, seed), cast("PreTrainedModel | None", base_model))
    return processes.on_main(lambda: run.judged(rows, judges[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """All that came of a model, before it is judged."""

    setup: EvaluationSetup
    generations: list[GenerationRecord]
    fluency: list[FluencyRecord]
    losses: list[ExampleLoss]
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

    def rows(self, drawn: asking.Drawn, base_model: PreTrainedModel | None) -> _Rows:
        """All that a model is needed for, in every process."""
        requests, left_out = asking.requests(drawn, self.writer, self.config)
        probes = probes_of(requests)
        stop_ids = stop_token_ids(self.model, self.writer.tokenizer, self.writer.end_of_turn())
        replies = self._replies()
        decoding = replies.decoding(stop_ids)
        with batching.evaluation_mode(self.model):
            about = {
                "name": self.name,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "fingerprint": fingerprint(self.model, probes),
            }
            utility = self._utility(about, left_out)
            generations, check = replies.generate(requests, stop_ids, {"model": about, "decoding": decoding})
            texts = self._scored_texts(drawn.examples, left_out)
            losses = self._losses(texts, about)
            fields = {**utility.truthfulqa(), **utility.lm_eval()}
        scorer = self.model if base_model is None else base_model
        with batching.evaluation_mode(scorer):
            fluency = self._fluency(scorer, probes, generations)
        fields |= {**utility.agreement(base_model, probes, texts), **utility.similarity(generations, fluency)}
        setup = EvaluationSetup(
            model=about,
            prompt_format=self.writer.prompt_format.name,
            decoding=decoding,
            config=plain_data(self.config),
            seed=self.seed,
            fluency_scorer="self" if base_model is None else "base",
            left_out=left_out,
            backend_check=None if check is None else dataclasses.asdict(check),
            trained_on=asking.trained_on(self.data, drawn),
            notes=(
                *self.data.notes(),
                *asking.short_of_room(requests, self.writer, self.config),
                *replies.notes(check),
                *([SELF_SCORED] if base_model is None else []),
            ),
        )
        return _Rows(
            setup=setup,
            generations=generations,
            fluency=fluency,
            losses=losses,
            relevance=utility.relevance(generations),
            fields=fields,
        )

    def judged(self, rows: _Rows, judge: Judge) -> EvaluationResult:
        """Judges, counts, and writes what came out."""
        asked = cached(judge, self.reuse.folder, self._report("judge"))
        result = measure(rows.setup, rows.generations, rows.fluency, rows.losses, asked, rows.relevance)
        result = dataclasses.replace(result, **rows.fields)
        folder = self.reuse.folder
        if folder is not None:
            write_rows(folder / OUTCOMES_FILE, {"judge": judge.card.name}, result.outcomes)
            write_result(folder, result)
        return result

    def _replies(self) -> ReplyStages:
        return ReplyStages(
            model=self.model,
            writer=self.writer,
            config=self.config,
            seed=self.seed,
            source=self.source,
            reuse=self.reuse,
            report=self._report,
        )

    def _scored_texts(
        self, drawn: Mapping[Split, Sequence[Example]], left_out: dict[str, int]
    ) -> list[agreement.ScoredText]:
        """The dataset's own answers; those without a token are added to ``left_out``."""
        texts: list[agreement.ScoredText] = []
        for split, examples in drawn.items():
            for example in examples if split not in UNANSWERED else ():
                tokens = self.writer.scored(example.prompt, example.answer, with_end=example.finished)
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
                progress=self._report("perplexity"),
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
            report=self._report,
        )

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
        return self.reuse.rows(
            FLUENCY_FILE,
            header,
            FluencyRecord,
            lambda: score_fluency(
                scorer,
                unclear,
                self.writer.scored,
                seed=self.seed,
                batch_size=self.config.batch_size,
                processes=self.reuse.processes,
                progress=self._report("fluency"),
            ),
        )

    def _report(self, stage: str) -> batching.Progress | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)
