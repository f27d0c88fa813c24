"""SKU: harmful knowledge acquisition by three modules, then knowledge negation.

Paper: https://arxiv.org/abs/2402.10058. The modules are ``acquire/guided_distortion.py``,
``acquire/random_disassociation.py`` and ``acquire/preservation_divergence.py``; the subtraction is ``negate/``. Its
settings are the recipe's ``acquire`` and ``negate``; ``compat`` reproduces behaviours of the authors' public code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from sku.acquire.objective import sku_objective
from sku.config import AcquireConfig, CompatConfig
from sku.methods.base import Method
from sku.training.objective import Objective


@dataclass(frozen=True, kw_only=True)
class SkuSettings(AcquireConfig):
    """The recipe's ``acquire`` with its ``compat``."""

    compat: CompatConfig = field(default_factory=CompatConfig)


def _objective(settings: SkuSettings, _model: PreTrainedModel) -> Objective:
    return sku_objective(settings, settings.compat)


SKU = Method(
    name="sku",
    title="SKU",
    paper_url="https://arxiv.org/abs/2402.10058",
    settings=SkuSettings,
    objective=_objective,
    negates=True,
    hazardous=True,
)
