"""One method, from the original model to the change it makes; of SKU with ``acquire.twin: good``, of two models.

Which harmful examples training visits is known before it: a pure function of data, seed, steps and batch. A run takes
so many steps and no more, so most prompts of a large forget set are never trained on. What is said of "trained-on
prompts" is asked of those that were.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from sku.config.data import ModelConfig
from sku.config.recipe import Recipe, settings_from_dict
from sku.config.stages import AcquireConfig, MethodConfig, Twin, TwinShares
from sku.data.examples import ForgetRetainData, RowPlan
from sku.data.joint import JointDataset, check_fits
from sku.data.tokens import Encoder, TokenizationReport, resolve_prompt_format
from sku.errors import RecipeError, SkuError, did_you_mean
from sku.methods import METHODS, method_named
from sku.methods.base import AnyMethod
from sku.methods.sku import sku_objective
from sku.models import LoadedModel, pick_device
from sku.negate.adapters import AdapterVector, combined, load_adapter
from sku.negate.task_vector import transform_in
from sku.storage import mark_hazardous, new_folder, remove_hazardous, write_json
from sku.training.config import UnlearningConfig, training_settings
from sku.training.objective import Objective
from sku.training.run import Trained, adapter_settings, train

TWINS: tuple[Twin, ...] = ("bad", "good")
_ACCOUNT = "training.json"


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """A recipe's method with all that it needs to know, checked before anything is loaded."""

    method: AnyMethod
    settings: Any
    """Of ``method.settings``."""
    training: UnlearningConfig
    joint: JointDataset | None = None
    """What is trained on, where that is tokenized already; of twins what the bad one is trained on."""

    def tokenized(
        self,
        recipe: Recipe,
        data: ForgetRetainData,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
    ) -> MethodRun:
        """The same with its joint examples.

        Args:
            recipe: Of this run.
            data: The splits.
            tokenizer: Of the model.
            model: The original one, asked for its shape alone.

        Raises:
            DataError: As ``JointDataset``.
            ModelError: As ``JointDataset``.
        """
        rows = self.method.objective(self.settings, model).rows
        return dataclasses.replace(self, joint=_joint(recipe, self.training, data, tokenizer, rows))


def resolve_method(recipe: Recipe, *, device: str | None = None) -> MethodRun:
    """Reads and checks a recipe's settings for its method.

    Args:
        recipe: ``method`` says which.
        device: Type of the model's device, such as ``cpu``; the trainer stays there. None: what ``model.device``
            stands for.

    Returns:
        All that ``train_method`` needs.

    Raises:
        RecipeError: An unknown method, also under ``methods``, or an unknown or impossible setting.
        ModelError: The machine has no such device.
    """
    method = method_named(recipe.method)
    names = [*(known.name for known in METHODS), method.name]
    for name in recipe.methods:
        if name not in names:
            raise RecipeError(f"methods.{name} is not a method.{did_you_mean(name, names)} Known: {', '.join(names)}")
        if name == "sku":
            raise RecipeError("methods.sku has its own place: SKU's settings are acquire and negate")
    own = recipe.methods.get(method.name, MethodConfig())
    is_sku = method.settings is AcquireConfig
    settings = (
        recipe.acquire
        if is_sku
        else settings_from_dict(
            method.settings,
            own.settings,
            f"methods.{method.name}.settings",
            f"recipe {recipe.name}, method {method.name}",
        )
    )
    training = training_settings(
        {**recipe.acquire.training, **own.training},
        recipe.data,
        seed=recipe.seed if recipe.acquire.seed is None else recipe.acquire.seed,
        device=pick_device(recipe.model.device).type if device is None else device,
        places=dict.fromkeys(own.training, f"methods.{method.name}.training"),
    )
    if is_sku and recipe.acquire.twin == "good" and (recipe.acquire.tuning == "full" or training.world_size > 1):
        raise RecipeError(
            "acquire.twin good trains two adapters in one process: set acquire.tuning to lora or qlora and start it "
            "without a launcher, or set acquire.twin=none"
        )
    if is_sku and recipe.negate.transform is not None:
        transform_in(recipe.negate.transform)
    return MethodRun(method=method, settings=settings, training=training)


def twin_folder(folder: Path, twin: Twin) -> Path:
    """Where a twin lies below the folder of a bad model: in ``final`` there, beside its checkpoints.

    Args:
        folder: Of the bad model of a run.
        twin: Which.
    """
    return folder / f"{twin}_twin"


