"""FT: fine-tuning on normal answers alone, in the hope that harmful ones are forgotten on the way.

Harmful prompts set the order and number of steps, as for every method, but none of their rows is trained on. The loss
is that of ``retain_term``. A baseline of arXiv 2402.10058 (SKU).
"""

from __future__ import annotations

from sku.methods.base import Method, NoSettings, retain_term
from sku.training.objective import Objective

FINE_TUNE = Method(
    name="fine_tune",
    title="FT",
    paper_url="https://arxiv.org/abs/2402.10058",
    settings=NoSettings,
    objective=lambda _settings, _model: Objective.of(retain_term("gd")),
)
