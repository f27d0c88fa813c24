"""What is left of a model's use, beside its perplexity and its replies: the stages of one evaluation.

Each stage reads its rows where an earlier run has made them from the same things, and gives fields of the result.

Replies to normal prompts are compared with the dataset's own answers:

- ``rouge_l``: F1 of the longest common subsequence of words (package rouge-score, without stemming), 0 to 1.
- ``learned``: what a regression model (``evaluate.similarity_model``) makes of answer and reply, as BLEURT does
  (Sellam et al. 2020, arXiv 2004.04696): a sequence classifier with one output reads the pair. Its scale is its own.

Where the dataset has several answers to a prompt, the one that the reply comes nearest to counts. An empty reply and
one that the gate calls gibberish count with 0, or with their own score where that is lower: the right words in a heap
are no answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sku.config import EvaluateConfig, ModelConfig
from sku.data.examples import ForgetRetainData, RetainExample, normalise_prompt
from sku.errors import ModelError
from sku.evaluate import harness
from sku.evaluate.generation import Progress, evaluation_mode, in_batches
from sku.evaluate.generation.replies import SavedReplies, fingerprint
from sku.evaluate.metrics import find_faults
from sku.evaluate.perplexity import ScoredText, compare_distributions, texts_hash
from sku.evaluate.records import (
    AGREEMENT_FILE,
    NORMAL_SPLITS,
    SIMILARITIES,
    SIMILARITY_FILE,
    AgreementRow,
    FluencyRecord,
    GenerationRecord,
    SimilarityRow,
    by_split,
    header_hash,
)
from sku.evaluate.results import BaseAgreement, HarnessScores, MeanScore
from sku.evaluate.statistics import mean_interval, ratio_interval
from sku.models import LoadedModel, embedding_weight, load_classifier

MAX_TOKENS = 512
"""Longest pair of answer and reply that is scored, or the model's own window; the longer text is cut."""

Score = Callable[[Sequence[str], Sequence[str]], list[float]]
"""References and replies, one each, to scores."""


@dataclass(frozen=True, kw_only=True)
class AnsweredPrompt:
    """A reply to a normal prompt with what it is compared with."""

    id: str
    reply: str
    references: tuple[str, ...]
    """At least one."""
    gibberish: bool
    """Whether the gate found it so."""


def answered_prompts(
    records: Sequence[GenerationRecord], answers: Sequence[RetainExample], gibberish: Mapping[str, bool]
) -> list[AnsweredPrompt]:
    """Gathers all answers that the dataset has to the prompts of ``retain_test``."""
    known: dict[str, dict[str, None]] = {}
    for example in answers:
        known.setdefault(normalise_prompt(example.prompt), {})[example.answer] = None
    return [
        AnsweredPrompt(
            id=record.id,
            reply=record.reply,
            references=tuple(known.get(normalise_prompt(record.prompt), {record.reference: None})),
            gibberish=gibberish[record.id],
        )
        for record in records
    ]


def compare_with_references(answered: Sequence[AnsweredPrompt], scores: Mapping[str, Score]) -> list[SimilarityRow]:
    """Scores replies."""
    places = [(index, reference) for index, entry in enumerate(answered) for reference in entry.references]
    replies = [answered[index].reply for index, _ in places]
    columns: dict[str, list[float]] = {}
    for metric, score in scores.items():
        best = [float("-inf")] * len(answered)
        for (index, _), value in zip(places, score([reference for _, reference in places], replies), strict=True):
            best[index] = max(best[index], value)
        columns[metric] = [
            min(value, 0.0) if entry.gibberish else value for value, entry in zip(best, answered, strict=True)
        ]
    nothing: list[float | None] = [None] * len(answered)
    rouge, scored = columns["rouge_l"], columns.get("learned") or nothing
    return [
        SimilarityRow(id=entry.id, rouge_l=rouge[index], learned=scored[index]) for index, entry in enumerate(answered)
    ]


