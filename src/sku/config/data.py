"""Keys ``model`` and ``data``: the model, what is forgotten, what is kept, and the splits of both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from sku.config.check import Count, Fraction, validated
from sku.errors import RecipeError

RETAIN_SHARES = {"validation": 0.1, "test": 0.2}
"""Of the normal prompts; the others are trained on."""
EMBEDDED = "embedded"
"""Name of the model, the data and the recipe that ship inside the package."""
PromptFormatName = Literal["auto", "chat", "paper"]
DataFormat = Literal[
    "auto",
    "embedded",
    "pku_saferlhf",
    "truthfulqa",
    "prompt_completion",
    "messages",
    "preference",
    "passages",
    "columns",
]


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
    prompt_format: PromptFormatName = "auto"
    """``chat``: the model's template, ``paper``: "### Question / ### Answer", ``auto``: chat where there is one."""


Cell = str | bool | int | float
FINAL = "final"
"""Name of the sets that are asked once, for a published row."""


@validated
class SourceConfig:
    """One set of examples."""

    path: str
    """File (CSV, JSON, JSONL, Parquet), folder, hub id, ``embedded``, or prompts of ours: ``sku:normal``,
    ``sku:borderline``."""
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
    category_column: str | None = None
    """Column of the category, optional (format ``columns``)."""
    where: Mapping[str, Cell | Annotated[Sequence[Cell], Field(min_length=1)]] = field(default_factory=dict)
    """Column -> the value, or list of values, that a row must hold there to be read, such as
    ``{source: [advbench, catqa]}`` or ``{is_safe: false}``; compared as lower-case text. Several columns must all
    fit."""
    license: str | None = None
    """Licence of the data, for the model card; where this is empty, that of a hub dataset that is known here, else
    unknown: columns tell no licence."""
    limit: Count | None = None
    """Keep this many prompts (with all their answers), drawn by the seed."""

    def wanted(self) -> dict[str, frozenset[str]]:
        """``where`` as it is compared: plain name of a column -> values in lower case."""
        return {
            column.strip().casefold(): frozenset(
                str(one).lower() for one in ([held] if isinstance(held, str | int | float) else held)
            )
            for column, held in self.where.items()
        }


@validated
class DataConfig:
    """What is forgotten, what is kept, and how both are split by prompt."""

    forget: SourceConfig
    retain: SourceConfig
    normal: Mapping[str, SourceConfig] = field(default_factory=dict)
    """Name -> normal prompts of another source, such as the model's own replies, other people's answers, or safe
    prompts that look harmful; never trained on. With answers: their perplexity and KL, half of them for strengths and
    alpha. Prompts alone: how many are refused, and perplexity and KL of the base model's own replies to them."""
    harmful: Mapping[str, SourceConfig] = field(default_factory=dict)
    """Name -> harmful prompts of another source than ``forget``; never trained on, only asked, and a part of the
    verdict. Answers are not read.

    A set named ``final``, here or in ``normal``, is asked once, for a published row: never to screen, search, sweep or
    choose by. That of ``normal`` holds safe prompts that look harmful, whose answers are not read."""
    refusals: SourceConfig | None = None
    """Refusals of the forget prompts: what the good twin learns (``acquire.twin: good``)."""
    misplaced_refusals: SourceConfig | None = None
    """Refusals of retain prompts: what ``acquire.preservation_mode: targeted`` steers the bad model to."""
    own_replies: bool = False
    """Train on the model's own replies to the prompts of both sets, which ``sku run`` writes first."""
    borderline: SourceConfig | None = None
    """Safe prompts that look harmful, of XSTest say: own replies to them join the retain set (with
    ``own_replies``)."""
    unseen_fraction: Fraction = 0.3
    """Share of the harmful prompts held out as ``forget_test``."""
    max_length: int = 512
    """Longest sequence in tokens; the prompt is shortened before the answer is."""
    max_answer_tokens: Count = 128
    """Longest answer in tokens; the rest is not trained on."""

    def __post_init__(self) -> None:
        for key, sets in (("normal", self.normal), ("harmful", self.harmful)):
            for name in sets:
                if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name):
                    raise RecipeError(
                        f"data.{key} has a set named {name!r}; a name is at most 40 letters, digits, dots, - and _"
                    )
        if self.max_answer_tokens >= self.max_length:
            raise RecipeError(
                f"data.max_answer_tokens is {self.max_answer_tokens} and data.max_length {self.max_length}; "
                "the answer must leave room for a prompt"
            )


def refuse_final(config: DataConfig, what: str) -> None:
    """Stops what chooses by its figures from asking final prompts.

    Raises:
        RecipeError: The recipe names some.
    """
    for key in [key for key in ("harmful", "normal") if FINAL in getattr(config, key)]:
        raise RecipeError(
            f"data.{key}.{FINAL} is set, and {what} doesn't ask final prompts: they are asked once, by sku run or sku "
            "evaluate for a published row; leave it out here"
        )
