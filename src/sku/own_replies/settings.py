"""What ``sku data own`` is told, and the job that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from sku.config import EvaluateConfig, ModelConfig, OwnRepliesConfig, PromptFormatName, SourceConfig
from sku.config.check import Seed, validated
from sku.data.examples import ForgetRetainData
from sku.data.prompt_sets import OwnPrompts
from sku.evaluate.judges import Judge, choose_judge, is_embedded
from sku.models import LoadedModel
from sku.own_replies.wordings import ENGLISH, WORLD
from sku.own_replies.write import OwnJob


@validated
class OwnOptions(OwnRepliesConfig):
    """Everything that ``sku data own`` can be told: the settings of ``data.own`` and these."""

    model: ModelConfig
    harmful: SourceConfig
    normal: SourceConfig
    borderline: SourceConfig | None = None
    judge: str
    """A name that ``sku judge list`` shows, or a judge file."""
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the settings of the judge's file."""
    seed: Seed = 0

    @property
    def replies(self) -> OwnRepliesConfig:
        """The settings of ``data.own`` alone."""
        return OwnRepliesConfig(**{item.name: getattr(self, item.name) for item in fields(OwnRepliesConfig)})

    @property
    def evaluate(self) -> EvaluateConfig:
        """Names the judge."""
        return EvaluateConfig(judge=self.judge, judge_settings=self.judge_settings)


def judge_of(config: EvaluateConfig, prompts: OwnPrompts) -> Judge:
    """The judge of own replies: that of the evaluation.

    Args:
        config: Names it.
        prompts: ``auto`` is the exact judge where all of them are the embedded world's.

    Raises:
        EvaluationError: No such judge, or ``embedded`` on other prompts.
        RecipeError: Settings that the judge doesn't have.
    """
    return choose_judge(config, _data_of(prompts))


def own_job(
    loaded: LoadedModel,
    prompts: OwnPrompts,
    judge: Judge,
    settings: OwnRepliesConfig,
    *,
    seed: int,
    prompt_format: PromptFormatName,
) -> OwnJob:
    """The job of one call, with the wordings that its model understands.

    Args:
        loaded: The model, in evaluation mode.
        prompts: What it is asked.
        judge: Of ``judge_of``.
        settings: How it is asked.
        seed: Of sampled replies, and of what is paired with what.
        prompt_format: As in training.
    """
    return OwnJob(
        loaded=loaded,
        prompts=prompts,
        judge=judge,
        settings=settings,
        wordings=WORLD if is_embedded(_data_of(prompts)) else ENGLISH,
        seed=seed,
        prompt_format=prompt_format,
    )


def _data_of(prompts: OwnPrompts) -> ForgetRetainData:
    """Nothing but where the prompts came from, which a judge is chosen by."""
    return ForgetRetainData(
        unlearned=(),
        unseen=(),
        retain_train=(),
        retain_validation=(),
        retain_test=(),
        provenance=tuple(found.provenance for found in prompts.sets().values()),
    )
