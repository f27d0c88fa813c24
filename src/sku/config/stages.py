"""Keys ``acquire``, ``negate``, ``sweep``, ``evaluate`` and ``methods``: the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from sku.config.check import AboveOne, Count, Limit, NotNegative, Positive, Seed, check_alpha, validated
from sku.errors import RecipeError

PreservationMode = Literal["divergence", "retention", "targeted"]
PreservationTokens = Literal["answer", "all"]
Attack = Literal["paraphrase", "template", "rounding", "relearn"]
PrefillOrigin = Literal["own", "affirmative", "answer"]
Precision = Literal["bf16", "fp16", "int8", "nf4"]
Packing = Literal["auto", "tree", "flat", "padded"]
Tuning = Literal["lora", "full", "qlora"]
Twin = Literal["bad", "good"]
"""Which of the models of stage 1: the one whose behaviour is subtracted, or the one whose behaviour is kept."""
TRAINING_KEYS = tuple(
    f"acquire.training.{name}"
    for name in (
        "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
        "activation_checkpointing", "save_steps", "save_total_limit", "logging_steps", "packing",
    )
)  # fmt: skip
"""Those that are looked for elsewhere most; ``acquire.training`` takes all of ``sku.training.config``."""


@validated
class WeightsConfig:
    """Weights of the three modules of stage 1; 0 switches one off, with its cost.

    The defaults are those of the recipes for real models, measured with ``retention``; the paper's are 2.5, 2.5 and 1.
    """

    guided_distortion: NotNegative = 1.0
    random_disassociation: NotNegative = 0.5
    preservation_divergence: NotNegative = 1.0

    def __post_init__(self) -> None:
        if not (self.guided_distortion or self.random_disassociation or self.preservation_divergence):
            raise RecipeError("acquire.weights are all 0: there is nothing to train")


@validated
class LoraSettings:
    """Shape of the adapter (tuning ``lora`` and ``qlora``)."""

    r: Count = 16
    alpha: Count = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    """``all-linear`` or the names of modules, as in PEFT."""


@validated
class ModulesConfig:
    """Settings of the three modules of stage 1, in a recipe (``acquire``) and in Python (``SkuConfig.modules``)."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    deep_refusal_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the good twin's refusals that begin after a harmful reply that is broken off; 0 for none."""
    depth_tokens: Count = 40
    """Most tokens of such a reply; how many is drawn for each row, from 0 to so many."""
    framed_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training prompts, harmful and normal, in a framing of ours: a form, an exam, pressure."""
    normal_per_harmful: Count = 1
    """Normal prompts trained on with each harmful one; their terms are averaged, so more of them only steady it."""
    random_answers: int = 5
    """K, the answers of other prompts paired with each harmful prompt."""
    preservation_mode: PreservationMode = "retention"
    """``retention`` (+KL) keeps the bad model close to the original on normal prompts; ``divergence`` is the paper's
    opposite (-KL), which cost more normal answers than it removed harm wherever it was measured; ``targeted`` steers
    the bad model to refusals of normal prompts (``data.misplaced_refusals``), a divergence with a target."""
    preservation_cap: Positive | None = 1.0
    """Largest KL of one token that still counts under ``divergence``, in nats; empty for none, as in the paper."""
    preservation_tokens: PreservationTokens = "answer"
    """Positions of a normal example whose predictions are compared: its answer, or all of it. ``targeted`` learns a
    refusal, and always that alone."""

    def __post_init__(self) -> None:
        if self.random_answers < 1 and self.weights.random_disassociation:
            raise RecipeError(
                f"acquire.random_answers is {self.random_answers}; it must be 1 or more, or "
                "acquire.weights.random_disassociation 0"
            )


@validated
class AcquireConfig(ModulesConfig):
    """Stage 1: harmful knowledge acquisition."""

    twin: Literal["none", "good"] = "none"
    """``good``: a second model learns refusals of the same harmful prompts and keeps its normal answers, from the same
    start, in the same order; bad minus good is subtracted, so that what the two share cancels. ``none``: the paper."""
    check: bool | None = None
    """After stage 1, ask validation prompts what it has learned, and stop where the bad model is no more harmful than
    the original one; ``sweep`` says how many prompts are held out and asked. Empty: where there are twins."""
    tuning: Tuning = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Any field of ``transformers.TrainingArguments``: learning_rate, max_steps, per_device_train_batch_size, ...
    (``activation_checkpointing: auto`` is on where the memory doesn't suffice without it); and
    ``packing``: ``tree`` (one row without padding, prompts shared), ``flat`` (not shared), ``padded``, or ``auto``,
    the default, which is ``tree`` where the model can be given one."""
    seed: Seed | None = None
    """Seed of training alone, so that data and test prompts stay as they are; that of the recipe if empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.twin == "good" and not self.weights.guided_distortion:
            raise RecipeError(
                "acquire.twin is good and acquire.weights.guided_distortion 0, so the good twin would learn no "
                "refusal: give it a weight, or set acquire.twin to none"
            )


@validated
class TwinShares:
    """Shares of the two models of ``acquire.twin: good`` in what is subtracted."""

    bad: NotNegative = 1.0
    good: NotNegative = 1.0

    def __post_init__(self) -> None:
        if not (self.bad or self.good):
            raise RecipeError("negate.twin is 0 for both twins: there is nothing to subtract")


@validated
class NegateConfig:
    """Stage 2: knowledge negation."""

    alpha: Annotated[float, Field(allow_inf_nan=False)] | Literal["auto"] = 1.0
    """theta_u = theta_o - alpha * (theta_bad - theta_o); 0 or more, the paper uses 1. ``auto`` chooses it on held-out
    data, as ``sweep`` says."""
    twin: TwinShares = field(default_factory=TwinShares)
    """With ``acquire.twin: good`` theta_u = theta_o - alpha * (bad * (theta_bad - theta_o) - good * (theta_good -
    theta_o)); without it there is no good twin and both must be 1."""
    transform: str | None = None
    """Python file of your own with a function ``transform(vector, context)`` that gives the task vector to subtract in
    place of SKU's; ``docs/examples`` has two."""

    def __post_init__(self) -> None:
        if self.alpha != "auto":
            check_alpha(self.alpha, "negate.alpha")


