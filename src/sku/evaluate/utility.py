"""What is left of a model's use, beside its perplexity and its replies: the stages of one evaluation.

Each stage reads its rows where an earlier run has made them from the same things, and gives fields of the result. Only
the main process does this work; the others wait for its rows. Stages get the replies of the evaluation, for its model,
settings and files, and ``about``: ``name``, ``dtype`` and ``fingerprint`` of the model.

Replies to normal prompts are compared with the dataset's own answers:

- ``rouge_l``: F1 of the longest common subsequence of words (package rouge-score, without stemming), 0 to 1.
- ``learned``: what a regression model (``evaluate.similarity_model``) makes of answer and reply, as BLEURT does
  (Sellam et al. 2020, arXiv 2004.04696): a sequence classifier with one output reads the pair. Its scale is its own.

Where the dataset has several answers to a prompt, the one that the reply comes nearest to counts. An empty reply and
one that the gate calls gibberish count with 0, or with their own score where that is lower: the right words in a heap
are no answer.

Tasks are those of EleutherAI's lm-evaluation-harness (package ``lm-eval``): mmlu, hellaswag, and a user's own task
files. It asks with its own prompts, without the run's prompt format or chat template, so its numbers are those that
other papers report for a base model. It is imported only where ``evaluate.lm_eval`` names a task.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, ModelConfig
from sku.data.examples import ForgetRetainData, normalise_prompt
from sku.errors import EvaluationError, ModelError, did_you_mean, one_line
from sku.evaluate import records
from sku.evaluate.generation import Progress, evaluation_mode, in_batches
from sku.evaluate.generation.replies import SavedReplies, fingerprint
from sku.evaluate.metrics import find_faults
from sku.evaluate.perplexity import ScoredText, compare_distributions, texts_hash
from sku.evaluate.records import AgreementRow, FluencyRecord, GenerationRecord, SimilarityRow
from sku.evaluate.results import BaseAgreement, HarnessScores, MeanScore, TaskScores
from sku.evaluate.statistics import mean_interval, ratio_interval
from sku.models import LoadedModel, embedding_weight, load_classifier

MAX_TOKENS = 512
"""Longest pair of answer and reply that is scored, or the model's own window; the longer text is cut."""

Score = Callable[[Sequence[str], Sequence[str]], list[float]]
"""References and replies, one each, to scores."""


def compare_with_references(
    replies: Sequence[GenerationRecord], answers: Mapping[str, Sequence[str]], gibberish: Mapping[str, bool],
    scores: Mapping[str, Score],
) -> list[SimilarityRow]:  # fmt: skip
    """Scores replies against the answers to their prompts, at least one; ``gibberish``: whether the gate found it so.

    Both are by the reply's id.
    """
    pairs = [(row, answer) for row in replies for answer in answers[row.id]]
    columns: dict[str, dict[str, float]] = {}
    for metric, score in scores.items():
        best: dict[str, float] = {}
        values = score([answer for _, answer in pairs], [row.reply for row, _ in pairs])
        for (row, _), value in zip(pairs, values, strict=True):
            best[row.id] = max(best.get(row.id, -math.inf), value)
        columns[metric] = {name: min(value, 0.0) if gibberish[name] else value for name, value in best.items()}
    rouge, learned = columns["rouge_l"], columns.get("learned", {})
    return [SimilarityRow(id=row.id, rouge_l=rouge[row.id], learned=learned.get(row.id)) for row in replies]


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
    loaded: LoadedModel, references: Sequence[str], replies: Sequence[str], *, batch_size: int,
    progress: Progress | None = None,
) -> list[float]:  # fmt: skip
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
    for metric in ("rouge_l", "learned"):
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        if values:
            low, high = mean_interval(values, seed=seed)
            found[metric] = MeanScore(value=sum(values) / len(values), low=low, high=high, examples=len(values))
    return found


def base_agreement(rows: Sequence[AgreementRow], *, seed: int) -> dict[str, BaseAgreement]:
    """Means over all tokens of each split, with bootstrap intervals over its examples."""
    found: dict[str, BaseAgreement] = {}
    for split, own in records.by_split(rows).items():
        tokens = [row.tokens for row in own]
        total = sum(tokens)
        kl_low, kl_high = ratio_interval([row.kl for row in own], tokens, seed=seed)
        top1_low, top1_high = ratio_interval([row.matches for row in own], tokens, seed=seed)
        found[split] = BaseAgreement(
            kl=math.fsum(row.kl for row in own) / total, kl_low=kl_low, kl_high=kl_high,
            top1=sum(row.matches for row in own) / total, top1_low=top1_low, top1_high=top1_high, tokens=total,
            examples=len(own),
        )  # fmt: skip
    return found


