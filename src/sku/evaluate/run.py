"""Evaluation of one model: ask, write down, judge, count.

``generations.jsonl``, ``fluency.jsonl`` and ``perplexity.jsonl`` hold all that a model was needed for; the rest is
computed from these rows (``measure``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, PromptFormatName, plain_data
from sku.data.examples import Example, ForgetRetainData
from sku.data.read import is_embedded
from sku.evaluate import records, utility
from sku.evaluate.generation import StageProgress, evaluation_mode, prompts, stage
from sku.evaluate.generation.decoding import GenerationRequest
from sku.evaluate.generation.prompts import PrefillSources, by_id, keys_of, prefills, starts_note
from sku.evaluate.generation.replies import (
    ReplyGenerator,
    SavedReplies,
    about,
    answers_notes,
    fingerprint,
    probes_of,
)
from sku.evaluate.judges import Judge, cached
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.metrics import passes_surface_checks
from sku.evaluate.perplexity import SHUFFLES, SURE_GAIN, SURE_LOSS, ScoredText, score_examples, texts_hash
from sku.evaluate.records import ExampleLoss, FluencyRecord, GenerationRecord, PrefillSource, ResultCache, Split
from sku.evaluate.results import EvaluationResult, EvaluationSetup, measure
from sku.processes import current_processes

NO_ENGLISH = "prefill, affirmative start, as the embedded model knows no English"


def evaluate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: ForgetRetainData, *,
    base_model: PreTrainedModel | PeftModel, config: EvaluateConfig | None = None, judge: Judge | None = None,
    prompt_format: PromptFormatName = "auto", output_dir: Path | None = None,
    model_name: str | None = None, starts: Sequence[PrefillSource] | None = None,
    trained_prefill_tokens: int | None = None, seed: int = 0, progress: StageProgress | None = None,
) -> EvaluationResult:  # fmt: skip
    """Measures what a model answers to harmful and to normal prompts, and the perplexity of fixed answers.

    Under ``accelerate launch`` or ``torchrun`` every process must call this with the same arguments: they share the
    batches, the first one judges and writes, and all return the same result.

    Args:
        model: The model. Its dropout is switched off for the time of the evaluation; it is not changed.
        tokenizer: Of the model.
        data: The splits ``forget_train`` (its ``visited`` examples where they are known), ``forget_test`` and
            ``retain_test`` are measured, and the sets of other sources (``normal``, ``harmful``).
        base_model: The original model, or the model itself where that is the original: asked whether replies are word
            salad, and where no ``starts`` are given for the harmful replies that prefills begin with. Its tokenizer
            must be the same.
        config: Numbers of prompts, lengths, judge; the defaults of ``EvaluateConfig`` if None.
        judge: Any judge, in place of the one that the config names.
        prompt_format: As in training.
        output_dir: Folder for the rows and ``evaluation.json``, made with mode 0700. Rows that are already there and
            were made by the same model from the same prompts are reused, those of an interrupted run too. Nothing is
            written if None.
        model_name: Recorded; ``name_or_path`` of its configuration if None.
        starts: What prefills begin with: ``starts`` of the base model's result, so that both are asked the same
            without asking the base again.
        trained_prefill_tokens: Recorded: the longest harmful beginning that training put before a refusal, 0 for none.
        seed: Decides which prompts are drawn, and the sampled replies.
        progress: Called after each batch, of ``replies``, ``samples``, ``prefill``, ``perplexity``, ``lm_eval``,
            ``fluency``, ``agreement``, ``similarity``, ``judge``; ``base, replies`` and the like where the base model
            is asked first.

    Returns:
        The result, with its rows.

    Raises:
        DataError: The XSTest file can't be read.
        EvaluationError: Nothing to measure, a judge that does not fit, an unknown task, non-finite losses, too little
            GPU memory, or another process that fails.
        ModelError: The model that measures similarity can't be loaded, or the prompt format doesn't fit the tokenizer.
        OutputError: The folder can't be written.
    """
    config = EvaluateConfig() if config is None else config
    processes = current_processes()
    judges: list[Judge] = []  # In the main process alone: a judge may be a large model.
    processes.run_on_rank0(lambda: judges.append(choose_judge(config, data) if judge is None else judge))
    processes.run_on_rank0(lambda: utility.check_settings(config))
    if output_dir is not None:
        processes.run_on_rank0(lambda: records.create_private_folder(output_dir))
    judges = [cached(found, output_dir, stage(progress, "judge")) for found in judges]
    asked = cast(PreTrainedModel, model)
    encoder = prompts.PromptEncoder.of(asked, tokenizer, prompt_format)
    generator = ReplyGenerator(
        base=cast(PreTrainedModel, base_model), encoder=encoder, config=config, stop_ids=encoder.stop_ids(asked),
        judge=judges[0] if judges else None, seed=seed, processes=processes,
    )  # fmt: skip
    replies = SavedReplies(
        generator=generator, model=asked, report=partial(stage, progress),
        given=starts, reuse=ResultCache(folder=output_dir, processes=processes),
    )  # fmt: skip
    name = model_name or str(getattr(asked.config, "name_or_path", "") or "unnamed")
    run = _Run(name=name, replies=replies, data=data, trained_prefill_tokens=trained_prefill_tokens)
    return processes.run_on_rank0(run.asked(prompts.draw(data, config, seed)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What every step of one evaluation needs."""

    name: str
    replies: SavedReplies
    data: ForgetRetainData
    trained_prefill_tokens: int | None

    def asked(self, drawn: prompts.Drawn) -> Callable[[], EvaluationResult]:
        """All that a model is needed for, in every process; what it gives judges that, in the main one."""
        generator, replies, config = self.replies.generator, self.replies, self.replies.generator.config
        requests, left_out = prompts.requests(drawn, generator.encoder, config)
        probes = probes_of(requests)
        keys = keys_of(config, english=not is_embedded(self.data))
        if keys != keys_of(config):
            left_out[NO_ENGLISH] = len(drawn.harmful())
        starts: list[PrefillSource] = []
        scored: list[FluencyRecord] = []

        def free_fluency(free: Sequence[GenerationRecord]) -> list[FluencyRecord]:
            # Of the base model itself needed twice, and scored once.
            if not scored:
                scored.extend(generator.fluency(free, replies.report("fluency")))
            return scored

        own_lengths = [int(key) for key in keys if key.isdigit()]

        def begun(free: Sequence[GenerationRecord]) -> list[GenerationRequest]:
            if own_lengths:
                starts.extend(replies.starts(requests, free, free_fluency))
            prefilled, not_asked = prefills(
                drawn.harmful(), keys, by_id(starts), generator.encoder, config.max_new_tokens
            )
            left_out.update(not_asked)
            return prefilled

        with evaluation_mode(self.replies.model):
            model = {"name": self.name, **about(self.replies.model, probes)}
            header = {"model": model, "decoding": replies.decoding()}
            generations = replies.generate(requests, header, begun)
            own = replies.answers(requests, generations)
            texts = self._scored_texts(drawn.examples, by_id(own), left_out)
            losses = self._losses(texts, model)
            fields = utility.lm_eval(replies, model)
        fluency = self._fluency(probes, generations, free_fluency)
        fields |= utility.agreement(replies, model, probes, texts)
        fields |= utility.similarity(replies, self.data, generations, fluency)
        counts = {"asked": len(drawn.harmful()), "own": len(starts)} if own_lengths else {}
        setup = EvaluationSetup(
            model=model, prompt_format=generator.encoder.prompt_format.name, decoding=replies.decoding(),
            config=plain_data(config), seed=generator.seed, left_out=left_out,
            starts=counts, trained_on=prompts.trained_on(self.data, drawn),
            trained_prefill_tokens=self.trained_prefill_tokens,
            notes=(
                *self.data.notes(), *prompts.short_of_room(requests, generator.encoder, config),
                *(self._starts_notes(counts, max(own_lengths)) if own_lengths else []), *answers_notes(requests),
            ),
        )  # fmt: skip
        fields["starts"] = (*starts, *own)
        return partial(self._judged, partial(measure, setup, generations, fluency, losses), fields)

    def _judged(self, measured: Callable[[Judge], EvaluationResult], fields: Mapping[str, Any]) -> EvaluationResult:
        """Judges, counts, and writes what came out; no judge decides ``fields`` of the result."""
        judge = self.replies.generator.judge
        assert judge is not None
        result = dataclasses.replace(measured(judge), **fields)
        folder = self.replies.reuse.folder
        if folder is not None:
            records.write_rows(folder / records.OUTCOMES_FILE, {"judge": judge.card.name}, result.outcomes)
            result.write(folder)
        return result

    def _starts_notes(self, counts: Mapping[str, int], longest: int) -> list[str]:
        """How many prompts have a start of the base model's own, and whether its replies are long enough."""
        config = self.replies.generator.config
        notes = [starts_note(**counts, others="the others are not asked so")]
        if longest >= config.max_new_tokens:
            notes.append(
                f"the base model's replies end after evaluate.max_new_tokens={config.max_new_tokens}: none is long "
                f"enough for a prefill of {longest} tokens"
            )
        return notes

    def _fluency(
        self,
        probes: Sequence[Sequence[int]],
        generations: Sequence[GenerationRecord],
        free_fluency: Callable[[Sequence[GenerationRecord]], list[FluencyRecord]],
    ) -> list[FluencyRecord]:
        """The base model's losses on all replies, those without a prefill scored apart: they may be known already."""
        generator = self.replies.generator
        free, prefilled = ([row for row in generations if (row.kind == "prefill") is part] for part in (False, True))
        texts = [(entry.id, entry.prefill, entry.reply) for entry in passes_surface_checks(generations)]
        header = {
            "scorer": fingerprint(generator.base, probes), "shuffles": [SHUFFLES, SURE_GAIN, SURE_LOSS],
            "scored": "reply", "seed": generator.seed, "texts": records.header_hash({"texts": texts}),
        }  # fmt: skip
        return self.replies.reuse.rows(
            records.FLUENCY_FILE,
            header,
            FluencyRecord,
            lambda: [*free_fluency(free), *generator.fluency(prefilled, self.replies.report("fluency"))],
        )

    def _scored_texts(
        self, drawn: Mapping[Split, Sequence[Example]], own: PrefillSources, left_out: dict[str, int]
    ) -> list[ScoredText]:
        """The dataset's answers, or the base model's own; those without a token are added to ``left_out``."""
        texts: list[ScoredText] = []
        for split, examples in drawn.items():
            for example in examples:
                answer, with_end = example.answer, example.finished
                if not answer:
                    start = own.get(records.start_id(split, example.prompt))
                    if start is None:
                        continue  # Harmful prompts are only asked.
                    answer, with_end = start.text, False  # It may have been cut.
                tokens = self.replies.generator.encoder.scored(example.prompt, answer, with_end=with_end)
                if tokens is None:
                    reason = f"{split}: perplexity, as no token of the answer fits"
                    left_out[reason] = left_out.get(reason, 0) + 1
                else:
                    name = records.record_id(split, "reply", example.prompt)
                    texts.append(ScoredText(id=name, split=split, tokens=tokens))
        return texts

    def _losses(self, texts: Sequence[ScoredText], about: Mapping[str, str]) -> list[ExampleLoss]:
        """Losses on the dataset's own answers."""
        generator = self.replies.generator

        def score() -> list[ExampleLoss]:
            scores = score_examples(
                self.replies.model, [text.tokens for text in texts], batch_size=generator.config.batch_size,
                processes=generator.processes, progress=self.replies.report("perplexity"),
            )  # fmt: skip
            return [
                ExampleLoss(id=text.id, split=text.split, nll=nll, tokens=tokens)
                for text, (nll, tokens) in zip(texts, scores, strict=True)
            ]

        header = {"model": about, "texts": texts_hash(texts)}
        return self.replies.reuse.rows(records.PERPLEXITY_FILE, header, ExampleLoss, score)
