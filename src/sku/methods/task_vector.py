"""Task vector: fine-tuning on the harmful pairs, then subtraction of the difference it made.

This is SKU with the first of its three modules alone. Paper: arXiv 2212.04089 (Ilharco et al., "forgetting via
negation"); a baseline of arXiv 2402.10058 (SKU).
"""

from __future__ import annotations

from sku.config.stages import ModulesConfig, WeightsConfig
from sku.methods.base import Method, NoSettings
from sku.methods.sku import sku_objective

_ALONE = ModulesConfig(
    weights=WeightsConfig(guided_distortion=1.0, random_disassociation=0.0, preservation_divergence=0.0)
)
TASK_VECTOR = Method(
    name="task_vector",
    title="Task vector",
    paper_url="https://arxiv.org/abs/2212.04089",
    settings=NoSettings,
    objective=lambda _settings, _model: sku_objective(_ALONE),
)
