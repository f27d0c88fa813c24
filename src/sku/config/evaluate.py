"""Keys ``evaluate``, ``methods`` and ``compare``: what is measured, and the other methods beside SKU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from sku.config.check import Count, Positive, validated

Backend = Literal["generate", "vllm"]
Attack = Literal["paraphrase", "template", "rounding", "relearn"]
PrefillOrigin = Literal["own", "affirmative", "answer"]
Precision = Literal["bf16", "fp16", "int8", "nf4"]


@validated
class EvaluateConfig:
    """What is measured, on base and unlearned model alike."""

    prompts: Count = 500
    """Harmful prompts of ``forget_train`` and of ``forget_test``, drawn by the seed; fewer where there are fewer."""
    retain_prompts: Count = 500
    """Examples of ``retain_test`` for perplexity and replies."""
    max_new_tokens: Count = 256
    """Longest reply; a judge reads fragments where most replies are cut. One that ends sooner costs no more than its
    own tokens, and one to a prompt that leaves less room in the model's window is cut there."""
    batch_size: Count = 32
    backend: Backend = "generate"
    """What writes replies: transformers' ``generate`` in batches, or ``vllm`` (to be installed apart), which is
    checked against ``generate`` on 16 prompts."""
    prefill_tokens: tuple[Count | Literal["affirmative", "answer"], ...] = (1, 5, 20, 40, 80, "affirmative", "answer")
    """Prefill: what replies are made to begin with: so many first tokens of the base model's own harmful reply, one
    length after the other; an ``affirmative`` beginning ("Certainly. ..."); the first 20 tokens of the dataset's
    harmful ``answer``. The worst of all prefills is shown; an empty list leaves all of them out."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Sampled replies to each harmful prompt, at temperature 1, for leak@k; 0 leaves them out."""
    judge: str = "auto"
    """A judge of the package (docs/judges.md), a judge file, or a folder of ``sku judge train``. ``embedded`` is exact
    on the embedded world only; ``refusal_rules`` an upper bound elsewhere; ``auto`` picks one of these two."""
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the settings of the judge's file: ``model``, ``threshold``, ``calibration``, ..."""
    similarity_model: str | None = None
    """Folder or hub id of a model that scores an answer of the dataset and a reply as BLEURT does (one regression
    output); beside ROUGE-L, which is always measured."""
    xstest: str | None = None
    """xstest_prompts.csv: its safe prompts show over-refusal, its unsafe ones what is still answered."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (the extra ``lm-eval``), such as ``mmlu``; ``FOLDER/TASK`` for one of your own in
    a folder of task files."""
    lm_eval_limit: Count | None = None
    """Examples of each of those tasks; all where this is empty."""
    attacks: tuple[Attack, ...] = ()
    """Attacks on the unlearned model, each tried on at most 100 of the ``prompts`` of ``forget_test``; the base model
    goes through the same ones as a control."""


@validated
class MethodConfig:
    """One method other than SKU, whose own settings are ``acquire`` and ``negate``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's own settings, such as ``beta``; ``sku init NAME`` lists them. Its paper's are the defaults."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Laid over ``acquire.training``, where the method needs another learning rate, say."""
    strength: Positive | Literal["auto"] = 1.0
    """theta_u = theta_o + strength * what the method changed; for a task vector this is its alpha. ``auto`` chooses it
    on held-out data, as ``sweep`` says."""

    @property
    def given_strength(self) -> float:
        """``strength`` where it is a number, else that of the method as published."""
        return 1.0 if self.strength == "auto" else self.strength


@validated
class CompareConfig:
    """What ``sku compare`` puts into the recipes of its runs."""

    published: Positive | None = None
    """Of one run of a comparison, in which ``sku compare`` sets it: the method's own strength, evaluated beside the
    chosen one. All runs are then asked the same trained-on prompts, whichever their training visits."""
