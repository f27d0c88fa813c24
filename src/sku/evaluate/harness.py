"""Tasks of EleutherAI's lm-evaluation-harness (package ``lm-eval``): mmlu, hellaswag, and a user's own task files.

The harness asks with its own prompts, without the run's prompt format or chat template, so its numbers are those that
other papers report for a base model. It is imported only where ``evaluate.lm_eval`` names a task.

``tasks/*.yaml`` are tasks of the package, multiple choice on JSON Lines files in the folder ``evaluate.lm_eval_data``,
so that nothing is downloaded: ``sku_arc_easy`` and others, all of them by the tag ``sku_utility``, and the harness's
own TruthfulQA (tag ``sku_truthfulqa``), without the questions that were trained on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig
from sku.data.examples import normalise_prompt
from sku.errors import EvaluationError, did_you_mean, one_line
from sku.evaluate.record_files import header_hash
from sku.evaluate.results import HarnessScores, TaskScores

HARNESS_FILE = "lm_eval.jsonl"
PACKAGE = "lm-eval"
PREFIX = "sku_"
"""What names and tags of the package's tasks begin with."""
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
        config: ``lm_eval`` names tasks, groups or tags, such as ``mmlu`` and ``hellaswag``; with ``lm_eval_limit``,
            ``lm_eval_include``, ``lm_eval_data`` and ``batch_size``.
        trained: Prompts, normalised, whose questions are not asked: the model may have been trained on them.

    Returns:
        Every number that the harness gives for these tasks and their parts, and which examples were right.

    Raises:
        EvaluationError: The package is missing, a task is unknown, or its data can't be had.
    """
    version = harness_version()
    manager = check_tasks(config, trained)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _as_found(tokenizer):
        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
                tasks=list(config.lm_eval),
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
        tasks=_task_scores(found),
        hits=_hits(found["samples"]),
    )


def check_tasks(config: EvaluateConfig, trained: frozenset[str] = frozenset()) -> Any:
    """Looks for tasks; arguments as those of ``run_tasks``.

    Returns:
        The harness's index of tasks.

    Raises:
        EvaluationError: The package is missing, there is no such folder or file, or a task is unknown.
    """
    harness_version()
    _data_files(config)
    return _task_manager(config.lm_eval, config.lm_eval_include, config.lm_eval_data, trained)


def _data_files(config: EvaluateConfig) -> list[Path]:
    """The files that the package's tasks among those of a configuration read.

    Raises:
        EvaluationError: There is no such task, no folder is named, or a file is not in it.
    """
    tasks, data = config.lm_eval, config.lm_eval_data
    own = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in _package_tasks()]
    wanted = [content for content in own if {content["task"], content["tag"]} & set(tasks)]
    if wanted and data is None:
        raise EvaluationError(
            f"evaluate.lm_eval names {', '.join(name for name in tasks if name.startswith(PREFIX))}, which read JSON "
            "Lines files: name their folder with evaluate.lm_eval_data"
        )
    names = dict.fromkeys(name for content in wanted for name in content["dataset_kwargs"]["data_files"].values())
    files = [Path(str(data)).expanduser() / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise EvaluationError(
            f"evaluate.lm_eval_data {data} has no {', '.join(missing)}: name another folder, or only tasks whose file "
            f"is there, such as {PREFIX}arc_easy"
        )
    return files


def trained_questions(config: EvaluateConfig, trained: frozenset[str]) -> int:
    """How many questions of the files that tasks read are among some normalised prompts."""
    return sum(len(lines) - len(_untrained(lines, trained)) for lines in map(_lines, _data_files(config)))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _untrained(lines: Sequence[str], trained: frozenset[str]) -> list[str]:
    """Rows without those whose ``question``, as TruthfulQA's have it, was trained on."""
    try:
        return [line for line in lines if normalise_prompt(str(json.loads(line).get("question", ""))) not in trained]
    except (ValueError, AttributeError) as error:
        raise EvaluationError(f"a file of evaluate.lm_eval_data is not JSON Lines: {one_line(error)}") from None


def _package_tasks() -> list[Path]:
    return sorted(Path(str(resources.files("sku.evaluate") / "tasks")).glob("*.yaml"))


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
    """What decides the scores: model, tasks, number of examples, task files and their data, version of the harness."""
    files = [*_package_tasks(), *read] if (read := _data_files(config)) else []
    include = config.lm_eval_include
    return {
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "model": dict(about),
        "tasks": list(config.lm_eval),
        "limit": config.lm_eval_limit,
        "include": None if include is None else _folder_hash(Path(include).expanduser()),
        "harness": harness_version(),
        **({"trained": header_hash({"prompts": sorted(trained)})} if trained else {}),
    }


@functools.cache
def _filled(data: str, trained: frozenset[str]) -> tempfile.TemporaryDirectory[str]:
    """The package's task files, each with the place of its data; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="sku-tasks-")
    for path in _package_tasks():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        ((split, name),) = content["dataset_kwargs"]["data_files"].items()
        file = (Path(data).expanduser() / name).resolve()
        if trained and file.is_file():
            kept = Path(folder.name) / name
            kept.write_text("".join(_untrained(_lines(file), trained)), encoding="utf-8")
            file = kept
        content["dataset_kwargs"]["data_files"] = {split: str(file)}
        if "include" in content:
            content["include"] = str(resources.files("lm_eval") / "tasks" / content["include"])
        (Path(folder.name) / path.name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder


@functools.lru_cache(maxsize=1)
def _task_manager(tasks: tuple[str, ...], include: str | None, data: str | None, trained: frozenset[str]) -> Any:
    """The index of all tasks; kept, as both models of a run are asked the same and it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    folders = [] if data is None else [_filled(data, trained).name]
    if include is not None:
        folder = Path(include).expanduser()
        if not folder.is_dir():
            raise EvaluationError(f"evaluate.lm_eval_include {include} is no folder of task files")
        folders.append(str(folder))
    if folders:
        own = TaskManager(include_path=folders, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=folders or None)
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