def check_settings(config: EvaluateConfig) -> None:
    """Refuses what could not be measured at the end, before hours are spent on replies.

    Raises:
        EvaluationError: lm-eval is missing or does not know a task.
        ModelError: The model of ``learned`` can't be loaded.
    """
    if config.lm_eval:
        task_manager(config.lm_eval)
    if config.similarity_model is not None:
        load_similarity(config.similarity_model)


def agreement(
    replies: SavedReplies, about: Mapping[str, str], probes: Sequence[Sequence[int]], texts: Sequence[ScoredText]
) -> dict[str, Any]:
    """Divergence from the base on fixed text; nothing where the model is the base."""
    base, model = replies.generator.base, replies.model
    read = [text for text in texts if records.is_normal(text.split)]
    if base is model or not read:
        return {}
    compare = partial(
        compare_distributions, base, model, read,
        batch_size=replies.generator.config.batch_size, progress=replies.report("agreement"),
    )  # fmt: skip
    with evaluation_mode(model), evaluation_mode(base):
        header = {"model": about, "base": fingerprint(base, probes), "texts": texts_hash(read)}
        rows = replies.reuse.rows_of_main(records.AGREEMENT_FILE, header, AgreementRow, compare)
    return {"agreement": base_agreement(rows, seed=replies.generator.seed)}


def lm_eval(replies: SavedReplies, about: Mapping[str, str]) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness."""
    config = replies.generator.config
    if not config.lm_eval:
        return {}
    header = {
        "model": dict(about), "tasks": list(config.lm_eval), "limit": config.lm_eval_limit,
        "include": [_folder_hash(folder) for folder in _folders(config.lm_eval)],
        "harness": harness_version(),
    }  # fmt: skip

    def run() -> list[HarnessScores]:
        progress = replies.report("lm_eval") or (lambda _done, _total: None)
        progress(0, len(config.lm_eval))
        scores = run_tasks(replies.model, replies.generator.encoder.tokenizer, config)
        progress(len(config.lm_eval), len(config.lm_eval))
        return [scores]

    (scores,) = replies.reuse.rows_of_main(HARNESS_FILE, header, HarnessScores, run)
    return {"lm_eval": scores}


def similarity(
    replies: SavedReplies, data: ForgetRetainData, generations: Sequence[GenerationRecord],
    fluency: Sequence[FluencyRecord],
) -> dict[str, Any]:  # fmt: skip
    """Replies to normal prompts against the dataset's answers."""
    fluent = {record.id: record for record in fluency}
    normal = [record for record in generations if record.split == "retain_test" and record.kind == "reply"]
    gibberish = {record.id: bool(find_faults(record, fluent.get(record.id))) for record in normal}
    if not normal:
        return {}
    known = records.grouped(data.retain_test, lambda example: normalise_prompt(example.prompt))
    asked = {row.id: known[normalise_prompt(row.prompt)] for row in normal}
    answers = {name: list(dict.fromkeys(example.answer for example in found)) for name, found in asked.items()}
    scores: dict[str, Score] = {"rouge_l": rouge_l}
    print_of: dict[str, str] = {}
    if replies.generator.config.similarity_model is not None:
        scores["learned"], print_of["learned"] = _learned(replies, replies.generator.config.similarity_model)
    texts = [[row.id, row.reply, answers[row.id], gibberish[row.id]] for row in normal]
    header = {"metrics": sorted(scores), "models": print_of, "texts": records.header_hash({"texts": texts})}
    compare = partial(compare_with_references, normal, answers, gibberish, scores)
    rows = replies.reuse.rows_of_main(records.SIMILARITY_FILE, header, SimilarityRow, compare)
    return {"similarity": similarity_of(rows, seed=replies.generator.seed), "similarity_rows": tuple(rows)}


