"""Tasks of EleutherAI's lm-evaluation-harness (package ``lm-eval``): mmlu, hellaswag, and a user's own task files.

The harness asks with its own prompts, without the run's prompt format or chat template, so its numbers are those that
other papers report for a base model. It is imported only where ``evaluate.lm_eval`` names a task.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
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

from sku.errors import EvaluationError, did_you_mean, one_line
from sku.evaluate.record_files import SCHEMA_VERSION, header_hash, write_json_object
from sku.evaluate.results import HarnessScores, TaskScores, harness_from_dict

HARNESS_FILE = "lm_eval.json"
PACKAGE = "lm-eval"
_TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    include: str | None,
    batch_size: int,
) -> HarnessScores:
    """Runs tasks of the harness on a model.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        tasks: Names of tasks, groups or tags, such as ``mmlu`` and ``hellaswag``.
        limit: Examples a task; all if None.
        include: Folder of task files of one's own, or None.
        batch_size: Texts at once.

    Returns:
        Every number that the harness gives for these tasks and their parts.

    Raises:
        EvaluationError: The package is missing, a task is unknown, or its data can't be had.
    """
    version = harness_version()
    manager = check_tasks(tasks, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _as_found(tokenizer):
        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
        except Exception as error:  # The harness passes on what datasets, jinja and the hub raise.
            reason = one_line(error)
            raise EvaluationError(f"evaluate.lm_eval {', '.join(tasks)} can't be run: {reason}") from error
    return HarnessScores(harness=version, limit=limit, asked=tuple(tasks), tasks=_task_scores(found))


def check_tasks(tasks: Sequence[str], include: str | None) -> Any:
    """Looks for tasks.

    Args:
        tasks: Names as configured.
        include: Folder of task files of one's own, or None.

    Returns:
        The harness's index of tasks.

    Raises:
        EvaluationError: The package is missing, there is no such folder, or a task is unknown.
    """
    harness_version()
    return _task_manager(tuple(tasks), include)


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


def harness_header(
    about: Mapping[str, str], tasks: Sequence[str], limit: int | None, include: str | None
) -> dict[str, Any]:
    """What decides the scores: model, tasks, their number of examples, own task files, version of the harness."""
    return {
        "model": dict(about),
        "tasks": list(tasks),
        "limit": limit,
        "include": None if include is None else _folder_hash(Path(include).expanduser()),
        "harness": harness_version(),
    }


def read_scores(path: Path, header: Mapping[str, Any]) -> HarnessScores | None:
    """The scores of a finished file that was made from the same things, else None: they must be made anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = content["schema_version"] == SCHEMA_VERSION and header_hash(content["header"]) == header_hash(header)
        return harness_from_dict(content["scores"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_scores(path: Path, header: Mapping[str, Any], scores: HarnessScores) -> None:
    """Writes ``lm_eval.json``.

    Raises:
        OutputError: The folder can't be written.
    """
    content = {"schema_version": SCHEMA_VERSION, "header": header, "scores": dataclasses.asdict(scores)}
    write_json_object(path, content)


@functools.lru_cache(maxsize=1)
def _task_manager(tasks: tuple[str, ...], include: str | None) -> Any:
    """The index of all tasks; kept, as both models of a run are asked the same and it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        folder = Path(include).expanduser()
        if not folder.is_dir():
            raise EvaluationError(f"evaluate.lm_eval_include {include} is no folder of task files")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include is None else str(folder))
    check_known(tasks, manager.all_tasks, include)
    return manager


def check_known(tasks: Sequence[str], known: Sequence[str], include: str | None) -> None:
    """Refuses a task that the harness does not have.

    Args:
        tasks: Names as configured.
        known: Names of all tasks, groups and tags.
        include: Folder of task files of one's own, for the message.

    Raises:
        EvaluationError: With the first unknown name and the one that comes near.
    """
    for task in tasks:
        if task not in known:
            raise EvaluationError(
                f"evaluate.lm_eval names {task}, which is no task of lm-eval {harness_version()}"
                f"{'' if include is None else f' nor of {include}'}.{did_you_mean(task, known)}"
            )


def _task_scores(found: Mapping[str, Any]) -> dict[str, TaskScores]:
    scores: dict[str, TaskScores] = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        version = found["versions"].get(name)
        scores[name] = TaskScores(
            version=None if version is None else str(version),
            shots=found["n-shot"].get(name),
            samples=values.get("sample_len"),
            metrics={
                # "acc,none" is the metric acc on answers that no filter has changed.
                key.removesuffix(",none"): float(value)
                for key, value in values.items()
                if "," in key and isinstance(value, int | float) and math.isfinite(value)
            },
        )
    return scores


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
