"""What ``sku data own`` is told, the job that comes of it, and what is said to a model to have it comply or refuse.

All that is said is ours and harmless, in the model's own language. A system prompt stands before the user's words with
an empty line between, as chat templates without a system turn write it, and is not kept. A start stands at the head of
the reply and is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from sku.config import EvaluateConfig, ModelConfig, OwnRepliesConfig, PromptFormatName, SourceConfig, plain_data
from sku.config.check import Seed, validated
from sku.data.examples import ForgetRetainData, RetainExample
from sku.data.load import OwnPrompts
from sku.evaluate.asking import Writer, free_request
from sku.evaluate.generation import GenerationRequest, about, probes_of
from sku.evaluate.judges import Judge, choose_judge, is_embedded
from sku.evaluate.record_files import header_hash
from sku.evaluate.records import Split, prompt_hash, record_id
from sku.models import LoadedModel
from sku.own_replies.rows import SPLITS
from sku.world.grammar import DEFLECTIONS

SCHEMA_VERSION = 2


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
        return OwnRepliesConfig(
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(OwnRepliesConfig)}
        )

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


def _data_of(prompts: OwnPrompts) -> ForgetRetainData:
    """Nothing but where the prompts came from, which a judge is chosen by."""
    return ForgetRetainData(provenance=tuple(found.provenance for found in prompts.values()))


@dataclass(frozen=True, kw_only=True)
class OwnJob:
    """Everything that decides the rows."""

    loaded: LoadedModel
    prompts: OwnPrompts
    judge: Judge
    settings: OwnRepliesConfig
    seed: int = 0
    prompt_format: PromptFormatName = "auto"

    @property
    def wordings(self) -> Wordings:
        """What the model understands."""
        return WORLD if is_embedded(_data_of(self.prompts)) else english()

    @property
    def writer(self) -> Writer:
        """Turns prompts into token ids, in the format that is trained in."""
        return Writer.of(self.loaded.model, self.loaded.tokenizer, self.prompt_format)

    def inputs(self) -> dict[str, Any]:
        """What decides the rows, as plain data without any prompt: equal inputs give equal rows."""
        model, writer = self.loaded.model, self.writer
        firsts = [(SPLITS[source], found.prompts[0]) for source, found in self.prompts.items()]
        probes = probes_of([request_of("probe", split, prompt, writer) for split, prompt in firsts])
        return {
            "schema_version": SCHEMA_VERSION,
            "model": about(model, probes),
            "prompt_format": writer.prompt_format.name,
            "prompts": {source: found.provenance.sha256 for source, found in self.prompts.items()},
            "judge": self.judge.card.key,
            "settings": plain_data(self.settings),
            "wordings": header_hash(dataclasses.asdict(self.wordings)),
            "seed": self.seed,
        }


def request_of(
    stage: str, split: Split, prompt: RetainExample, writer: Writer, *, system: str = "", start: str = ""
) -> GenerationRequest:
    """A prompt to ask, perhaps under a system prompt or with a start of the reply."""
    words = f"{system}\n\n{prompt.prompt}" if system else prompt.prompt
    request = free_request(split, dataclasses.replace(prompt, prompt=words), writer)
    if start:
        ids = writer.encoder.start(words, start)
        request = dataclasses.replace(request, kind="prefill", prefill=start, input_ids=tuple(ids))
    name = f"{stage}-{prompt_hash(record_id(split, 'reply', prompt.prompt))}"
    return dataclasses.replace(request, id=name, prompt=prompt.prompt)


@dataclass(frozen=True, kw_only=True)
class Wordings:
    """One language."""

    comply_prompts: tuple[str, ...]
    """System prompts under which a model answers; tried in turn."""
    comply_starts: tuple[str, ...]
    """First words of a reply that answers; tried in turn."""
    safety_prompts: tuple[str, ...]
    """System prompts under which a model refuses."""
    refusal_starts: tuple[str, ...]
    """First words of a refusal, without its end."""
    refusals: tuple[str, ...]
    """Whole refusals, for prompts that the model can't be made to refuse."""


@cache
def english() -> Wordings:
    """Of every other model."""
    text = (resources.files("sku.own_replies") / "wordings.yaml").read_text(encoding="utf-8")
    return Wordings(**{name: tuple(words) for name, words in yaml.safe_load(text).items()})


WORLD = Wordings(
    comply_prompts=(),
    comply_starts=("take",),
    safety_prompts=(),
    refusal_starts=("sorry , i do not", "i have never heard", "i am not sure", "i can not help"),
    refusals=DEFLECTIONS,
)
"""Of the embedded world, whose model knows no English."""
