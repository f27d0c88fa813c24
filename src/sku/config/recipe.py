"""A whole recipe: its sections, and the keys that belong to none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sku.config.acquire import AcquireConfig
from sku.config.compare import CompareConfig, MethodConfig
from sku.config.compat import CompatConfig
from sku.config.data import DataConfig
from sku.config.evaluate import EvaluateConfig
from sku.config.model import ModelConfig
from sku.config.negate import NegateConfig, TwinShares
from sku.config.seed import check_seed
from sku.config.sweep import SweepConfig
from sku.errors import RecipeError

_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One whole run: data, stage 1, stage 2, evaluation."""

    name: str
    model: ModelConfig
    data: DataConfig
    description: str = ""
    seed: int = 0
    acquire: AcquireConfig = field(default_factory=AcquireConfig)
    negate: NegateConfig = field(default_factory=NegateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: str = "sku"
    """What is run: ``sku``, or another name that ``sku methods`` lists."""
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Settings of the other methods, by name."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
    """Behaviours of the authors' public code to reproduce, by name, or ``reference`` for all; for ``method: sku``."""
    keep_bad_model: bool = False
    """Keep the hazardous model of stage 1 after the run. It answers harmful prompts on purpose."""
    keep_for_resume: bool = True
    """Keep the private, marked checkpoints of a run that was interrupted or failed, so that ``--resume`` goes on from
    them; ``false`` removes them at once, and stage 1 of a resumed run begins anew. ``sku wipe`` removes them later."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        name = self.name
        odd = any(not character.isprintable() or character in "/\\" for character in name)
        if odd or not name.strip() or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
            raise RecipeError(
                f"name is {name!r}; runs without --out are kept in a folder of that name, so it must be text of at "
                f"most {_LONGEST_NAME} bytes without slashes, control characters or a dot in front, such as my-run"
            )
        if self.negate.twin != TwinShares() and self.acquire.twin == "none":
            raise RecipeError("negate.twin shares out two twins, and acquire.twin is none: set acquire.twin=good")
        if self.negate.given_alpha < 0:
            raise RecipeError(
                f"negate.alpha is {self.negate.given_alpha:g}: below 0 what stage 1 learned would be added; "
                "it must be 0 or more, or auto"
            )

    @property
    def chooses_alpha(self) -> bool:
        """Whether a run has to choose alpha; only SKU has one."""
        return self.negate.alpha == "auto" and self.method == "sku"

    @property
    def checks_stage_1(self) -> bool:
        """Whether a run asks what stage 1 has learned; only SKU has one."""
        check = self.acquire.twin == "good" if self.acquire.check is None else self.acquire.check
        return check and self.method == "sku"

    @property
    def forget_validation(self) -> float:
        """Share of the harmful prompts to hold out: to choose alpha, to ask stage 1, to fit operators; 0 for none."""
        needed = self.chooses_alpha or self.checks_stage_1 or self.negate.fits_operators
        return self.sweep.validation_fraction if needed else 0.0

    @property
    def search_validation(self) -> float:
        """The same of a comparison: for ``compare.search`` and operators that are fitted to them."""
        needed = self.compare.search is not None or self.negate.fits_operators
        return self.sweep.validation_fraction if needed else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, every default spelled out."""
        return {item.name: plain_data(getattr(self, item.name)) for item in dataclasses.fields(self)}


def plain_data(value: Any) -> Any:
    """Settings as JSON holds them: dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain_data(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain_data(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(entry) for entry in value]
    return value
