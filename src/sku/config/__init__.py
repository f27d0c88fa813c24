"""What a recipe holds, a section a file. One YAML file is one whole run; each key is a field of a dataclass here.

Nothing here imports torch or transformers, so that ``sku --help`` and a wrong key are answered at once.
"""

from sku.config.acquire import (
    AcquireConfig,
    LoraSettings,
    Packing,
    PreservationMode,
    PreservationTokens,
    Tuning,
    Twin,
    WeightsConfig,
)
from sku.config.compare import CompareConfig, MethodConfig, SearchConfig
from sku.config.compat import REFERENCE, CompatConfig
from sku.config.data import DataConfig, DataFormat, SourceConfig
from sku.config.evaluate import Attack, Backend, EvaluateConfig, Precision, Similarity
from sku.config.model import EMBEDDED, ModelConfig, PromptFormatName
from sku.config.negate import NegateConfig, TwinShares
from sku.config.own_replies import OwnRepliesConfig
from sku.config.read import apply_override, load_recipe, recipe_from_dict, recipe_names, settings_from_dict
from sku.config.recipe import Recipe, plain_data
from sku.config.sweep import Rule, SweepConfig

__all__ = [
    "EMBEDDED",
    "REFERENCE",
    "AcquireConfig",
    "Attack",
    "Backend",
    "CompareConfig",
    "CompatConfig",
    "DataConfig",
    "DataFormat",
    "EvaluateConfig",
    "LoraSettings",
    "MethodConfig",
    "ModelConfig",
    "NegateConfig",
    "OwnRepliesConfig",
    "Packing",
    "Precision",
    "PreservationMode",
    "PreservationTokens",
    "PromptFormatName",
    "Recipe",
    "Rule",
    "SearchConfig",
    "Similarity",
    "SourceConfig",
    "SweepConfig",
    "Tuning",
    "Twin",
    "TwinShares",
    "WeightsConfig",
    "apply_override",
    "load_recipe",
    "plain_data",
    "recipe_from_dict",
    "recipe_names",
    "settings_from_dict",
]
