"""What a recipe holds. One YAML file is one whole run; each key is a field of a dataclass here.

Nothing here imports torch or transformers, so that ``sku --help`` and a wrong key are answered at once.
"""

from sku.config.check import plain_data
from sku.config.data import DataConfig, DataFormat, OwnRepliesConfig, SourceConfig
from sku.config.evaluate import (
    Attack,
    CompareConfig,
    EvaluateConfig,
    MethodConfig,
    Precision,
    SearchConfig,
    Similarity,
)
from sku.config.recipe import (
    EMBEDDED,
    ModelConfig,
    PromptFormatName,
    Recipe,
    apply_override,
    load_recipe,
    read_yaml,
    recipe_from_dict,
    recipe_names,
    settings_from_dict,
)
from sku.config.stages import (
    AcquireConfig,
    LoraSettings,
    ModulesConfig,
    NegateConfig,
    Packing,
    PreservationMode,
    SweepConfig,
    Tuning,
    Twin,
    TwinShares,
    WeightsConfig,
)

__all__ = [
    "EMBEDDED",
    "AcquireConfig",
    "Attack",
    "CompareConfig",
    "DataConfig",
    "DataFormat",
    "EvaluateConfig",
    "LoraSettings",
    "MethodConfig",
    "ModelConfig",
    "ModulesConfig",
    "NegateConfig",
    "OwnRepliesConfig",
    "Packing",
    "Precision",
    "PreservationMode",
    "PromptFormatName",
    "Recipe",
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
    "read_yaml",
    "recipe_from_dict",
    "recipe_names",
    "settings_from_dict",
]
