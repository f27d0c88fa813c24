from .acquire.config import SkuConfig as SkuConfig
from .acquire.run import acquire as acquire
from .acquire.trainer import SkuTrainer as SkuTrainer
from .comparison.jobs import comparison_jobs as comparison_jobs
from .comparison.run import run_comparison as run_comparison
from .config import Recipe as Recipe
from .config import SourceConfig as SourceConfig
from .config import load_recipe as load_recipe
from .data.examples import ForgetExample as ForgetExample
from .data.examples import ForgetRetainData as ForgetRetainData
from .data.examples import RetainExample as RetainExample
from .data.load import load_forget_retain as load_forget_retain
from .errors import SkuError as SkuError
from .evaluate.comparison import compare as compare
from .evaluate.run import evaluate as evaluate
from .methods import METHODS as METHODS
from .methods.base import Method as Method
from .models import load_model as load_model
from .negate.run import negate as negate
from .negate.run import save_unlearned as save_unlearned
from .negate.streaming import negate_folders as negate_folders
from .negate.task_vector import TaskVector as TaskVector
from .pipeline import run_recipe as run_recipe
from .training.config import UnlearningConfig as UnlearningConfig
from .training.objective import Objective as Objective
from .training.trainer import UnlearningTrainer as UnlearningTrainer

__version__: str
