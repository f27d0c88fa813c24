"""The rows of a comparison, and their runs: one ``sku run`` a row and seed, each in a process of its own.

A comparison folder::

    comparison.json      rows in order, and the reasons of runs that failed (report/method_records.py)
    <row>--seed<k>/      run folder, without the model's weights once it is complete
    <row>--seed<k>.yaml  its recipe
    <row>--seed<k>.log   what it printed
    .lock                held by the process that writes the comparison; gone when it ends
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku.config import Recipe, TwinShares, refuse_final
from sku.config.check import content_sha256
from sku.data.load import load_data
from sku.errors import EvaluationError, OutputError, RecipeError, did_you_mean
from sku.evaluate.records import read_json_object
from sku.methods import METHODS, method_named
from sku.methods.run import resolve_method
from sku.report.method_records import Comparison, RowTitle, run_name
from sku.storage import LOCK_FILE, acquire_lock, check_place, named_disk_errors, write_text
from sku.sweep.evaluator import check_judge

RANDOM_DIRECTION = Path(__file__).parent / "negate" / "random_direction.py"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the tables."""

    name: str
    """``npo``, ``no_random_disassociation``, ``random_direction``, ..."""
    title: str
    recipe: Recipe
    """Of the first seed, with the row's method and settings."""
    control: bool = False
    """Whether the row is there to be compared with, not to be proposed."""

    def recipe_of(self, seed: int) -> Recipe:
        """Of one run: its strength is chosen.

        Harmful prompts of other sources, sampled replies, attacks and what needs its own files or models are left to
        a run without a comparison.
        """
        recipe = changed(self.recipe, seed=seed, check=False)
        own = method_named(recipe.method).name
        return dataclasses.replace(
            recipe,
            methods={name: config for name, config in recipe.methods.items() if name == own},
            negate=dataclasses.replace(recipe.negate, alpha="auto"),
            data=dataclasses.replace(recipe.data, harmful={}),
            sweep=dataclasses.replace(recipe.sweep, harm_target=None, if_none="nearest"),
            evaluate=dataclasses.replace(
                recipe.evaluate, samples=0, similarity_model=None, xstest=None, lm_eval=(), attacks=()
            ),
            keep_bad_model=False,
        )


def comparison_rows(recipe: Recipe, methods: Sequence[str] = ()) -> list[Row]:
    """The rows of ``sku compare``: every method, then the random direction.

    Args:
        recipe: ``compare`` says what is left out here.
        methods: Names, or files that define one; all where this is empty.

    Raises:
        RecipeError: An unknown method, or two of one name.
    """
    names = methods or [method.name for method in METHODS]
    found = {name: method_named(name) for name in names}
    twice = [name for name, count in Counter(method.name for method in found.values()).items() if count > 1]
    if twice:
        raise RecipeError(f"two of the methods are named {twice[0]}: give the one of the file another name")
    known = [*(method.name for method in METHODS), *(method.name for method in found.values())]
    for name in recipe.methods:
        if name not in known:
            raise RecipeError(f"methods.{name} is not a method.{did_you_mean(name, known)} Known: {', '.join(known)}")
    rows = [
        Row(name=method.name, title=method.title, recipe=dataclasses.replace(recipe, method=given))
        for given, method in found.items()
    ]
    return [*rows, _random_direction(recipe)]


def ablation_rows(recipe: Recipe, groups: Sequence[str] = ()) -> list[Row]:
    """The rows of ``sku compare --ablate``: SKU as the recipe has it, without each module, with each other setting.

    Args:
        recipe: Of SKU.
        groups: Names of ``ABLATIONS``; all where this is empty.

    Raises:
        RecipeError: An unknown group, or a recipe of another method.
    """
    if recipe.method != "sku":
        raise RecipeError(f"the recipe's method is {recipe.method}; --ablate takes SKU apart: set method sku")
    for group in groups:
        if group not in ABLATIONS:
            raise RecipeError(
                f"there is no ablation {group}.{did_you_mean(group, ABLATIONS)} Known: {', '.join(ABLATIONS)}"
            )
    rows = [Row(name="sku", title="SKU, as the recipe", recipe=recipe)]
    for group in dict.fromkeys(groups or ABLATIONS):
        rows += [Row(name=name, title=title, recipe=change(recipe)) for name, title, change in ABLATIONS[group]]
    return [*rows, _random_direction(recipe)]


