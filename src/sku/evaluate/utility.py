"""What is left of a model's use, beside its perplexity and its replies: the stages of one evaluation.

Each stage reads its rows where an earlier run has made them from the same things, and gives fields of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.data.examples import Example, ForgetRetainData, normalise_prompt
from sku.evaluate import batching, harness
from sku.evaluate.agreement import ScoredText, agreement_of, compare_distributions, texts_hash
from sku.evaluate.asking import Writer
from sku.evaluate.generation import fingerprint
from sku.evaluate.outcomes import find_faults
from sku.evaluate.record_files import (
    AGREEMENT_FILE,
    RELEVANCE_FILE,
    SIMILARITY_FILE,
    header_hash,
)
from sku.evaluate.records import (
    NORMAL_SPLITS,
    AgreementRow,
    FluencyRecord,
    GenerationRecord,
    RelevanceRow,
    SimilarityRow,
)
from sku.evaluate.results import HarnessScores
from sku.evaluate.reuse import Reuse
from sku.evaluate.similarity import (
    Embedder,
    Score,
    answered_prompts,
    chrf,
    compare_with_references,
    cosine_score,
    load_embedder,
    rouge_l,
    score_relevance,
    similarity_of,
)
from sku.models import embedding_weight

TRAINED_SPLITS = ("forget_train", "forget_test", "retain_train", "retain_validation", "forget_validation")
"""Whose prompts are no test questions: trained on, tuned on, or meant to be refused."""


def check_settings(config: EvaluateConfig) -> None:
    """Refuses what could not be measured at the end, before hours are spent on replies.

    Args:
        config: Its models and its tasks are looked for.

    Raises:
        EvaluationError: lm-eval is missing or does not know a task.
        ModelError: The embedding model can't be loaded.
    """
    check_questions(config)
    if config.embedding_model is not None:
        load_embedder(config.embedding_model, torch.device("cpu"))


def check_questions(config: EvaluateConfig) -> None:
    """The part of ``check_settings`` that reads no weights.

    Args:
        config: Its tasks are looked for.

    Raises:
        EvaluationError: lm-eval is missing or does not know a task.
    """
    if config.lm_eval:
        harness.check_tasks(config.lm_eval, config.lm_eval_include, config.lm_eval_data)


@dataclass(frozen=True, kw_only=True)
class UtilityStages:
    """The measures of usefulness of one evaluation. A method gives fields of ``EvaluationResult``."""

    model: PreTrainedModel
    about: Mapping[str, str]
    """``name``, ``dtype`` and ``fingerprint`` of the model."""
    writer: Writer
    config: EvaluateConfig
    data: ForgetRetainData
    seed: int
    left_out: dict[str, int]
    """Of the evaluation; what these stages leave out is added."""
    reuse: Reuse
    """Only the main process does this work; the others wait for its rows."""
    report: Callable[[str], batching.Progress | None]
    """Name of a stage to its progress."""

    def agreement(
        self,
        base_model: PreTrainedModel | None,
        probes: Sequence[Sequence[int]],
        texts: Sequence[ScoredText],
    ) -> dict[str, Any]:
        """Divergence from the base on fixed text; nothing where the model is the base, or no base was given."""
        base, read = base_model, [text for text in texts if text.split in NORMAL_SPLITS]
        if base is None or base is self.model or not read:
            return {}
        with batching.evaluation_mode(self.model), batching.evaluation_mode(base):
            rows = self.reuse.rows_of_main(
                AGREEMENT_FILE,
                {"model": self.about, "base": fingerprint(base, probes), "texts": texts_hash(read)},
                AgreementRow,
                lambda: compare_distributions(
                    base, self.model, read, batch_size=self.config.batch_size, progress=self.report("agreement")
                ),
            )
        return {"agreement": agreement_of(rows, seed=self.seed)}

    def lm_eval(self) -> dict[str, Any]:
        """Tasks of lm-evaluation-harness."""
        if not self.config.lm_eval:
            return {}
        trained = frozenset(normalise_prompt(example.prompt) for example in self._trained())
        known = harness.trained_questions(self.config.lm_eval, self.config.lm_eval_data, trained)
        self._leave_out("truthfulqa: the question is in the training or validation data", known)
        skipped = trained if known else frozenset()
        return {"lm_eval": self.reuse.processes.on_main(lambda: self._harness_scores(skipped))}

    def _harness_scores(self, trained: frozenset[str]) -> HarnessScores:
        """Scores of an earlier run of the same tasks, or new ones."""
        config = self.config
        header = harness.harness_header(
            self.about, config.lm_eval, config.lm_eval_limit, config.lm_eval_include, config.lm_eval_data, trained
        )
        scores = (
            None
            if self.reuse.folder is None
            else harness.read_scores(self.reuse.folder / harness.HARNESS_FILE, header)
        )
        if scores is None:
            progress = self.report("lm_eval")
            if progress is not None:
                progress(0, len(config.lm_eval))
            scores = harness.run_tasks(
                self.model,
                self.writer.tokenizer,
                config.lm_eval,
                limit=config.lm_eval_limit,
                include=config.lm_eval_include,
                batch_size=config.batch_size,
                data=config.lm_eval_data,
                trained=trained,
            )
            if progress is not None:
                progress(len(config.lm_eval), len(config.lm_eval))
            if self.reuse.folder is not None:
                harness.write_scores(self.reuse.folder / harness.HARNESS_FILE, header, scores)
        return scores

    def similarity(self, generations: Sequence[GenerationRecord], fluency: Sequence[FluencyRecord]) -> dict[str, Any]:
        """Replies to normal prompts against the dataset's answers."""
        if not self.config.similarity:
            return {}
        fluent = {record.id: record for record in fluency}
        normal = [record for record in generations if record.split == "retain_test" and record.kind == "reply"]
        gibberish = {record.id: bool(find_faults(record, fluent.get(record.id))) for record in normal}
        answered = answered_prompts(normal, self.data.retain_test, gibberish)
        if not answered:
            return {}
        scores, models = self._scores()
        texts = [[entry.id, entry.reply, list(entry.references), entry.gibberish] for entry in answered]
        rows = self.reuse.rows_of_main(
            SIMILARITY_FILE,
            {"metrics": sorted(scores), "models": models, "texts": header_hash({"texts": texts})},
            SimilarityRow,
            lambda: compare_with_references(answered, scores),
        )
        return {"similarity": similarity_of(rows, seed=self.seed), "similarity_rows": tuple(rows)}

    def relevance(self, generations: Sequence[GenerationRecord]) -> list[RelevanceRow]:
        """Cosines of harmful prompts and replies, where an embedding model is set."""
        if self.config.embedding_model is None:
            return []
        records = [record for record in generations if record.split not in NORMAL_SPLITS]
        embedder = self._embedder
        return self.reuse.rows_of_main(
            RELEVANCE_FILE,
            {
                "model": embedder.fingerprint(),
                "texts": header_hash({"texts": [(record.id, record.prompt, record.reply) for record in records]}),
            },
            RelevanceRow,
            lambda: score_relevance(
                embedder, records, batch_size=self.config.batch_size, progress=self.report("relevance")
            ),
        )

    def _scores(self) -> tuple[dict[str, Score], dict[str, str]]:
        """The metrics that are asked for, and hashes of the models that they need."""
        scores: dict[str, Score] = {}
        models: dict[str, str] = {}
        size = self.config.batch_size
        for metric in self.config.similarity:
            if metric == "rouge_l":
                scores[metric] = rouge_l
            elif metric == "chrf":
                scores[metric] = chrf
            else:
                embedder = self._embedder
                models[metric] = embedder.fingerprint()
                scores[metric] = cosine_score(embedder, batch_size=size, progress=self.report(metric))
        return scores, models

    @cached_property
    def _embedder(self) -> Embedder:
        """Read once, for both what is on the topic and what is like the right answer."""
        assert self.config.embedding_model is not None  # EvaluateConfig sees to it
        return load_embedder(self.config.embedding_model, embedding_weight(self.model).device)

    def _trained(self) -> list[Example]:
        """Examples whose prompts a model may have been trained or tuned on."""
        splits = self.data.splits()
        tuned_on = [example for examples in self.data.normal_validation.values() for example in examples]
        return [*(example for name in TRAINED_SPLITS for example in splits.get(name, ())), *tuned_on]

    def _leave_out(self, reason: str, count: int) -> None:
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count
