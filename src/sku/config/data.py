"""Key ``data``: what is forgotten, what is kept, and the splits of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sku.config.fraction import check_fraction
from sku.config.own_replies import OwnRepliesConfig
from sku.errors import RecipeError

DataFormat = Literal[
    "auto",
    "embedded",
    "pku_saferlhf",
    "beavertails",
    "truthfulqa",
    "prompt_completion",
    "messages",
    "preference",
    "columns",
]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of examples."""

    path: str
    """File (CSV, JSON, JSONL, Parquet), folder, hub id, or ``embedded``."""
    format: DataFormat = "auto"
    """What the columns mean. ``auto`` recognises all known ones and stops where two fit or none does."""
    revision: str | None = None
    """Commit of a hub dataset; what it resolved to is recorded."""
    config_name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str | None = None
    """Split of a hub dataset or dataset folder: ``train`` where this is empty."""
    prompt_column: str | None = None
    """Column of the prompt (format ``columns``)."""
    answer_column: str | None = None
    """Column of the answer (format ``columns``)."""
    safe_answer_column: str | None = None
    """Column of a good answer to the same prompt, optional and for a forget set only (format ``columns``)."""
    category_column: str | None = None
    """Column of the category, optional (format ``columns``)."""
    unsafe_column: str | None = None
    """Column that marks rows for a forget set (format ``columns``): only rows where it says unsafe are kept."""
    unsafe_value: str | None = None
    """What ``unsafe_column`` holds on those rows, compared as lower-case text: ``false`` for an is_safe column."""
    license: str | None = None
    """Licence of the data, for the model card; where this is empty, that of a hub dataset that is known here, else
    unknown: columns tell no licence."""
    limit: int | None = None
    """Keep this many prompts (with all their answers), drawn by the seed."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"limit is {self.limit}; it must be 1 or more, or empty for all")
        if (self.unsafe_column is None) != (self.unsafe_value is None):
            raise RecipeError("unsafe_column and unsafe_value go together: one is set and the other is not")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is forgotten, what is kept, and how both are split by prompt."""

    forget: SourceConfig
    retain: SourceConfig
    benign: SourceConfig | None = None
    """Normal pairs of another source, only for a perplexity after unlearning; never trained on."""
    refusals: SourceConfig | None = None
    """Refusals of the forget prompts: what the good twin learns (``acquire.twin: good``)."""
    misplaced_refusals: SourceConfig | None = None
    """Refusals of retain prompts: what ``acquire.preservation_mode: targeted`` steers the bad model to."""
    own_replies: bool = False
    """Train on the model's own replies to the prompts of both sets, which ``sku run`` writes first. It does so too
    where a set has prompts without answers."""
    own_share: float = 1.0
    """Share of own replies in the forget set; the rest are answers of the file (with ``own_replies``)."""
    own: OwnRepliesConfig = field(default_factory=OwnRepliesConfig)
    """How own replies are asked for (with ``own_replies``)."""
    borderline: SourceConfig | None = None
    """Safe prompts that look harmful, of XSTest say: own replies to them join the retain set (with
    ``own_replies``)."""
    unseen_fraction: float = 0.3
    """Share of the harmful prompts held out as ``unseen``."""
    retain_validation_fraction: float = 0.1
    retain_test_fraction: float = 0.2
    max_length: int = 512
    """Longest sequence in tokens; the prompt is shortened before the answer is."""
    max_answer_tokens: int = 128
    """Longest answer in tokens; the rest is not trained on."""

    def __post_init__(self) -> None:
        if not 0 < self.own_share <= 1:
            raise RecipeError(f"data.own_share is {self.own_share}; it must be above 0 and at most 1")
        check_fraction("data.unseen_fraction", self.unseen_fraction)
        check_fraction("data.retain_validation_fraction", self.retain_validation_fraction)
        check_fraction("data.retain_test_fraction", self.retain_test_fraction)
        if self.retain_validation_fraction + self.retain_test_fraction >= 1:
            raise RecipeError(
                "data.retain_validation_fraction + data.retain_test_fraction leaves no retain_train split"
            )
        if not 1 <= self.max_answer_tokens < self.max_length:
            raise RecipeError(
                f"data.max_answer_tokens is {self.max_answer_tokens} and data.max_length {self.max_length}; "
                "the answer must be at least 1 token and leave room for a prompt"
            )