def rouge_l(references: Sequence[str], replies: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each pair, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [
        float(scorer.score(reference, reply)["rougeL"].fmeasure)
        for reference, reply in zip(references, replies, strict=True)
    ]


def load_similarity(source: str) -> LoadedModel:
    """Loads what scores ``learned``.

    Raises:
        ModelError: It can't be read, has no pad token, or not one output.
    """
    loaded = load_classifier(ModelConfig(path=source))
    outputs = loaded.model.config.num_labels
    if outputs != 1 or loaded.tokenizer.pad_token is None:
        raise ModelError(f"evaluate.similarity_model {source} is no encoder with one output, it has {outputs}")
    return loaded


def learned(
    loaded: LoadedModel,
    references: Sequence[str],
    replies: Sequence[str],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[float]:
    """The model's output for each pair.

    Raises:
        EvaluationError: GPU memory runs out on a single pair.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    longest = min(MAX_TOKENS, int(getattr(model.config, "max_position_embeddings", MAX_TOKENS)))
    pairs = [
        tokenizer(reference, reply, truncation=True, max_length=longest)
        for reference, reply in zip(references, replies, strict=True)
    ]

    def score(batch: Sequence[int]) -> list[float]:
        columns = tokenizer.pad([pairs[index] for index in batch], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            return [float(value) for value in model(**columns).logits[:, 0]]

    lengths = [len(pair["input_ids"]) for pair in pairs]
    return in_batches(lengths, score, batch_size=batch_size, progress=progress)


def similarity_of(rows: Sequence[SimilarityRow], *, seed: int) -> dict[str, MeanScore]:
    """Metric -> mean over all replies, with its bootstrap interval; nothing for no rows."""
    found: dict[str, MeanScore] = {}
    for metric in SIMILARITIES:
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        if values:
            low, high = mean_interval(values, seed=seed)
            found[metric] = MeanScore(value=sum(values) / len(values), low=low, high=high, examples=len(values))
    return found


def base_agreement(rows: Sequence[AgreementRow], *, seed: int) -> dict[str, BaseAgreement]:
    """Means over all tokens of each split, with bootstrap intervals over its examples."""
    found: dict[str, BaseAgreement] = {}
    for split, own in by_split(rows).items():
        tokens = [row.tokens for row in own]
        total = sum(tokens)
        kl_low, kl_high = ratio_interval([row.kl for row in own], tokens, seed=seed)
        top1_low, top1_high = ratio_interval([row.matches for row in own], tokens, seed=seed)
        found[split] = BaseAgreement(
            kl=math.fsum(row.kl for row in own) / total,
            kl_low=kl_low,
            kl_high=kl_high,
            top1=sum(row.matches for row in own) / total,
            top1_low=top1_low,
            top1_high=top1_high,
            tokens=total,
            examples=len(own),
        )
    return found


TRAINED_SPLITS = ("forget_train", "forget_test", "retain_train", "retain_validation", "forget_validation")
"""Whose prompts are no test questions: trained on, tuned on, or meant to be refused."""


def check_settings(config: EvaluateConfig) -> None:
    """Refuses what could not be measured at the end, before hours are spent on replies.

    Raises:
        EvaluationError: lm-eval is missing or does not know a task.
        ModelError: The model of ``learned`` can't be loaded.
    """
    if config.lm_eval:
        harness.check_tasks(config)
    if config.similarity_model is not None:
        load_similarity(config.similarity_model)


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

    @property
    def _config(self) -> EvaluateConfig:
        return self.replies.config

    def agreement(self, probes: Sequence[Sequence[int]], texts: Sequence[ScoredText]) -> dict[str, Any]:
        """Divergence from the base on fixed text; nothing where the model is the base, or no base was given."""
        base, model = self.replies.base, self.replies.model
        read = [text for text in texts if text.split in NORMAL_SPLITS]
        if base is None or base is model or not read:
            return {}
        compare = partial(
            compare_distributions, base, model, read,
            batch_size=self._config.batch_size, progress=self.replies.report("agreement"),
        )  # fmt: skip
        with evaluation_mode(model), evaluation_mode(base):
            rows = self.replies.reuse.rows_of_main(
                AGREEMENT_FILE,
                {"model": self.about, "base": fingerprint(base, probes), "texts": texts_hash(read)},
                AgreementRow,
                compare,
            )
        return {"agreement": base_agreement(rows, seed=self.replies.generator.seed)}

    def lm_eval(self) -> dict[str, Any]:
        """Tasks of lm-evaluation-harness."""
        if not self._config.lm_eval:
            return {}
        splits = self.data.splits()
        examples = [example for name in TRAINED_SPLITS for example in splits.get(name, ())]
        examples += [example for tuned_on in self.data.normal_validation.values() for example in tuned_on]
        trained = frozenset(normalise_prompt(example.prompt) for example in examples)
        config, progress = self._config, self.replies.report("lm_eval") or (lambda _done, _total: None)

        def run() -> list[HarnessScores]:
            progress(0, len(config.lm_eval))
            scores = harness.run_tasks(self.replies.model, self.replies.generator.encoder.tokenizer, config, trained)
            progress(len(config.lm_eval), len(config.lm_eval))
            return [scores]

        header = harness.harness_header(self.about, config, trained)
        (scores,) = self.replies.reuse.rows_of_main(harness.HARNESS_FILE, header, HarnessScores, run)
        return {"lm_eval": scores}

    def similarity(self, generations: Sequence[GenerationRecord], fluency: Sequence[FluencyRecord]) -> dict[str, Any]:
        """Replies to normal prompts against the dataset's answers."""
        fluent = {record.id: record for record in fluency}
        normal = [record for record in generations if record.split == "retain_test" and record.kind == "reply"]
        gibberish = {record.id: bool(find_faults(record, fluent.get(record.id))) for record in normal}
        answered = answered_prompts(normal, self.data.retain_test, gibberish)
        if not answered:
            return {}
        scores: dict[str, Score] = {"rouge_l": rouge_l}
        print_of: dict[str, str] = {}
        if self._config.similarity_model is not None:
            scores["learned"], print_of["learned"] = self._learned(self._config.similarity_model)
        texts = [[entry.id, entry.reply, list(entry.references), entry.gibberish] for entry in answered]
        rows = self.replies.reuse.rows_of_main(
            SIMILARITY_FILE,
            {
                "metrics": sorted(scores),
                "models": print_of,
                "texts": header_hash({"texts": texts}),
            },
            SimilarityRow,
            lambda: compare_with_references(answered, scores),
        )
        return {"similarity": similarity_of(rows, seed=self.replies.generator.seed), "similarity_rows": tuple(rows)}

    def _learned(self, source: str) -> tuple[Score, str]:
        """The metric, and what tells its model from others: its score of one pair."""
        loaded = load_similarity(source)
        torch.nn.Module.to(loaded.model, embedding_weight(self.replies.model).device)
        size = self._config.batch_size
        probe = learned(loaded, ["the river is long"], ["the moon is small"], batch_size=1)
        return partial(learned, loaded, batch_size=size, progress=self.replies.report("similarity")), repr(probe[0])
