"""A whole recipe: its sections, and the keys that belong to none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from sku.config.check import Seed, plain_data, validated
from sku.config.data import DataConfig
from sku.config.evaluate import CompareConfig, EvaluateConfig, MethodConfig
from sku.config.stages import AcquireConfig, NegateConfig, SweepConfig, TwinShares
from sku.errors import RecipeError

_LONGEST_NAME = 200
EMBEDDED = "embedded"
"""Name of the model, the data and the recipe that ship inside the package."""
PromptFormatName = Literal["auto", "chat", "paper"]


@validated
class ModelConfig:
    """The model to unlearn."""

    path: str
    """Local folder, hub id, or ``embedded``. Never written to."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; the commit it resolved to is recorded."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``path``: it is dequantized while loading."""
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are held in. ``auto``: bfloat16 on a GPU, float32 on a CPU; ``stored``: that of the files."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    license: str | None = None
    """Licence of the model, such as ``apache-2.0``, for the card of the unlearned one; what the model's own card says
    where this is empty."""
    prompt_format: PromptFormatName = "auto"
    """``chat``: the model's template, ``paper``: "### Question / ### Answer", ``auto``: chat where there is one."""


@validated
class Recipe:
    """One whole run: data, stage 1, stage 2, evaluation."""

    name: str
    model: ModelConfig
    data: DataConfig
    description: str = ""
    seed: Seed = 0
    acquire: AcquireConfig = field(default_factory=AcquireConfig)
    negate: NegateConfig = field(default_factory=NegateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: str = "sku"
    """What is run: ``sku``, or another name that ``sku methods`` lists."""
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Settings of the other methods, by name."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    keep_bad_model: bool = False
    """Keep the hazardous model of stage 1 after the run. It answers harmful prompts on purpose."""
    keep_for_resume: bool = True
    """Keep the private, marked checkpoints of a run that was interrupted or failed, so that ``--resume`` goes on from
    them; ``false`` removes them at once, and stage 1 of a resumed run begins anew. ``sku wipe`` removes them later."""

    def __post_init__(self) -> None:
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
        plain: dict[str, Any] = plain_data(self)
        return plain