def _learned(replies: SavedReplies, source: str) -> tuple[Score, str]:
    """The metric, and what tells its model from others: its score of one pair."""
    loaded = load_similarity(source)
    torch.nn.Module.to(loaded.model, embedding_weight(replies.model).device)
    size = replies.generator.config.batch_size
    probe = learned(loaded, ["the river is long"], ["the moon is small"], batch_size=1)
    return partial(learned, loaded, batch_size=size, progress=replies.report("similarity")), repr(probe[0])


HARNESS_FILE = "lm_eval.jsonl"
PACKAGE = "lm-eval"
_TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv")


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> HarnessScores:
    """Runs tasks of the harness on a model.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        config: ``lm_eval`` names tasks, groups or tags; with ``lm_eval_limit`` and ``batch_size``.

    Raises:
        EvaluationError: The package is missing, a task is unknown, or its data can't be had.
    """
    version, manager = harness_version(), task_manager(config.lm_eval)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _as_found(tokenizer):
        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
                tasks=[Path(task).name for task in config.lm_eval],
                limit=config.lm_eval_limit, task_manager=manager, log_samples=True,
            )  # fmt: skip
        except Exception as error:  # The harness passes on what datasets, jinja and the hub raise.
            tasks = ", ".join(config.lm_eval)
            raise EvaluationError(f"evaluate.lm_eval {tasks} can't be run: {one_line(error)}") from error
    return HarnessScores(
        harness=version, limit=config.lm_eval_limit, asked=config.lm_eval, tasks=_task_scores(found),
        hits=_hits(found["samples"]),
    )  # fmt: skip


def harness_version() -> str:
    """Version of the installed harness.

    Raises:
        EvaluationError: It is not installed.
    """
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise EvaluationError(
            'evaluate.lm_eval needs the package lm-eval: pip install "sku-unlearning[lm-eval]"'
        ) from None


@lru_cache(maxsize=1)
def task_manager(tasks: tuple[str, ...]) -> Any:
    """The harness's index; kept, as both models of a run are asked the same and it takes seconds to read.

    Raises:
        EvaluationError: The package is missing, there is no such folder, or a task is unknown.
    """
    version = harness_version()
    from lm_eval.tasks import TaskManager

    folders, names = _folders(tasks), [Path(task).name for task in tasks]
    for folder in folders:
        if not folder.is_dir():
            raise EvaluationError(f"evaluate.lm_eval names a task of {folder}, which is no folder of task files")
    include = [str(folder) for folder in folders]
    if include:
        own = TaskManager(include_path=include, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=include or None)
    for name in (name for name in names if name not in manager.all_tasks):
        raise EvaluationError(
            f"evaluate.lm_eval names {name}, which is no task of lm-eval {version} nor of a folder that is "
            f"named.{did_you_mean(name, manager.all_tasks)}"
        )
    return manager


def _folders(tasks: Sequence[str]) -> list[Path]:
    """Of tasks of one's own."""
    return [*dict.fromkeys(Path(task).expanduser().parent for task in tasks if "/" in task)]


def _task_scores(found: Mapping[str, Any]) -> dict[str, TaskScores]:
    scores: dict[str, TaskScores] = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        version = found["versions"].get(name)
        # "acc,none" is the metric acc on answers that no filter has changed.
        numbers = {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, int | float) and math.isfinite(value)
        }
        scores[name] = TaskScores(
            version=None if version is None else str(version), shots=found["n-shot"].get(name),
            samples=values.get("sample_len"), metrics=numbers,
        )  # fmt: skip
    return scores


def _hits(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, str]]:
    """Task -> metric that is 0 or 1 for each example -> its digits, in the order of the examples."""
    hits: dict[str, dict[str, str]] = {}
    for task, rows in samples.items():
        # A filter gives an example once more; "none" is the answer as it was.
        plain = sorted((row for row in rows if row.get("filter", "none") == "none"), key=lambda row: row["doc_id"])
        for metric in plain[0]["metrics"] if plain else ():
            values = [row[metric] for row in plain]
            if all(isinstance(value, int | float) and value in (0, 1) for value in values):
                hits.setdefault(task, {})[metric] = "".join(str(int(value)) for value in values)
    return hits


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _TASK_FILES):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


@contextmanager
def _as_found(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Puts back what the harness sets: the seeds of three libraries, and the tokenizer's padding."""
    padding = tokenizer.padding_side, tokenizer.pad_token
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the harness seeds the global one
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            tokenizer.padding_side, tokenizer.pad_token = padding
