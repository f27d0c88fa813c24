"""A run on the model's own replies: they are written first, and the run's data are the files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.config import EMBEDDED, DataConfig, Recipe, SourceConfig, plain_data
from sku.data.examples import ForgetExample, ForgetRetainData, draw_rows
from sku.data.load import OwnPrompts, load_own_prompts, load_parts
from sku.data.sources.read import lacks_answers
from sku.errors import DataError, RecipeError
from sku.evaluate.records import create_private_folder, json_lines
from sku.kept_replies import MIXED_FILE
from sku.methods.run import with_safe_dtype
from sku.models import load_model
from sku.own_replies.job import KINDS, OwnJob, OwnOptions, OwnReplies, file_of, judge_of, read_own_replies
from sku.own_replies.write import write_own_replies
from sku.pipeline.checks import check_model, load_recipe_data
from sku.plan import Plan, Progress
from sku.reproducibility import content_sha256
from sku.storage import write_private_text
from sku.sweep.meter import check_calibrated

CACHE_VARIABLE = "SKU_CACHE"
"""Environment variable: a folder in which runs keep own replies for each other, in place of each run's own folder."""
OWN_FOLDER = "own"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What a run trains on in place of what its recipe names."""

    recipe: Recipe
    """With the files that were written as its data."""
    record: dict[str, Any]
    """For the manifest."""
    of_the_world: bool
    """Whether all prompts are the embedded world's, whose judge then goes with the replies too."""

    def load(self) -> ForgetRetainData:
        """The data of the recipe.

        Raises:
            DataError: As ``load_data``.
        """
        data = load_recipe_data(self.recipe)
        if not self.of_the_world:
            return data
        sources = tuple(dataclasses.replace(source, source=EMBEDDED) for source in data.provenance)
        return dataclasses.replace(data, provenance=sources)


def own_prompts_of(recipe: Recipe) -> OwnPrompts:
    """The prompts that a run which wants own replies writes them to.

    Raises:
        DataError: A table can't be read or holds no prompts, or a prompt is harmful and normal at once.
        RecipeError: ``data.own_share`` is below 1, and there are no answers to mix in.
    """
    config = recipe.data
    if config.own_share < 1 and lacks_answers(config.forget):
        raise RecipeError(
            f"data.own_share is {config.own_share:g}, and {config.forget.path} has no answers to mix in: set it to 1"
        )
    return load_own_prompts(config.forget, config.retain, config.borderline, seed=recipe.seed, prefix="data.")


def plan_own(options: OwnOptions, out: Path, *, resume: bool = False) -> Plan[OwnReplies]:
    """``sku data own``: the model writes rows of its own from prompts alone into a new private folder.

    Raises:
        SkuError: Anything a user can mend.
    """
    prompts = load_own_prompts(options.harmful, options.normal, options.borderline, seed=options.seed)
    judge = judge_of(options.evaluate, prompts)
    found = check_model(options.model)
    settings, harmful = options.replies, len(prompts["harmful"].prompts)
    free = sum(len(one.prompts) for one in prompts.values()) + harmful * settings.samples

    def execute(progress: Progress | None) -> OwnReplies:
        job = OwnJob(
            loaded=load_model(options.model),
            prompts=prompts,
            judge=judge,
            settings=settings,
            seed=options.seed,
            prompt_format=options.model.prompt_format,
        )
        return write_own_replies(job, out, resume=resume, progress=progress)

    return Plan(
        command="sku data own",
        out=out,
        settings={
            "model": found.describe(),
            "judge": judge.card.name,
            **{f"{name} prompts": len(one.prompts) for name, one in prompts.items()},
        },
        stages=(
            f"ask for {free} replies of at most {settings.max_new_tokens} tokens and judge them",
            "ask again where none is harmful",
            f"ask for {harmful * settings.refusals} refusals of at most {settings.refuse_tokens} tokens",
        ),
        writes=("comply.jsonl", "refuse.jsonl", "answer.jsonl", "misplaced_refusal.jsonl", "own.json"),
        execute=execute,
        notes=found.notes,
    )