def _random_direction(recipe: Recipe) -> Row:
    negate = dataclasses.replace(recipe.negate, transform=str(RANDOM_DIRECTION))
    own = dataclasses.replace(recipe, method="sku", negate=negate)
    return Row(name="random_direction", title="Random direction", recipe=own, control=True)


Change = Callable[[Recipe], Recipe]


def changed(recipe: Recipe, weights: Mapping[str, float] | None = None, **changes: Any) -> Recipe:
    """A recipe with other settings of stage 1, and other weights of its modules."""
    own = recipe.acquire
    acquire = dataclasses.replace(own, weights=dataclasses.replace(own.weights, **(weights or {})), **changes)
    return dataclasses.replace(recipe, acquire=acquire)


def _without(module: str) -> Change:
    def change(recipe: Recipe) -> Recipe:
        if module == "guided_distortion":  # The good twin learns its refusals by it.
            acquire = dataclasses.replace(recipe.acquire, twin="none")
            # In one step: shares are of twins.
            negate = dataclasses.replace(recipe.negate, twin=TwinShares())
            recipe = dataclasses.replace(recipe, acquire=acquire, negate=negate)
        return changed(recipe, {module: 0.0})

    return change


def _preservation(mode: str, cap: float | None, tokens: str) -> Change:
    def change(recipe: Recipe) -> Recipe:
        # Without its module a mode would change nothing.
        weights = {"preservation_divergence": recipe.acquire.weights.preservation_divergence or 1.0}
        return changed(recipe, weights, preservation_mode=mode, preservation_cap=cap, preservation_tokens=tokens)

    return change


def _random_answers(number: int) -> Change:
    return lambda recipe: changed(recipe, random_answers=number)


ABLATIONS: dict[str, list[tuple[str, str, Change]]] = {
    "modules": [
        ("no_guided_distortion", "without guided distortion", _without("guided_distortion")),
        ("no_random_disassociation", "without random disassociation", _without("random_disassociation")),
        ("no_preservation_divergence", "without preservation divergence", _without("preservation_divergence")),
    ],
    "preservation": [
        ("retention_answer", "retention, answer tokens", _preservation("retention", None, "answer")),
        ("retention_all", "retention, all tokens", _preservation("retention", None, "all")),
        ("divergence_capped", "divergence, capped at 1 nat", _preservation("divergence", 1.0, "answer")),
        ("divergence_uncapped", "divergence, no cap (paper)", _preservation("divergence", None, "answer")),
    ],
    "random_answers": [(f"k{number}", f"K = {number}", _random_answers(number)) for number in (1, 5, 10)],
}
"""Group -> rows: name, title, and what is changed in the recipe."""

WEIGHTS = ("unlearned", "adapter", "negated_adapter")
"""Of a run; tables need none of them."""
Tell = Callable[[str, str, str], None]
"""Called with the name of a run, what became of it (``kept``, ``complete``, ``failed``) and why it failed."""


def seeds_of(recipe: Recipe, count: int) -> range:
    """The training seeds: that of the recipe and those after it."""
    first = recipe.seed if recipe.acquire.seed is None else recipe.acquire.seed
    return range(first, first + count)