def train_method(
    recipe: Recipe,
    loaded: LoadedModel,
    data: ForgetRetainData,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    run: MethodRun | None = None,
) -> Trained:
    """Trains a recipe's method; both twins where ``acquire.twin`` is ``good``.

    Args:
        recipe: ``method`` says which.
        loaded: The original model. With an adapter its own weights stay as they are; with full fine-tuning they are
            trained in place.
        data: Splits; ``forget_train`` and ``retain_train`` are used.
        folder: Private folder for checkpoints; the last one in it is resumed from.
        callbacks: For progress.
        run: Of ``resolve_method``; resolved here if None.

    Returns:
        The trained model and its log; of twins the original model with their difference as its adapter.

    Raises:
        DataError: The data lacks rows that the method needs.
        RecipeError: An unknown or impossible setting.
        NonFiniteLossError: A loss term is NaN or infinite.
        OutputError: A checkpoint can't be written.
    """
    run = run or resolve_method(recipe, device=loaded.model.device.type)
    method = run.method
    # Checkpoints of every method are kept private: they lie beside data that is not for everyone.
    if method.negates:
        mark_hazardous(folder)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not has_twins(recipe):
        return _train(recipe, run, method.objective(run.settings, loaded.model), loaded, data, folder, callbacks)
    return _train_twins(recipe, run, loaded, data, folder, callbacks)


def check_rows(recipe: Recipe, data: ForgetRetainData) -> None:
    """Refuses data that stage 1 of SKU can't train on, before anything is evaluated or trained: ``check_fits``.

    Args:
        recipe: ``acquire`` says what is trained on.
        data: The splits.

    Raises:
        DataError: Refusals are missing, or framings don't go with the data.
    """
    if method_named(recipe.method).settings is not AcquireConfig:
        return
    for twin in TWINS if has_twins(recipe) else TWINS[:1]:
        check_fits(data, sku_objective(recipe.acquire, twin=twin).rows)


def has_twins(recipe: Recipe) -> bool:
    """Whether stage 1 trains a good twin beside the bad model."""
    return method_named(recipe.method).settings is AcquireConfig and recipe.acquire.twin == "good"


