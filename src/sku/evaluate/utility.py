"""What is left of a model's use, beside its perplexity and its replies: the stages of one evaluation.

Each stage reads its rows where an earlier run has made them from the same things, and gives fields of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from sku.config import EvaluateConfig, Similarity
from sku.data.examples import ForgetRetainData, normalise_prompt
from sku.evaluate import batching, harness
from sku.evaluate.agreement import ScoredText, agreement_of, compare_distributions, texts_hash
from sku.evaluate.generation import fingerprint
from sku.evaluate.outcomes import find_faults
from sku.evaluate.record_files import AGREEMENT_FILE, RELEVANCE_FILE, SIMILARITY_FILE, header_hash
from sku.evaluate.records import (
    NORMAL_SPLITS,
    AgreementRow,
    FluencyRecord,
    GenerationRecord,
    RelevanceRow,
    SimilarityRow,
)
from sku.evaluate.replies import SavedReplies
from sku.evaluate.results import HarnessScores
from sku.evaluate.similarity import (
    Embedder,
    Score,
    answered_prompts,
    chrf,
    compare_with_references,
    cosines,
    load_embedder,
    rouge_l,
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
    if config.lm_eval:
        harness.check_tasks(config)
    if config.embedding_model is not None:
        load_embedder(config.embedding_model, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class UtilityStages:
    """The measures of usefulness of one evaluation. A method gives fields of ``EvaluationResult``.

    Only the main process does this work; the others wait for its rows.
    """

    replies: SavedReplies
    """Of the evaluation, for the model, its settings and its files."""
    about: Mapping[str, str]
    """``name``, ``dtype`` and ``fingerprint`` of the model."""
    data: ForgetRetainData
    left_out: dict[str, int]
    """Of the evaluation; what these stages leave out is added."""

    @property
    def _config(self) -> EvaluateConfig:
        return self.replies.config

    def agreement(
        self, base: PreTrainedModel | None, probes: Sequence[Sequence[int]], texts: Sequence[ScoredText]
    ) -> dict[str, Any]:
        """Divergence from the base on fixed text; nothing where the model is the base, or no base was given."""
        model, read = self.replies.model, [text for text in texts if text.split in NORMAL_SPLITS]
        if base is None or base is model or not read:
            return {}
        compare = partial(
            compare_distributions, base, model, read,
            batch_size=self._config.batch_size, progress=self.replies.report("agreement"),
        )  # fmt: skip
        with batching.evaluation_mode(model), batching.evaluation_mode(base):
            rows = self.replies.reuse.rows_of_main(
                AGREEMENT_FILE,
                {"model": self.about, "base": fingerprint(base, probes), "texts": texts_hash(read)},
                AgreementRow,
                compare,
            )
        return {"agreement": agreement_of(rows, seed=self.replies.asker.seed)}

    def lm_eval(self) -> dict[str, Any]:
        """Tasks of lm-evaluation-harness."""
        if not self._config.lm_eval:
            return {}
        splits = self.data.splits()
        examples = [example for name in TRAINED_SPLITS for example in splits.get(name, ())]
        examples += [example for tuned_on in self.data.normal_validation.values() for example in tuned_on]
        trained = frozenset(normalise_prompt(example.prompt) for example in examples)
        known = harness.trained_questions(self._config, trained)
        if known:
            self.left_out["truthfulqa: the question is in the training or validation data"] = known
        skipped = trained if known else frozenset()
        return {"lm_eval": self.replies.reuse.processes.on_main(lambda: self._harness_scores(skipped))}

    def _harness_scores(self, trained: frozenset[str]) -> HarnessScores:
        """Scores of an earlier run of the same tasks, or new ones."""
        folder, config, progress = self.replies.reuse.folder, self._config, self.replies.report("lm_eval")
        header = harness.harness_header(self.about, config, trained)
        known = None if folder is None else harness.read_scores(folder / harness.HARNESS_FILE, header)
        if known is not None:
            return known
        if progress is not None:
            progress(0, len(config.lm_eval))
        scores = harness.run_tasks(self.replies.model, self.replies.asker.writer.tokenizer, config, trained)
        if progress is not None:
            progress(len(config.lm_eval), len(config.lm_eval))
        if folder is not None:
            harness.write_scores(folder / harness.HARNESS_FILE, header, scores)
        return scores

    def similarity(self, generations: Sequence[GenerationRecord], fluency: Sequence[FluencyRecord]) -> dict[str, Any]:
        """Replies to normal prompts against the dataset's answers."""
        if not self._config.similarity:
            return {}
        fluent = {record.id: record for record in fluency}
        normal = [record for record in generations if record.split == "retain_test" and record.kind == "reply"]
        gibberish = {record.id: bool(find_faults(record, fluent.get(record.id))) for record in normal}
        answered = answered_prompts(normal, self.data.retain_test, gibberish)
        if not answered:
            return {}
        scores: dict[str, Score] = {metric: self._score(metric) for metric in self._config.similarity}
        texts = [[entry.id, entry.reply, list(entry.references), entry.gibberish] for entry in answered]
        rows = self.replies.reuse.rows_of_main(
            SIMILARITY_FILE,
            {
                "metrics": sorted(scores),
                "models": {"cosine": self._embedder.fingerprint()} if "cosine" in scores else {},
                "texts": header_hash({"texts": texts}),
            },
            SimilarityRow,
            lambda: compare_with_references(answered, scores),
        )
        return {"similarity": similarity_of(rows, seed=self.replies.asker.seed), "similarity_rows": tuple(rows)}

    def relevance(self, generations: Sequence[GenerationRecord]) -> list[RelevanceRow]:
        """Cosines of harmful prompts and replies, which tell a safe answer from an evasive one.

        Nothing where no embedding model is set.
        """
        if self._config.embedding_model is None:
            return []
        records = [record for record in generations if record.split not in NORMAL_SPLITS]

        def score() -> list[RelevanceRow]:
            prompts, replies = [record.prompt for record in records], [record.reply for record in records]
            found = self._cosines("relevance")(prompts, replies)
            return [RelevanceRow(id=record.id, cosine=value) for record, value in zip(records, found, strict=True)]

        header = {
            "model": self._embedder.fingerprint(),
            "texts": header_hash({"texts": [(record.id, record.prompt, record.reply) for record in records]}),
        }
        return self.replies.reuse.rows_of_main(RELEVANCE_FILE, header, RelevanceRow, score)

    def _score(self, metric: Similarity) -> Score:
        if metric == "cosine":
            return self._cosines(metric)
        return rouge_l if metric == "rouge_l" else chrf

    def _cosines(self, stage: str) -> Score:
        size = self._config.batch_size
        return partial(cosines, self._embedder, batch_size=size, progress=self.replies.report(stage))

    @cached_property
    def _embedder(self) -> Embedder:
        """Read once, for both what is on the topic and what is like the right answer."""
        assert self._config.embedding_model is not None  # EvaluateConfig sees to it
        return load_embedder(self._config.embedding_model, embedding_weight(self.replies.model).device)
