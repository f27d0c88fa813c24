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
from sku.evaluate.generation import GenerationRequest, decoding_settings, generate_replies, stop_token_ids
from sku.evaluate.judges import Judge, choose_judge
from sku.evaluate.judges.cache import cached
from sku.evaluate.measure import measure
from sku.evaluate.outcomes import find_faults
from sku.evaluate.perplexity import SHUFFLES, score_examples, score_fluency
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
from sku.evaluate.sampling import record_id
from sku.evaluate.utility import Row, UtilityStages, check_settings
from sku.models import load_model

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number done and their total: ``replies``, ``perplexity``, ``truthfulqa``,
``lm_eval``, ``fluency``, ``agreement``, ``cosine``, ``bleurt``, ``relevance``."""

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
    seed: int = 0,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measures what a model answers to harmful and to normal prompts, and the perplexity of fixed answers.

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
            were made by the same model from the same prompts are reused. Nothing is written if None.
        model_name: Recorded; the name it was loaded by, or ``name_or_path`` of its configuration if None.
        seed: Decides which prompts are drawn.
        progress: Called after each batch.

    Returns:
        The result, with its rows.

    Raises:
        DataError: The TruthfulQA file can't be read.
        EvaluationError: Nothing to measure, a judge that does not fit, an unknown task, non-finite losses, or too
            little GPU memory.
        ModelError: A model can't be loaded, or the prompt format doesn't fit its tokenizer.
        OutputError: The folder can't be written.
    """
    config = EvaluateConfig() if config is None else config
    if isinstance(model, str | Path):
        loaded = load_model(model)
        model_name = loaded.name if model_name is None else model_name
        model, tokenizer = loaded.model, loaded.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise EvaluationError("a model was given without its tokenizer: give both, or the model's name")
    judge = choose_judge(config, data) if judge is None else judge
    check_settings(config)
    if output_dir is not None:
        create_private_folder(output_dir)
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
        progress=progress,
        data=data,
    )
    result = run.result(asking.draw(data, config, seed), cast("PreTrainedModel | None", base_model), judge)
    if output_dir is not None:
        write_rows(output_dir / OUTCOMES_FILE, {"judge": judge.card.name}, result.outcomes)
        write_result(output_dir, result)
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
    progress: Progress | None
    data: ForgetRetainData

    def result(self, drawn: asking.Drawn, base_model: PreTrainedModel | None, judge: Judge) -> EvaluationResult:
        requests, left_out = asking.requests(drawn, self.writer, self.config)
        probes = probes_of(requests)
        stop_ids = stop_token_ids(self.model, self.writer.tokenizer, self.writer.end_of_turn())
        decoding = decoding_settings(stop_ids, self.config.max_new_tokens)
        with batching.evaluation_mode(self.model):
            about = {
                "name": self.name,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "fingerprint": fingerprint(self.model, probes),
            }
            utility = self._utility(about, left_out)
            generations = self._generate(requests, stop_ids, {"model": about, "decoding": decoding})
            texts = self._scored_texts(drawn.examples, left_out)
            losses = self._losses(texts, about)
            of_model = {**utility.truthfulqa(), **utility.lm_eval()}
        scorer = self.model if base_model is None else base_model
        with batching.evaluation_mode(scorer):
            fluency = self._fluency(scorer, probes, generations)
        notes = self.data.notes()
        setup = EvaluationSetup(
            model=about,
            prompt_format=self.writer.prompt_format.name,
            decoding=decoding,
            config=plain_data(self.config),
            seed=self.seed,
            fluency_scorer="self" if base_model is None else "base",
            left_out=left_out,
            notes=(*notes, SELF_SCORED) if base_model is None else notes,
        )
        asked = cached(judge, self.folder, self._report("judge"))
        result = measure(setup, generations, fluency, losses, asked, utility.relevance(generations))
        return dataclasses.replace(
            result,
            **of_model,
            **utility.agreement(base_model, probes, texts),
            **utility.similarity(generations, fluency),
        )

    def _generate(
        self, requests: Sequence[GenerationRequest], stop_ids: Sequence[int], header: Mapping[str, Any]
    ) -> list[GenerationRecord]:
        """Replies, or those of an earlier run that asked the same."""
        asked = header_hash({"requests": [dataclasses.asdict(request) for request in requests]})
        return self._reuse_or_make(
            GENERATIONS_FILE,
            {**header, "prompt_format": self.writer.prompt_format.name, "seed": self.seed, "requests": asked},
            GenerationRecord,
            lambda: generate_replies(
                self.model,
                self.writer.tokenizer,
                requests,
                stop_ids=stop_ids,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                progress=self._report("replies"),
            ),
        )

    def _scored_texts(
        self, drawn: Mapping[Split, Sequence[Example]], left_out: dict[str, int]
    ) -> list[agreement.ScoredText]:
        """The dataset's own answers; those without a token are added to ``left_out``."""
        texts: list[agreement.ScoredText] = []
        for split, examples in drawn.items():
            for example in examples if split not in UNANSWERED else ():
                tokens = self.writer.scored(example.prompt, example.answer)
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
                progress=self._report("perplexity"),
            )
            return [
                ExampleLoss(id=text.id, split=text.split, nll=nll, tokens=tokens)
                for text, (nll, tokens) in zip(texts, scores, strict=True)
            ]

        header = {"model": about, "texts": agreement.texts_hash(texts)}
        return self._reuse_or_make(PERPLEXITY_FILE, header, ExampleLoss, score)

    def _utility(self, about: Mapping[str, str], left_out: dict[str, int]) -> UtilityStages:
        return UtilityStages(
            model=self.model,
            about=about,
            writer=self.writer,
            config=self.config,
            data=self.data,
            seed=self.seed,
            folder=self.folder,
            left_out=left_out,
            reuse_or_make=self._reuse_or_make,
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
                progress=self._report("fluency"),
            ),
        )

    def _reuse_or_make(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        if self.folder is None:
            return make()
        rows = read_if_same(self.folder / file, header, row_type)
        if rows is None:
            rows = make()
            write_rows(self.folder / file, header, rows)
        return rows

    def _report(self, stage: str) -> batching.Progress | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)
