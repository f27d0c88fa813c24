"""Tasks of EleutherAI's lm-evaluation-harness (package ``lm-eval``): mmlu, hellaswag, and a user's own task files.

The harness asks with its own prompts, without the run's prompt format or chat template, so its numbers are those that
other papers report for a base model. It is imported only where ``evaluate.lm_eval`` names a task.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig
from sku.data.examples import normalise_prompt
from sku.errors import EvaluationError, did_you_mean, one_line
from sku.evaluate.records import header_hash
from sku.evaluate.results import HarnessScores, TaskScores

HARNESS_FILE = "lm_eval.jsonl"
PACKAGE = "lm-eval"
SEEN = "questions_trained_on"
"""Beside a task's metrics: how many of its questions training or validation examples ask, where there are any."""
_TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    trained: frozenset[str] = frozenset(),
) -> HarnessScores:
    """Runs tasks of the harness on a model.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        config: ``lm_eval`` names tasks, groups or tags; with ``lm_eval_limit`` and ``batch_size``.
        trained: Normalised prompts that the model may have been trained on: questions among them are counted.

    Raises:
        EvaluationError: The package is missing, a task is unknown, or its data can't be had.
    """
    version, manager = harness_version(), check_tasks(config)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _as_found(tokenizer):
        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
                tasks=[Path(task).name for task in config.lm_eval],
                limit=config.lm_eval_limit,
                task_manager=manager,
                log_samples=True,
            )
        except Exception as error:  # The harness passes on what datasets, jinja and the hub raise.
            reason = one_line(error)
            raise EvaluationError(f"evaluate.lm_eval {', '.join(config.lm_eval)} can't be run: {reason}") from error
    return HarnessScores(
        harness=version,
        limit=config.lm_eval_limit,
        asked=config.lm_eval,
        tasks=_task_scores(found, trained),
        hits=_hits(found["samples"]),
    )


def check_tasks(config: EvaluateConfig) -> Any:
    """The harness's index of tasks, once it knows all that are named.

    Raises:
        EvaluationError: The package is missing, there is no such folder, or a task is unknown.
    """
    harness_version()
    return _task_manager(config.lm_eval)


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


def harness_header(about: Mapping[str, str], config: EvaluateConfig, trained: frozenset[str]) -> dict[str, Any]:
    """What decides the scores: model, tasks, number of examples, task files, version of the harness."""
    return {
        "model": dict(about),
        "tasks": list(config.lm_eval),
        "limit": config.lm_eval_limit,
        "include": [_folder_hash(folder) for folder in _folders(config.lm_eval)],
        "harness": harness_version(),
        "trained": header_hash(sorted(trained)),
    }


@functools.lru_cache(maxsize=1)
def _task_manager(tasks: tuple[str, ...]) -> Any:
    """The index of all tasks; kept, as both models of a run are asked the same and it takes seconds to read."""
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
    check_known(names, manager.all_tasks)
    return manager


def _folders(tasks: Sequence[str]) -> list[Path]:
    """Of tasks of one's own."""
    return [*dict.fromkeys(Path(task).expanduser().parent for task in tasks if "/" in task)]


def check_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a task that the harness does not have.

    Raises:
        EvaluationError: With the first unknown name and the one that comes near.
    """
    for task in tasks:
        if task not in known:
            raise EvaluationError(
                f"evaluate.lm_eval names {task}, which is no task of lm-eval {harness_version()} nor of a folder "
                f"that is named.{did_you_mean(task, known)}"
            )


def _task_scores(found: Mapping[str, Any], trained: frozenset[str]) -> dict[str, TaskScores]:
    scores: dict[str, TaskScores] = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        version = found["versions"].get(name)
        asked = {row["doc_id"]: str(row["doc"].get("question", "")) for row in found["samples"].get(name, ())}
        seen = sum(normalise_prompt(question) in trained for question in asked.values())
        scores[name] = TaskScores(
            version=None if version is None else str(version),
            shots=found["n-shot"].get(name),
            samples=values.get("sample_len"),
            metrics={
                # "acc,none" is the metric acc on answers that no filter has changed.
                key.removesuffix(",none"): float(value)
                for key, value in values.items()
                if "," in key and isinstance(value, int | float) and math.isfinite(value)
            }
            | ({SEEN: float(seen)} if seen else {}),
        )
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
    files = sorted(path for path in folder.rglob("*") if path.suffix in _TASK_FILES) if folder.is_dir() else []
    for path in files:
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
