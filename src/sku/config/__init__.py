"""What a recipe holds. One YAML file is one whole run; each key is a field of a dataclass here.

Nothing here imports torch or transformers, so that ``sku --help`` and a wrong key are answered at once.
"""

from sku.config.check import plain_data as plain_data
from sku.config.data import EMBEDDED as EMBEDDED
from sku.config.data import DataConfig as DataConfig
from sku.config.data import ModelConfig as ModelConfig
from sku.config.data import PromptFormatName as PromptFormatName
from sku.config.data import SourceConfig as SourceConfig
from sku.config.data import refuse_final as refuse_final
from sku.config.recipe import Recipe as Recipe
from sku.config.recipe import apply_override as apply_override
from sku.config.recipe import load_recipe as load_recipe
from sku.config.recipe import read_yaml as read_yaml
from sku.config.recipe import recipe_from_dict as recipe_from_dict
from sku.config.recipe import recipe_names as recipe_names
from sku.config.recipe import settings_from_dict as settings_from_dict
from sku.config.stages import AcquireConfig as AcquireConfig
from sku.config.stages import EvaluateConfig as EvaluateConfig
from sku.config.stages import LoraSettings as LoraSettings
from sku.config.stages import MethodConfig as MethodConfig
from sku.config.stages import ModulesConfig as ModulesConfig
from sku.config.stages import NegateConfig as NegateConfig
from sku.config.stages import Precision as Precision
from sku.config.stages import PreservationMode as PreservationMode
from sku.config.stages import SweepConfig as SweepConfig
from sku.config.stages import TwinShares as TwinShares
from sku.config.stages import WeightsConfig as WeightsConfig
