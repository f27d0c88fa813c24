"""Both twins of stage 1 (``acquire.twin: good``), and what stage 2 subtracts of them.

They start from the same weights and see the same prompts in the same order; what they learn alike cancels in

    theta_u = theta_o - alpha * (bad * (theta_bad - theta_o) - good * (theta_good - theta_o))

with the shares ``negate.twin``. The difference of two adapters is an adapter of both ranks together
(``negate/adapters.py``), that of two whole models a task vector. Each twin lies in a folder of its own beside its
checkpoints, so that a call that was killed trains no twin again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from sku.config import ModelConfig, Twin, TwinShares
from sku.data.tokens import TokenizationReport
from sku.models import LoadedModel, load_model, with_path
from sku.negate.adapters import AdapterVector, combined, load_adapter
from sku.negate.task_vector import TaskVector
from sku.storage import mark_hazardous, new_folder, write_json
from sku.training.run import Trained

TWINS: tuple[Twin, ...] = ("bad", "good")
_ACCOUNT = "training.json"
TrainOne = Callable[[Twin, LoadedModel, Path], Trained[PreTrainedModel | PeftModel]]
"""Twin, original model and folder for checkpoints -> what training left."""


def twin_folder(folder: Path, twin: Twin) -> Path:
    """Where a twin lies below the folder of a bad model: in ``final`` there, beside its checkpoints.

    Args:
        folder: Of the bad model of a run.
        twin: Which.
    """
    return folder / f"{twin}_twin"


def train_twins(
    loaded: LoadedModel, config: ModelConfig, folder: Path, shares: TwinShares, train_one: TrainOne, *, four_bit: bool
) -> Trained[PeftModel | TaskVector]:
    """Trains the twins that are not there yet, the bad one first.

    Args:
        loaded: The original model.
        config: How it is loaded again, where full fine-tuning has trained it in place.
        folder: Private and marked. The twins' folders are made in it.
        shares: Of each twin in the difference.
        train_one: Trains one.
        four_bit: It is loaded quantized, as for QLoRA.

    Returns:
        As of one training, but for ``model``: the original model with the difference as its adapter, or after full
        fine-tuning the difference as a ``TaskVector``. The log has the bad twin's terms as always and the good one's
        under ``loss/good_twin``.

    Raises:
        SkuError: As ``train``, and as task vectors do.
    """
    original: LoadedModel | None = loaded
    finals = {twin: twin_folder(folder, twin) / "final" for twin in TWINS}
    for twin, final in finals.items():
        if final.exists():
            continue
        original = original or load_model(config, four_bit=four_bit)
        trained = train_one(twin, original, final.parent)
        with new_folder(final, private=True) as temporary:
            mark_hazardous(temporary)
            trained.save(temporary)
            reports = {name: dataclasses.asdict(report) for name, report in trained.reports.items()}
            account = {"log": trained.log, "reports": reports, "seconds": trained.seconds}
            write_json(temporary / _ACCOUNT, account)
        if isinstance(trained.model, PeftModel):
            original = dataclasses.replace(original, model=trained.model.unload())
        else:
            original = None
    accounts: dict[Twin, dict[str, Any]] = {
        twin: json.loads((final / _ACCOUNT).read_text(encoding="utf-8")) for twin, final in finals.items()
    }
    original = original or load_model(config, four_bit=four_bit)
    model: PeftModel | TaskVector
    if (finals["bad"] / "adapter_config.json").is_file():
        model = _adapter_difference(original, finals, folder / "difference", shares)
    else:
        model = _dense_difference(original, config, finals, shares)

    def save(target: Path) -> None:
        if isinstance(model, TaskVector):
            model.write(target)
        else:
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
    original: LoadedModel, finals: Mapping[Twin, Path], place: Path, shares: TwinShares
) -> PeftModel:
    """The original model with the difference of the twins as its adapter, which is kept at a place."""
    terms = []
    for share, final in ((shares.bad, finals["bad"]), (-shares.good, finals["good"])):
        adapted = load_adapter(original.model, final)
        terms.append((share, AdapterVector.of(adapted)))
        adapted.unload()
    combined([term for term in terms if term[0]]).save(place, overwrite=True)
    mark_hazardous(place)
    return load_adapter(original.model, place)


def _dense_difference(
    original: LoadedModel, config: ModelConfig, finals: Mapping[Twin, Path], shares: TwinShares
) -> TaskVector:
    def of(twin: Twin) -> TaskVector:
        return TaskVector.between(original.model, load_model(with_path(config, finals[twin])).model)

    return shares.bad * of("bad") - shares.good * of("good")


def _joint_log(bad: list[dict[str, Any]], good: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both twins' terms at each logged step: they have the same schedule."""
    return [
        {**own, **{name.replace("loss", "loss/good_twin", 1): value for name, value in other.items()
                   if name.startswith("loss")}}
        for own, other in zip(bad, good, strict=True)
    ]  # fmt: skip
