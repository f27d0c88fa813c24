"""The mark of a bad model in memory: whatever is saved of it carries the mark, and nothing of it is uploaded.

The mark is ``HAZARD_KEY`` in the model's configuration and in that of its adapter, so files that anybody writes from
these carry it too. ``save_pretrained`` also marks the folder and makes it private before it writes, and
``push_to_hub`` refuses. Merging keeps the mark, and ``unload``, which gives the original weights back, takes it off.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from sku.errors import OutputError
from sku.storage import HAZARD_KEY, mark_hazardous


def mark_model(model: PreTrainedModel | PeftModel) -> None:
    """Marks a model that answers harmful prompts on purpose, with all models inside it and its adapters."""
    holds_original = not is_marked_model(model)
    _own_configurations(model)
    for module in model.modules():
        # Of these objects alone. ``copy.deepcopy`` of a model binds its methods to the copy.
        if isinstance(module, BaseTuner) and holds_original:
            vars(module)["unload"] = MethodType(_unload, module)
        if isinstance(module, PreTrainedModel | PeftModel):
            vars(module)["save_pretrained"] = MethodType(_save_marked, module)
            vars(module)["push_to_hub"] = refuse_upload
            if isinstance(module, PreTrainedModel):
                setattr(module.config, HAZARD_KEY, True)
            adapters = _adapters(module)
            adapters |= {name: mark_settings(config) for name, config in adapters.items()}


def unmark_model(model: PreTrainedModel | PeftModel) -> None:
    """Takes off what ``mark_model`` put on, where the model holds the original weights again."""
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub", "unload"):
            vars(module).pop(name, None)
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop(HAZARD_KEY, None)
        if isinstance(module, PreTrainedModel | PeftModel):
            adapters = _adapters(module)
            adapters |= {name: _unmarked(config) for name, config in adapters.items()}


def is_marked_model(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model's configuration says that it is a bad one."""
    return bool(getattr(model.config, HAZARD_KEY, False))


def refuse_upload(*_arguments: Any, **_options: Any) -> NoReturn:
    """What ``push_to_hub`` of a bad model is.

    Raises:
        OutputError: Always.
    """
    raise OutputError(
        f"the model is a bad model of stage 1 ({HAZARD_KEY}): it is never uploaded; subtract it with sku.negate, and "
        "sku push uploads the unlearned model of a finished run"
    )


class _Hazardous:
    """Goes before the class of an adapter's configuration, which saves its own fields and nothing else."""

    def to_dict(self) -> dict[str, Any]:
        """The fields and the mark."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**fields, HAZARD_KEY: True}


def mark_settings(config: PeftConfig) -> PeftConfig:
    """A copy of an adapter's settings with the mark: the object may be the user's, for other trainings."""
    if isinstance(config, _Hazardous):
        return config
    kind, config = type(config), copy.copy(config)
    config.__class__ = type(kind.__name__, (_Hazardous, kind), {"__module__": kind.__module__})
    return config


def _unmarked(config: PeftConfig) -> PeftConfig:
    if isinstance(config, _Hazardous):
        config = copy.copy(config)
        config.__class__ = type(config).__bases__[1]
    return config


def _adapters(model: PreTrainedModel | PeftModel) -> dict[str, PeftConfig]:
    found: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    return found


def _own_configurations(model: nn.Module) -> None:
    """Gives a model copies of its configurations, to all modules that share one the same copy."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if vars(module).get("config") is not None:
            vars(module)["config"] = copy.deepcopy(vars(module)["config"], copies)


def _save_marked(model: Any, save_directory: Any, *arguments: Any, **options: Any) -> None:
    save = type(model).save_pretrained
    given = inspect.signature(save).bind(model, save_directory, *arguments, **options).arguments
    if {**given, **given.get("kwargs", {})}.get("push_to_hub"):
        refuse_upload()
    if given.get("is_main_process", True):
        mark_hazardous(Path(save_directory))
    save(model, save_directory, *arguments, **options)


def _unload(tuner: Any) -> Any:
    original = type(tuner).unload(tuner)
    unmark_model(original)
    return original
