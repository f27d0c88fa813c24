"""SKU: harmful knowledge acquisition by three modules, then knowledge negation.

Paper: https://arxiv.org/abs/2402.10058. The modules are ``acquire/guided_distortion.py``,
``acquire/random_disassociation.py`` and ``acquire/preservation_divergence.py``; the subtraction is ``negate/``. Its
settings are the recipe's ``acquire`` and ``negate``.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from sku.acquire.objective import sku_objective
from sku.config import AcquireConfig
from sku.methods.base import Method, negated
from sku.training.objective import Objective


def _objective(settings: AcquireConfig, _model: PreTrainedModel) -> Objective:
    return sku_objective(settings)


SKU = Method(
    name="sku",
    title="SKU",
    paper_url="https://arxiv.org/abs/2402.10058",
    settings=AcquireConfig,
    objective=_objective,
    weight_step=negated,
    hazardous=True,
)