def run_comparison(rows: Sequence[Row], seeds: Sequence[int], out: Path, tell: Tell | None = None) -> Comparison:
    """Runs every row with every seed, one after the other; finished runs of an earlier call stay as they are.

    The base model is evaluated by the first run, whose evaluation the others take over. A run that fails is named in
    ``comparison.json`` with the reason, and tried again by the next call; one that was broken off is resumed.

    Args:
        rows: In the order of the tables. Others of an earlier call with the folder stay below them.
        seeds: Of the trainings.
        out: Folder of the comparison, new or of an earlier call.
        tell: Called after each run.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        RecipeError: A setting of some row is unknown or impossible, or the data has final sets: before any is run.
        OutputError: The folder can't be written, another process writes it, or it holds a run with other settings.
        SkuError: The data can't be loaded, or the judge's errors are unknown.
    """
    check_place(out)
    refuse_final(rows[0].recipe.data, "a comparison, which chooses strengths,")
    runs = [(row, seed, row.recipe_of(seed)) for seed in seeds for row in rows]
    for row, seed, recipe in runs:
        resolve_method(recipe)
        state_of(out / run_name(row.name, seed), recipe)
    first = runs[0][2]
    check_judge(first, load_data(first.data, first.seed, forget_validation=first.forget_validation))
    with _own_folder(out):
        found = _opened(out, rows, seeds)
        for row, seed, recipe in runs:
            name = run_name(row.name, seed)
            if state_of(out / name, recipe) == "complete":
                failure, state = "", "kept"
            else:
                failure = run_once(out / name, recipe)
                state = "failed" if failure else "complete"
            failed = {other: reason for other, reason in found.failed.items() if other != name}
            found = dataclasses.replace(found, failed=failed | ({name: failure} if failure else {}))
            found.write(out)
            if tell is not None:
                tell(name, state, failure)
    return found


def state_of(folder: Path, recipe: Recipe) -> Literal["none", "begun", "complete"]:
    """How far a run has come; one in which no strength will do is complete.

    Raises:
        OutputError: The folder is that of another recipe.
    """
    if not folder.exists():
        return "none"
    try:
        manifest = read_json_object(folder / "manifest.json", "remove the folder")
    except EvaluationError as error:
        raise OutputError(str(error)) from None
    if manifest.get("recipe_sha256") != content_sha256(recipe.to_dict()):
        raise OutputError(f"{folder} is a run with other settings: choose another --out, or remove it")
    return "complete" if manifest["status"] in ("complete", "no_alpha") else "begun"


def run_once(folder: Path, recipe: Recipe) -> str:
    """One ``sku run`` in a process of its own, begun or gone on with.

    Args:
        folder: Of the run, below that of the comparison.
        recipe: Of the run.

    Returns:
        Why it failed, in one line; empty where it is complete, or found no strength within the budget.

    Raises:
        OutputError: A file can't be written.
    """
    written, log = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("yaml", "log"))
    write_text(written, json.dumps(recipe.to_dict(), indent=2))  # JSON is YAML.
    others = sorted(folder.parent.glob("*--seed*/evaluation/base/evaluation.json"))
    words = [sys.executable, "-m", "sku", "run", str(written), "--out", str(folder)]
    words += ["--resume"] if folder.exists() else []
    words += ["--base-of", str(others[0].parents[2])] if others else []
    with named_disk_errors(log), log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # An interrupt must not wait for the end of a training.
            process.terminate()
            process.wait()
            raise
    if folder.exists() and state_of(folder, recipe) == "complete":
        for weights in WEIGHTS:
            shutil.rmtree(folder / weights, ignore_errors=True)
        return ""
    return _reason(code, log)


def _reason(code: int, log: Path) -> str:
    if code < 0:
        died = f"the process was ended by {signal.Signals(-code).name}"
        return f"{died}: most likely memory ran out" if -code == signal.SIGKILL else died
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"it ended with code {code}"])[-1]


def _opened(out: Path, rows: Sequence[Row], seeds: Sequence[int]) -> Comparison:
    """What is compared, with what an earlier call compared."""
    before = Comparison.read(out) if (out / Comparison.FILE).exists() else Comparison(rows=(), seeds=(), failed={})
    titles = [RowTitle(name=row.name, title=row.title, control=row.control) for row in rows]
    names = {row.name for row in rows}
    return Comparison(
        rows=(*titles, *(row for row in before.rows if row.name not in names)),
        seeds=tuple(sorted({*seeds, *before.seeds})),
        failed=before.failed,
    )


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Makes the private folder, which no other process writes before the block ends; empty it doesn't stay."""
    with named_disk_errors(out):
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = acquire_lock(out, by_file=True)
    try:
        yield
    finally:
        with suppress(OSError):  # Where there are runs, the folder stays.
            (out / LOCK_FILE).unlink()
            out.rmdir()
        os.close(lock)