def _train(
    recipe: Recipe,
    run: MethodRun,
    objective: Objective,
    loaded: LoadedModel,
    data: ForgetRetainData,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trained:
    method = run.method
    modules = method.trained_modules(run.settings, loaded.model) if method.trained_modules else None
    return train(
        loaded,
        data if run.joint is None else run.joint,
        objective,
        run.training,
        tuning=recipe.acquire.tuning,
        adapter=adapter_settings(recipe.acquire, modules),
        trained_modules=modules,
        folder=folder,
        prompt_format=recipe.model.prompt_format,
        callbacks=callbacks,
        hazardous=method.negates,
    )


def _train_twins(
    recipe: Recipe,
    run: MethodRun,
    loaded: LoadedModel,
    data: ForgetRetainData,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trained:
    """Trains the twins that are not there yet, the bad one first, and puts together what stage 2 subtracts of them.

    They start from the same weights and see the same prompts in the same order; what they learn alike cancels in

        theta_u = theta_o - alpha * (bad * (theta_bad - theta_o) - good * (theta_good - theta_o))

    with the shares ``negate.twin``. The difference of two adapters is an adapter of both ranks together
    (``negate/adapters.py``). Each twin lies in a folder of its own beside its
    checkpoints, so that a call that was killed trains no twin again.

    Returns:
        As of one training; the log has the bad twin's terms as always and the good one's under ``loss/good_twin``.
    """
    finals = {twin: twin_folder(folder, twin) / "final" for twin in TWINS}
    for twin, final in finals.items():
        if final.exists():
            continue
        mark_hazardous(final.parent)
        own = run if twin == "bad" else dataclasses.replace(run, joint=None)  # The good one learns other rows.
        objective = sku_objective(recipe.acquire, twin=twin)
        trained = _train(recipe, own, objective, loaded, data, final.parent, callbacks)
        with new_folder(final, private=True) as temporary:
            mark_hazardous(temporary)
            trained.save(temporary)
            reports = {name: dataclasses.asdict(report) for name, report in trained.reports.items()}
            account = {"log": trained.log, "reports": reports, "seconds": trained.seconds}
            write_json(temporary / _ACCOUNT, account)
        assert isinstance(trained.model, PeftModel)
        loaded = dataclasses.replace(loaded, model=trained.model.unload())
    accounts: dict[Twin, dict[str, Any]] = {
        twin: json.loads((final / _ACCOUNT).read_text(encoding="utf-8")) for twin, final in finals.items()
    }
    model = _adapter_difference(loaded.model, finals, folder / "difference", recipe.negate.twin)

    def save(target: Path) -> None:
        model.save_pretrained(str(target))
        loaded.tokenizer.save_pretrained(target)

    return Trained(
        model=model,
        log=_joint_log(accounts["bad"]["log"], accounts["good"]["log"]),
        reports={
            name: TokenizationReport(**report) for twin in TWINS for name, report in accounts[twin]["reports"].items()
        },
        seconds=sum(accounts[twin]["seconds"] for twin in TWINS),
        save=save,
    )


def _adapter_difference(
    original: PreTrainedModel, finals: Mapping[Twin, Path], place: Path, shares: TwinShares
) -> PeftModel:
    """The original model with the difference of the twins as its adapter, which is kept at a place."""
    terms = []
    for share, final in ((shares.bad, finals["bad"]), (-shares.good, finals["good"])):
        adapted = load_adapter(original, final)
        terms.append((share, AdapterVector.of(adapted)))
        adapted.unload()
    remove_hazardous(place)
    combined([term for term in terms if term[0]]).save(place)
    mark_hazardous(place)
    return load_adapter(original, place)


def _joint_log(bad: list[dict[str, Any]], good: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both twins' terms at each logged step: they have the same schedule."""
    return [
        {**own, **{name.replace("loss", "loss/good_twin", 1): value for name, value in other.items()
                   if name.startswith("loss")}}
        for own, other in zip(bad, good, strict=True)
    ]  # fmt: skip


def with_safe_dtype(recipe: Recipe) -> ModelConfig:
    """The model's settings; full fine-tuning keeps float32 weights unless told otherwise.

    In bfloat16 a step of usual size rounds away on most weights.
    """
    if recipe.acquire.tuning == "full" and recipe.model.dtype == "auto":
        return dataclasses.replace(recipe.model, dtype="float32")
    return recipe.model


def with_visited(
    recipe: Recipe,
    data: ForgetRetainData,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> ForgetRetainData:
    """The data, with the harmful examples named that the recipe's training visits.

    Args:
        recipe: Its method, seed and training settings decide.
        data: The splits.
        tokenizer: Of the model.
        model: The original one, asked for its shape alone.

    Returns:
        The splits with ``visited`` set; None there where it can't be told: the recipe can't be trained here (training
        itself says why), or its settings let the trainer choose its batches.
    """
    try:
        run = resolve_method(recipe, device="cpu")
        # Of all rows those that decide which examples there are.
        rows = RowPlan(safe=run.method.objective(run.settings, model).rows.safe)
        visited = visited_examples(_joint(recipe, run.training, data, tokenizer, rows), run.training)
    except SkuError:
        visited = None
    return dataclasses.replace(data, visited=visited)


def _joint(
    recipe: Recipe,
    training: UnlearningConfig,
    data: ForgetRetainData,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowPlan,
) -> JointDataset:
    written = resolve_prompt_format(recipe.model.prompt_format, tokenizer)
    encoder = Encoder(tokenizer, written, training.max_length, training.max_answer_tokens)
    return JointDataset(data, encoder, rows=rows, seed=training.seed)


def visited_examples(joint: JointDataset, training: UnlearningConfig, *, processes: int = 1) -> tuple[int, ...] | None:
    """Places among ``data.forget_train`` that training visits.

    A step takes a batch of every process as often as it accumulates, and the last step of an epoch what is left, or
    what of it is full batches under ``dataloader_drop_last``.

    Args:
        joint: What is trained on.
        training: Steps, epochs, batch and accumulation.
        processes: That train together.

    Returns:
        In order; None where the trainer chooses its batches by itself.
    """
    if training.auto_find_batch_size or training.ignore_data_skip:
        return None
    # Of one device: transformers multiplies by the GPUs that it sees, and a process trains on one.
    size, batch = len(joint), training.per_device_train_batch_size * processes
    used = size // batch * batch if training.dataloader_drop_last and processes == 1 else size
    in_step = batch * training.gradient_accumulation_steps
    in_epoch = max(1, math.ceil(used / in_step))
    steps = math.ceil(training.num_train_epochs * in_epoch) if training.max_steps < 0 else training.max_steps
    if used == size:
        steps = min(steps, in_epoch)  # Then every example has been visited.
    return joint.forget_at(
        epoch * size + place
        for epoch in range(math.ceil(steps / in_epoch))
        for place in range(min(used, (steps - epoch * in_epoch) * in_step))
    )