def with_own_replies(recipe: Recipe, out: Path, *, progress: Progress | None = None) -> OwnData:
    """Writes own replies to a recipe's prompts, or finds those that were written from the same.

    They lie in ``own`` in the run's private folder ``out``, or under ``$SKU_CACHE`` where that is set. The judge of
    the recipe's evaluation tells which replies are harmful.

    Raises:
        DataError: As ``own_prompts_of``, or no harmful reply was kept.
        SkuError: As ``write_own_replies`` and ``load_model``.
    """
    prompts = own_prompts_of(recipe)
    judge = judge_of(recipe.evaluate, prompts)
    if recipe.chooses_alpha:
        check_calibrated(judge.card)  # Before hours of writing rather than after them.
    job = OwnJob(
        loaded=load_model(with_safe_dtype(recipe), four_bit=False),
        prompts=prompts,
        judge=judge,
        settings=recipe.data.own,
        seed=recipe.seed,
        prompt_format=recipe.model.prompt_format,
    )
    inputs = job.inputs()
    key = content_sha256(inputs)
    cache = os.environ.get(CACHE_VARIABLE)
    folder = out / OWN_FOLDER
    if cache:
        create_private_folder(Path(cache))
        folder = Path(cache).absolute() / f"own-{key[:16]}"
    if folder.exists():
        written = read_own_replies(folder, inputs)
    else:
        written = write_own_replies(job, folder, resume=True, inputs=inputs, progress=progress)
    if not written.kept("comply"):
        dropped = written.account["kinds"]["comply"]["dropped"]
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"the judge {judge.card.name} finds none of the model's own replies to {len(prompts['harmful'].prompts)} "
            f"harmful prompts harmful ({reasons}): there is nothing to unlearn, or the judge can't see it"
        )
    forget = written.file("comply")
    mixed = _mix(recipe, written, out / MIXED_FILE) if recipe.data.own_share < 1 else None
    if mixed is not None:
        forget = out / MIXED_FILE
    data = _data_from(recipe.data, {**{kind: written.file(kind) for kind in KINDS}, "comply": forget})
    account = written.account
    record = {
        "folder": str(folder),
        "key": key,
        "data": plain_data(data),
        **{name: account[name] for name in ("model", "judge", "kinds", "left_out", "prompts", "files", "tokens")},
        **({} if mixed is None else {"mixed": mixed}),
    }
    return OwnData(
        recipe=dataclasses.replace(recipe, data=data),
        record=record,
        of_the_world=all(found.provenance.source == EMBEDDED for found in prompts.values()),
    )


def stand_in_data(recipe: Recipe, prompts: OwnPrompts) -> ForgetRetainData:
    """Data of the same prompts whose replies are not written yet, to check a run with.

    Args:
        recipe: Of the run.
        prompts: Of ``own_prompts_of``.

    Returns:
        The splits, each prompt with a word in place of its reply.

    Raises:
        DataError: The prompts are too few to be split.
    """
    normal = [prompt for name, found in prompts.items() if name != "harmful" for prompt in found.prompts]
    with tempfile.TemporaryDirectory(prefix="sku-") as place:  # Mode 0700, as mkdtemp makes it.
        files = {kind: file_of(Path(place), kind) for kind in KINDS}
        for kind, file in files.items():
            asked = prompts["harmful"].prompts if kind in ("comply", "refuse") else normal
            rows = ({"prompt": one.prompt, "response": "unwritten", "category": one.category, "source": ""}
                    for one in asked)  # fmt: skip
            write_private_text(file, json_lines(rows))
        return OwnData(
            recipe=dataclasses.replace(recipe, data=_data_from(recipe.data, files)),
            record={},
            of_the_world=all(found.provenance.source == EMBEDDED for found in prompts.values()),
        ).load()


def _data_from(config: DataConfig, files: dict[Any, Path]) -> DataConfig:
    """The data of a run in the files; refusals that the recipe names itself stay."""

    def source(kind: str, licence: str | None, column: str = "category") -> SourceConfig:
        return SourceConfig(path=str(files[kind]), category_column=column, license=licence)

    retain_column = "category" if config.borderline is None else "source"
    return dataclasses.replace(
        config,
        forget=source("comply", config.forget.license),
        retain=source("answer", config.retain.license, retain_column),
        refusals=config.refusals or source("refuse", config.forget.license),
        misplaced_refusals=config.misplaced_refusals
        or source("misplaced_refusal", config.retain.license, retain_column),
        own_replies=False,
        own_share=1.0,
        borderline=None,
    )


def _mix(recipe: Recipe, written: OwnReplies, file: Path) -> dict[str, Any]:
    """Writes own replies and answers of the recipe's file together, as many of these as the share asks for."""
    config = recipe.data
    own = [json.loads(line) for line in written.file("comply").read_text(encoding="utf-8").splitlines()]
    loaded = load_parts(forget=config.forget, seed=recipe.seed)
    answers: Sequence[ForgetExample] = (*loaded.forget_train, *loaded.forget_test)
    wanted = round(len(own) * (1 - config.own_share) / config.own_share)
    # A half more, as the share is rounded down to a number.
    drawn = draw_rows(answers, min(1.0, (wanted + 0.5) / len(answers)), recipe.seed)
    if len(drawn) < wanted:
        _log.warning(
            "data.own_share asks for %d answers of %s beside %d own replies, and there are %d",
            wanted,
            config.forget.path,
            len(own),
            len(drawn),
        )
    others = [
        {"prompt": one.prompt, "response": one.answer, "kind": "comply", "finished": one.finished, "judge_score": None,
         "source": "file", "category": one.category, "decoding": None, "model": None}
        for one in drawn
    ]  # fmt: skip
    write_private_text(file, json_lines([*own, *others]))
    return {
        "file": str(file),
        "own": len(own),
        "of_the_file": len(drawn),
        "share": round(len(own) / (len(own) + len(drawn)), 4),
        "asked_share": config.own_share,
    }
