"""Where curves go (``report_to``), and that the model in training doesn't go with them.

It is hazardous, or not yet measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from sku.errors import RecipeError, did_you_mean

MODEL_UPLOADS: Mapping[str, tuple[str, str]] = {
    "wandb": ("WANDB_LOG_MODEL", "false"),
    "comet_ml": ("COMET_LOG_ASSETS", "false"),
    "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS", "false"),
    "dagshub": ("HF_DAGSHUB_LOG_ARTIFACTS", "false"),
    "clearml": ("CLEARML_LOG_MODEL", "true"),
    "dvclive": ("HF_DVCLIVE_LOG_MODEL", "false"),
    "swanlab": ("SWANLAB_LOG_MODEL", "false"),
}
"""Service of ``report_to`` -> the variable that makes transformers send it checkpoints, and what holds without it."""
ALWAYS_UPLOADS = ("flyte",)
"""Services that get every checkpoint and have no switch."""
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "kubeflow": "kubeflow"}
"""Service -> its package where that is named otherwise."""
_OFF = {"", "0", "false", "no", "none", "off"}


def check_services(report_to: Iterable[str]) -> None:
    """Refuses services that would fail when training begins, which may be long after the start of a run.

    Args:
        report_to: Names of services.

    Raises:
        RecipeError: transformers doesn't know one, or its package is missing.
    """
    available = get_available_reporting_integrations()
    for service in report_to:
        if service not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"report_to {service} is not a service that transformers knows."
                f"{did_you_mean(service, INTEGRATION_TO_CALLBACK)} Known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if service not in available and service not in ALWAYS_UPLOADS:
            raise RecipeError(
                f"report_to {service} needs a package that is missing: pip install {_PACKAGES.get(service, service)}"
            )


def check_no_uploads(report_to: Iterable[str], *, push_to_hub: bool) -> None:
    """Refuses settings under which transformers uploads the model while it is trained.

    Args:
        report_to: Names of services; curves may go there.
        push_to_hub: As of ``transformers.TrainingArguments``.

    Raises:
        RecipeError: With the setting or the variable.
    """
    if push_to_hub:
        raise RecipeError(
            "push_to_hub must be False: a model in training is never uploaded; sku push uploads the finished one"
        )
    for service in report_to:
        if service in ALWAYS_UPLOADS:
            raise RecipeError(f"report_to {service} uploads every checkpoint of the model in training: leave it out")
        if service in MODEL_UPLOADS:
            variable, default = MODEL_UPLOADS[service]
            value = os.environ.get(variable, default)
            if value.lower() not in _OFF:
                raise RecipeError(
                    f"report_to {service} would upload the model in training ({variable} is {value}): "
                    f"set {variable}=false, so that only its curves go there"
                )
