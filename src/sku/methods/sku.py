"""SKU: harmful knowledge acquisition by three modules, then knowledge negation.

Paper: https://arxiv.org/abs/2402.10058. The modules are in ``acquire/objective.py``; the subtraction is
``negate/``. Its settings are the recipe's ``acquire`` and ``negate``.
"""

from __future__ import annotations

from sku.acquire.objective import sku_objective
from sku.config.stages import AcquireConfig
from sku.methods.base import Method

SKU = Method(
    name="sku",
    title="SKU",
    paper_url="https://arxiv.org/abs/2402.10058",
    settings=AcquireConfig,
    objective=lambda settings, _model: sku_objective(settings),
)