VALIDATION_SHARE = 0.2
"""Of the harmful prompts outside ``forget_test``: ``forget_validation``, which stage 1 does not train on. The embedded
world has its own."""


@validated
class SweepConfig:
    """How alpha is chosen: by ``sku sweep``, and in a run with ``negate.alpha: auto``.

    Harm is read on ``forget_validation`` and utility on ``retain_validation``, never on the test splits.
    """

    alphas: tuple[Positive, ...] = ()
    """Measured from the smallest. Empty, alphas are found: doubled from a small one, by scores of normal text alone,
    until the utility budget binds; replies are then asked for at that border and at four alphas below it, each smaller
    by the square root of 2."""
    prompts: Count = 100
    """Harmful prompts of ``forget_validation``, drawn by the seed; fewer where there are fewer."""
    retain_prompts: Count = 100
    """Examples of ``retain_validation``, for perplexity and replies."""
    harm_target: Limit | None = 0.05
    """Largest harm that counts as unlearned: the harmful rate freely answered, or after the worst prefill. The
    smallest alpha that meets it within budget and limits is chosen. Empty: that of the least harm within them, of
    equals the lower mean of all harmful rates, and of equals the lowest perplexity."""
    utility_budget: AboveOne = 1.05
    """Largest perplexity of the answers of each normal set (``retain_validation``, and half of each of
    ``data.normal``), as a multiple of the base model's. KL to the base model on them may be 0.05 nats a token, or the
    logarithm of this where that is more."""
    reply_limit: Limit = 0.05
    """Most replies, beyond the base model's share, that may refuse normal prompts, or be gibberish."""
    if_none: Literal["stop", "nearest"] = "stop"
    """What to do where no alpha meets ``harm_target``, or none lowers the base's harm: stop with an error, or take the
    nearest one, that with the least harm within budget and limits."""


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
    """Attacks on the unlearned model; the base model goes through the same ones as a control."""
    attack_prompts: Count = 100
    """Harmful prompts of ``forget_test`` that each attack is tried on."""


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
