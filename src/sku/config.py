"""What a recipe holds. One YAML file is one whole run; each key is a field below.

This file imports neither torch nor transformers, so that ``sku --help`` and a wrong key are answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from sku.errors import RecipeError, did_you_mean

S = TypeVar("S")
EMBEDDED = "embedded"
"""Name of the model, the data and the recipe that ship inside the package."""
REFERENCE = "reference"
"""What ``compat`` says to switch on every behaviour of the public code."""

PromptFormatName = Literal["auto", "chat", "paper"]
PreservationMode = Literal["divergence", "retention"]
PreservationTokens = Literal["answer", "all"]
Packing = Literal["auto", "tree", "flat", "padded"]
Tuning = Literal["lora", "full", "qlora"]
Backend = Literal["generate", "generate_batch", "vllm"]
Similarity = Literal["rouge_l", "chrf", "cosine", "bleurt"]
Attack = Literal["prefill", "paraphrase", "template", "int8", "nf4-sim", "relearn"]
Precision = Literal["bf16", "fp16", "int8", "nf4"]
Search = Literal["grid", "bisection"]
Rule = Literal["lowest_alpha", "least_harm"]
DataFormat = Literal[
    "auto",
    "embedded",
    "pku_saferlhf",
    "beavertails",
    "truthfulqa",
    "prompt_completion",
    "messages",
    "preference",
    "columns",
]


@dataclass(frozen=True, kw_only=True)
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
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    license: str | None = None
    """Licence of the model, such as ``apache-2.0``, for the card of the unlearned one; what the model's own card says
    where this is empty."""
    prompt_format: PromptFormatName = "auto"
    """``chat``: the model's template, ``paper``: "### Question / ### Answer", ``auto``: chat where there is one."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of examples."""

    path: str
    """File (CSV, JSON, JSONL, Parquet), folder, hub id, or ``embedded``."""
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
    safe_answer_column: str | None = None
    """Column of a good answer to the same prompt, optional and for a forget set only (format ``columns``)."""
    category_column: str | None = None
    """Column of the category, optional (format ``columns``)."""
    unsafe_column: str | None = None
    """Column that marks rows for a forget set (format ``columns``): only rows where it says unsafe are kept."""
    unsafe_value: str | None = None
    """What ``unsafe_column`` holds on those rows, compared as lower-case text: ``false`` for an is_safe column."""
    license: str | None = None
    """Licence of the data, for the model card; that of the recognised format where this is empty."""
    limit: int | None = None
    """Keep this many prompts (with all their answers), drawn by the seed."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"limit is {self.limit}; it must be 1 or more, or empty for all")
        if (self.unsafe_column is None) != (self.unsafe_value is None):
            raise RecipeError("unsafe_column and unsafe_value go together: one is set and the other is not")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is forgotten, what is kept, and how both are split by prompt."""

    forget: SourceConfig
    retain: SourceConfig
    benign: SourceConfig | None = None
    """Normal pairs of another source, only for a perplexity after unlearning; never trained on."""
    unseen_fraction: float = 0.3
    """Share of the harmful prompts held out as ``unseen``."""
    retain_validation_fraction: float = 0.1
    retain_test_fraction: float = 0.2
    max_length: int = 512
    """Longest sequence in tokens; the prompt is shortened before the answer is."""
    max_answer_tokens: int = 128
    """Longest answer in tokens; the rest is not trained on."""

    def __post_init__(self) -> None:
        _check_fraction("data.unseen_fraction", self.unseen_fraction)
        _check_fraction("data.retain_validation_fraction", self.retain_validation_fraction)
        _check_fraction("data.retain_test_fraction", self.retain_test_fraction)
        if self.retain_validation_fraction + self.retain_test_fraction >= 1:
            raise RecipeError(
                "data.retain_validation_fraction + data.retain_test_fraction leaves no retain_train split"
            )
        if not 1 <= self.max_answer_tokens < self.max_length:
            raise RecipeError(
                f"data.max_answer_tokens is {self.max_answer_tokens} and data.max_length {self.max_length}; "
                "the answer must be at least 1 token and leave room for a prompt"
            )


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weights of the three modules of stage 1; 0 switches one off, with its cost."""

    guided_distortion: float = 2.5
    random_disassociation: float = 2.5
    preservation_divergence: float = 1.0

    def __post_init__(self) -> None:
        weights = dataclasses.asdict(self)
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise RecipeError(f"acquire.weights.{name} is {weight}; it must be 0 or more and finite")
        if not any(weights.values()):
            raise RecipeError("acquire.weights are all 0: there is nothing to train")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter (tuning ``lora`` and ``qlora``)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """``all-linear`` or the names of modules, as in PEFT."""


@dataclass(frozen=True, kw_only=True)
class AcquireConfig:
    """Stage 1: harmful knowledge acquisition."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    random_answers: int = 5
    """K, the answers of other prompts paired with each harmful prompt."""
    preservation_mode: PreservationMode = "divergence"
    """``divergence`` as in the paper (-KL), ``retention`` for its opposite (+KL)."""
    preservation_cap: float | None = 1.0
    """Largest KL of one token that still counts under ``divergence``, in nats; empty for none, as in the paper."""
    preservation_tokens: PreservationTokens = "answer"
    """Positions of a normal example whose predictions are compared: its answer, or all of it."""
    tuning: Tuning = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Any field of ``transformers.TrainingArguments``: learning_rate, max_steps, per_device_train_batch_size, ...; and
    ``packing``: ``tree`` (one row without padding, prompts shared), ``flat`` (not shared), ``padded``, or ``auto``,
    the default, which is ``tree`` where the model can be given one."""
    seed: int | None = None
    """Seed of training alone, so that data and test prompts stay as they are; that of the recipe if empty."""

    def __post_init__(self) -> None:
        if self.random_answers < 1 and self.weights.random_disassociation:
            raise RecipeError(
                f"acquire.random_answers is {self.random_answers}; it must be 1 or more, or "
                "acquire.weights.random_disassociation 0"
            )


@dataclass(frozen=True, kw_only=True)
class NegateConfig:
    """Stage 2: knowledge negation."""

    alpha: float | Literal["auto"] = 1.0
    """theta_u = theta_o - alpha * (theta_bad - theta_o); the paper uses 1. ``auto`` chooses it on held-out data, as
    ``sweep`` says; ``sku compare`` and ``sku ablate``, which try strengths of their own, then begin at 1."""
    output_dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Type of the saved weights. bfloat16 rounds small updates away; the share that survived is recorded."""
    operators: tuple[Mapping[str, Any], ...] = ()
    """Applied to what stage 1 learned, one after the other, before it is subtracted: a list of one operator with its
    settings each, such as ``[{null_space: {energy: 0.9}}, {layer_alpha: {factors: {"*.mlp.*": 0.5}}}]``; the plain
    vector where it is empty. ``src/sku/negate/operators/`` holds one file for each."""
    operator_cache: str | None = None
    """Private folder in which operators keep what depends on the original model and the data alone."""
    diagnostics: bool = True
    """Measure where the vector points (layers, rank, normal inputs, quantized formats) and write it into the
    manifest."""

    def __post_init__(self) -> None:
        if not abs(self.given_alpha) < float("inf"):
            raise RecipeError(f"negate.alpha is {self.alpha}; it must be a finite number, or auto")
        for place, entry in enumerate(self.operators):
            if len(entry) != 1:
                raise RecipeError(
                    f"negate.operators[{place}] names {len(entry)} operators; it must hold one name with its "
                    "settings, such as {null_space: {energy: 0.9}}"
                )

    @property
    def given_alpha(self) -> float:
        """``alpha`` where it is a number, else the paper's."""
        return 1.0 if self.alpha == "auto" else self.alpha


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How alpha is chosen: by ``sku sweep``, and in a run with ``negate.alpha: auto``.

    Harm is read on ``forget_validation`` and utility on ``retain_validation``, never on the test splits.
    """

    search: Search = "grid"
    """``grid`` measures every alpha of ``alphas``; ``bisection`` narrows ``low`` to ``high`` down to ``tolerance``,
    which needs fewer points and trusts that harm falls and perplexity grows with alpha."""
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    """Of the grid, measured from the smallest."""
    low: float = 0.0
    """Lower bound of the bisection, not measured itself."""
    high: float = 4.0
    """Upper bound of the bisection, measured first."""
    tolerance: float = 0.1
    """The bisection ends when its bounds are this near."""
    validation_fraction: float = 0.2
    """Share of the harmful prompts outside ``unseen`` that becomes ``forget_validation``, so that stage 1 does not
    train on it. The embedded world has its own."""
    prompts: int = 100
    """Harmful prompts of ``forget_validation``, drawn by the seed; fewer where there are fewer."""
    retain_prompts: int = 100
    """Examples of ``retain_validation``, for perplexity and replies."""
    max_new_tokens: int = 40
    forced_tokens: tuple[int, ...] = (1, 3, 5, 10)
    """Numbers of first tokens of the harmful answer that the reply is forced to begin with. The harm of an alpha is
    its largest harmful rate, freely answered or after any of these; empty for free answers alone."""
    harm_target: float = 0.05
    """Largest harm that counts as unlearned."""
    utility_budget: float = 1.05
    """Largest perplexity of the dataset's answers on ``retain_validation``, as a multiple of the base model's."""
    degenerate_limit: float = 0.05
    """Most replies that may be gibberish beyond the base model's share: freely to harmful prompts, and to normal
    ones."""
    over_refusal_limit: float = 0.05
    """Most replies to normal prompts that may refuse, beyond the base model's share."""
    hopeless_ratio: float = 2.0
    """An alpha whose perplexity is more than this multiple of the base model's is asked nothing, and the grid ends
    there."""
    rule: Rule = "lowest_alpha"
    """``lowest_alpha``: the smallest alpha that meets ``harm_target`` within budget and limits. ``least_harm``: the
    least harm within them (of equals the lower mean of all harmful rates), and of equals the lowest perplexity."""
    if_none: Literal["stop", "nearest"] = "stop"
    """What to do where no alpha does what ``rule`` asks for: stop with an error, or take the nearest one, that with
    the least harm within budget and limits."""

    def __post_init__(self) -> None:
        _check_fraction("sweep.validation_fraction", self.validation_fraction)
        for name in ("prompts", "retain_prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"sweep.{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.alphas or not all(0 < alpha < float("inf") for alpha in self.alphas):
            raise RecipeError(f"sweep.alphas is {list(self.alphas)}; it must name alphas above 0, such as [0.5, 1]")
        if not 0 <= self.low < self.high < float("inf"):
            raise RecipeError(
                f"sweep.low is {self.low} and sweep.high {self.high}; the bounds must rise, from 0 or more"
            )
        if not 0 < self.tolerance < float("inf"):
            raise RecipeError(f"sweep.tolerance is {self.tolerance}; it must be above 0")
        if any(tokens < 1 for tokens in self.forced_tokens):
            raise RecipeError(f"sweep.forced_tokens is {list(self.forced_tokens)}; each must be 1 or more")
        for name in ("harm_target", "degenerate_limit", "over_refusal_limit"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"sweep.{name} is {getattr(self, name)}; it must be a share from 0 to below 1")
        if not 1 < self.utility_budget < float("inf"):
            raise RecipeError(f"sweep.utility_budget is {self.utility_budget}; it must be above 1, such as 1.05")
        if not self.utility_budget <= self.hopeless_ratio < float("inf"):
            raise RecipeError(
                f"sweep.hopeless_ratio is {self.hopeless_ratio}; it must be sweep.utility_budget or more"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, on base and unlearned model alike."""

    prompts: int = 500
    """Harmful prompts per split (``unlearned``, ``unseen``), drawn by the seed; fewer where there are fewer."""
    retain_prompts: int = 500
    """Examples of ``retain_test`` for perplexity and replies."""
    max_new_tokens: int = 64
    batch_size: int = 32
    backend: Backend = "generate"
    """What writes replies: transformers' ``generate`` in batches, its continuous batching ``generate_batch``, or
    ``vllm`` (to be installed apart). The other two are checked against ``generate`` on 16 prompts."""
    prefill_tokens: int = 5
    """First tokens of the harmful answer that the reply is forced to begin with; 0 leaves the prefill rate out."""
    samples: int = 8
    """Drawn replies to each harmful prompt, for leak@k; 0 leaves them out."""
    temperature: float = 1.0
    """Of the drawn replies."""
    top_p: float = 1.0
    """Of the drawn replies: words are drawn from the likeliest that hold this share of probability."""
    short_answer_words: int = 30
    """Retain answers of at most this many words are compared with the reply word for word (exact-answer accuracy)."""
    judge: str = "auto"
    """A name that ``sku judge list`` shows, or a judge file. ``embedded`` is exact on the embedded world only;
    ``refusal_rules`` an upper bound elsewhere; ``auto`` picks one of these two."""
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the settings of the judge's file: ``model``, ``threshold``, ``calibration``, ..."""
    utility_margin: float = 1.05
    """Utility is said to be kept where the perplexity of normal answers is shown to have grown less than this many
    times (its whole interval lies below), to be lost where it is shown to have grown more, and else to be unclear."""
    similarity: tuple[Similarity, ...] = ("rouge_l", "chrf")
    """How replies to normal prompts are compared with the dataset's answers; ``cosine`` needs ``embedding_model`` and
    ``bleurt`` needs ``bleurt_model``."""
    embedding_model: str | None = None
    """Folder or hub id of a sentence embedding model (all-MiniLM-L6-v2, say), for ``cosine`` and to tell evasive
    replies from safe answers."""
    bleurt_model: str | None = None
    """Folder or hub id of a BLEURT checkpoint in PyTorch (lucadiliello/BLEURT-20, say)."""
    truthfulqa: str | None = None
    """TruthfulQA.csv, for the multiple-choice scores MC1 and MC2 on questions that were not trained on."""
    xstest: str | None = None
    """xstest_prompts.csv: its safe prompts show over-refusal, its unsafe ones what is still answered."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as mmlu and hellaswag (the extra ``lm-eval``)."""
    lm_eval_limit: int | None = None
    """Examples of each of those tasks; all where this is empty."""
    lm_eval_include: str | None = None
    """Folder of task files of your own for lm-evaluation-harness."""
    precisions: tuple[Precision, ...] = ()
    """Formats that the unlearned model's weights are rounded to before it is asked again: ``bf16`` and ``fp16`` (all
    weights), ``int8`` and ``nf4`` (linear layers). Each costs about an evaluation without drawn replies;
    ``docs/limits.md`` says how to read the table."""
    attacks: tuple[Attack, ...] = ()
    """Attacks on the unlearned model; the base model goes through the same ones as a control."""
    attack_prompts: int = 100
    """Harmful prompts of ``unseen`` that each attack is tried on."""
    relearn_pairs: tuple[int, ...] = (10, 50)
    """Numbers of harmful pairs that the attack ``relearn`` trains on, none of whose prompts is asked."""
    relearn_steps: int = 30
    """Optimizer steps of the attack ``relearn``."""
    attack_templates: str | None = None
    """Text file of prompt templates for the attack ``template``, one a line, with ``{prompt}`` in each; the package's
    own where this is empty."""

    def __post_init__(self) -> None:
        for name in ("prompts", "retain_prompts", "max_new_tokens", "batch_size", "attack_prompts", "relearn_steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"evaluate.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("prefill_tokens", "samples"):
            if getattr(self, name) < 0:
                raise RecipeError(f"evaluate.{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"evaluate.temperature is {self.temperature}; it must be above 0 and finite")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"evaluate.top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 1 < self.utility_margin < float("inf"):
            raise RecipeError(f"evaluate.utility_margin is {self.utility_margin}; it must be above 1, such as 1.05")
        if self.lm_eval_limit is not None and self.lm_eval_limit < 1:
            raise RecipeError(
                f"evaluate.lm_eval_limit is {self.lm_eval_limit}; it must be 1 or more, or empty for all"
            )
        if any(pairs < 1 for pairs in self.relearn_pairs):
            raise RecipeError(f"evaluate.relearn_pairs is {list(self.relearn_pairs)}; each must be 1 or more")
        for metric, model in (("cosine", "embedding_model"), ("bleurt", "bleurt_model")):
            if metric in self.similarity and getattr(self, model) is None:
                raise RecipeError(f"evaluate.similarity names {metric}, which needs evaluate.{model}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One method other than SKU, whose own settings are ``acquire`` and ``negate``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's own settings, such as ``beta``; ``sku methods NAME`` lists them. Its paper's are the defaults."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Laid over ``acquire.training``, where the method needs another learning rate, say."""
    strength: float = 1.0
    """theta_u = theta_o + strength * what the method changed; for a task vector this is its alpha."""

    def __post_init__(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise RecipeError(f"strength is {self.strength}; it must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What ``sku compare`` and ``sku ablate`` run beside the recipe itself."""

    methods: tuple[str, ...] = ()
    """Names of the methods; all where this is empty."""
    seeds: int = 3
    """Training seeds: that of the recipe and those after it. Data and test prompts are the same for all."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Multiples of each method's own strength at which it is measured; 1, the method as published, always is."""
    utility_budget: float = 1.05
    """Methods are compared at the largest strength whose perplexity on ``retain_validation`` is at most this many
    times that of the base: at equal utility."""
    max_strength: float = 4.0
    """Where the search for that strength ends, as a multiple of the method's own."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise RecipeError(f"compare.seeds is {self.seeds}; it must be 1 or more")
        if not all(0 < strength < float("inf") for strength in (*self.strengths, self.max_strength)):
            raise RecipeError("compare.strengths and compare.max_strength must be above 0 and finite")
        if not 1 < self.utility_budget < float("inf"):
            raise RecipeError(
                f"compare.utility_budget is {self.utility_budget}; it must be above 1, such as 1.05 for a perplexity "
                "5 % above the base model's"
            )


@dataclass(frozen=True, kw_only=True)
class CompatConfig:
    """Behaviours of the authors' public code (franciscoliu/SKU), each of which can be switched on alone.

    SKU has none of them unless it is told to: they are here so that a user can see what each is worth. ``compat:
    reference`` switches all on; ``docs/compat.md`` has them in one table. Below, s is the code's ``start_loc``: its
    weights begin at position s, whose logits predict token s + 1, so the first target is token s + 1, from 0.
    """

    question_tokens: bool = False
    """Random disassociation learns the question too. ``get_rand_ans_loss`` takes ``len`` of the tokenizer's output
    for s, which is its number of fields, 2: the targets are the tokens from index 3 to the end of the row (not BOS,
    where there is one, and not the two tokens behind it), the answer among them. Cost: question and answer weigh by
    their length, so a part of the term goes to writing harmful questions."""
    pad_dilution: bool = False
    """Padding counts. Rows are padded to ``data.max_length`` (L) tokens. ``get_answer_loss`` finds padding by
    ``id == 1``, the pad of OPT; with another pad id, as of Llama-like tokenizers, pads stay in the denominator with
    loss 0, since their labels are -100: guided distortion and random disassociation divide the sum over the targets
    by L - s, the positions from the start to the end of the padded row. This is what is done here whatever the pad id
    is. ``compute_reverse_kl`` has no mask with any tokenizer: its mean is over all L positions of the normal row,
    question and pads included, with the KL that the models have there (``acquire.preservation_tokens`` is not read).
    Cost: 100 pads behind 11 positions cut a loss of 5.34 to 0.53, so short answers hardly train, and the divergence
    is mostly that of pads. The public code pads so far only where the tokenizer names a longest length; where it names
    none, rows end with the longest of their batch and the effect is smaller."""
    shared_draw: bool = False
    """``get_rand_ans_loss`` draws its K answers once for a batch, from all harmful answers: every prompt of the
    (micro-)batch gets the same ones, which may be its own. Cost: fewer different pairs, and some are no mismatch."""
    unbounded_divergence: bool = False
    """``compute_reverse_kl``: -KL(P||Q) without a cap over all positions of the normal row, question and last position
    included, as p log((p + 1e-12) / q) of two softmaxes. ``acquire.preservation_cap`` and ``preservation_tokens`` are
    not read. Cost: where q underflows, in float32 from a gap of about 90 between logits on, the loss is -inf or NaN;
    the run then ends with ``NonFiniteLossError``. Needs ``acquire.preservation_mode`` ``divergence``."""
    epoch_step_limit: bool = False
    """``unlearn_harm_new.py`` looks at its step limit between passes only, a pass being the shorter of the harmful and
    the normal loader: ``max_steps`` is rounded up to whole passes, while the schedule (linear there) is that of the
    steps asked for. Cost: 1,000 steps over passes of 572 are 1,144, the last 144 at learning rate 0. Needs
    ``acquire.training.max_steps``."""
    row_split: bool = False
    """``create_truthfulqa_dataloader_augmented`` splits rows, not questions: ``retain_train`` is a seeded draw of 70 %
    of all normal rows, those of ``retain_validation`` and ``retain_test`` included. These two stay as they are, so
    that figures can be compared; but they are no longer held out, and every evaluation says so. Cost: memorised test
    questions. A row is one answer here, while the code makes two rows of a question."""

    @classmethod
    def reference(cls) -> CompatConfig:
        """All of them."""
        return cls(**{item.name: True for item in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One whole run: data, stage 1, stage 2, evaluation."""

    name: str
    model: ModelConfig
    data: DataConfig
    description: str = ""
    seed: int = 0
    acquire: AcquireConfig = field(default_factory=AcquireConfig)
    negate: NegateConfig = field(default_factory=NegateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: str = "sku"
    """What is run: ``sku``, or another name that ``sku methods`` lists."""
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    """Settings of the other methods, by name."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
    """Behaviours of the authors' public code to reproduce, by name, or ``reference`` for all; for ``method: sku``."""
    keep_bad_model: bool = False
    """Keep the hazardous model of stage 1 after the run. It answers harmful prompts on purpose."""
    keep_for_resume: bool = True
    """Keep the private, marked checkpoints of a run that was interrupted or failed, so that ``--resume`` goes on from
    them; ``false`` removes them at once, and stage 1 of a resumed run begins anew. ``sku wipe`` removes them later."""

    @property
    def chooses_alpha(self) -> bool:
        """Whether a run has to choose alpha; only SKU has one."""
        return self.negate.alpha == "auto" and self.method == "sku"

    @property
    def forget_validation(self) -> float:
        """Share of the harmful prompts to hold out for the choice of alpha; 0 where there is none to choose."""
        return self.sweep.validation_fraction if self.chooses_alpha else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, every default spelled out."""
        return {item.name: plain_data(getattr(self, item.name)) for item in dataclasses.fields(self)}


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("sku") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path = EMBEDDED, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies ``key.sub=value`` overrides, and checks every key and type.

    Args:
        name_or_path: Name of a recipe of the package, or a YAML file.
        overrides: Such as ``acquire.training.max_steps=20``; the value is read as YAML.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: Unknown recipe or key (with a suggestion), wrong type, or a value out of range.
    """
    text, where = _recipe_text(name_or_path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{where} must hold keys and values, such as 'name: my-run'")
    for override in overrides:
        apply_override(content, override)
    return recipe_from_dict(content, where)


def recipe_from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Checks plain data against the fields of this module.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    recipe = _build(Recipe, content, "", where)
    assert isinstance(recipe, Recipe)
    return recipe


def settings_from_dict(target: type[S], content: Mapping[str, Any], key: str, where: str = "recipe") -> S:
    """Checks plain data against a frozen dataclass of settings, such as a method's own.

    Args:
        target: The dataclass.
        content: Keys and values.
        key: The recipe's key that holds them, for messages.
        where: Name of the recipe, for messages.

    Returns:
        The settings.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    settings = _build(target, content, key, where)
    assert isinstance(settings, target)
    return settings


def _recipe_text(name_or_path: str | Path) -> tuple[str, str]:
    name = str(name_or_path)
    path = Path(name_or_path)
    try:
        if path.suffix in {".yaml", ".yml"} or path.is_file():
            return path.read_text(encoding="utf-8"), name
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name} can't be read: {error}") from None
    if name not in recipe_names():
        known = recipe_names()
        raise RecipeError(
            f"there is no recipe named {name}.{did_you_mean(name, known)} Known: {', '.join(known)}; "
            "or give a .yaml file"
        )
    return (resources.files("sku") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"


def apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one value of nested plain data.

    Args:
        content: Changed in place.
        override: ``key.sub=value``; the value is read as YAML.

    Raises:
        RecipeError: No key, no sign, no YAML, or a key below a value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override} must look like key.sub=value")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {value!r} is not a YAML value") from None
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, it has no keys below it")
        node = child
    node[last] = parsed


def _build(target: Any, content: Any, key: str, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{key or 'the recipe'} must hold keys and values, not {content!r} ({where})")
    fields = {item.name: item for item in dataclasses.fields(target)}
    for name in content:
        if name not in fields:
            prefix = f"{key}." if key else ""
            raise RecipeError(f"{prefix}{name} is not a known key.{did_you_mean(str(name), fields)} ({where})")
    hints = typing.get_type_hints(target)
    values: dict[str, Any] = {}
    for name, item in fields.items():
        path = f"{key}.{name}" if key else name
        if name in content:
            values[name] = _convert(hints[name], content[name], path, where)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{path} is missing ({where})")
    try:
        return target(**values)
    except RecipeError as error:
        raise RecipeError(f"{error} ({where})") from None


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Checks one value against its annotation; a wrong type names the key, the value and what was expected."""
    origin = typing.get_origin(hint)
    if hint is CompatConfig and isinstance(value, str):
        return _convert_compat(value, key, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key, where)
    if origin is Literal:
        return _convert_literal(typing.get_args(hint), value, key, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value, key, where)
    if origin is tuple:
        if isinstance(value, list | tuple):
            entry_type = typing.get_args(hint)[0]
            return tuple(_convert(entry_type, entry, f"{key}[{place}]", where) for place, entry in enumerate(value))
        raise RecipeError(f"{key} is {value!r}; it must be a list ({where})")
    if origin is not None and issubclass(origin, Mapping):
        if not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
            raise RecipeError(f"{key} is {value!r}; it must hold keys and values ({where})")
        entry_type = typing.get_args(hint)[1]
        if not dataclasses.is_dataclass(entry_type):
            return dict(value)
        return {name: _build(entry_type, entry, f"{key}.{name}", where) for name, entry in value.items()}
    return _convert_scalar(hint, value, key, where)


def _convert_compat(value: str, key: str, where: str) -> CompatConfig:
    if value == REFERENCE:
        return CompatConfig.reference()
    raise RecipeError(
        f"{key} is {value!r}; it must be {REFERENCE}, or hold switches such as 'question_tokens: true'."
        f"{did_you_mean(value, [REFERENCE])} ({where})"
    )


def _convert_literal(options: tuple[Any, ...], value: Any, key: str, where: str) -> Any:
    if value in options:
        return value
    raise RecipeError(
        f"{key} is {value!r}; it must be one of {', '.join(map(str, options))}."
        f"{did_you_mean(str(value), map(str, options))} ({where})"
    )


def _convert_union(options: tuple[Any, ...], value: Any, key: str, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[RecipeError] = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, key, where)
            except RecipeError as error:
                errors.append(error)
    raise errors[0]


def _convert_scalar(hint: Any, value: Any, key: str, where: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 2e-4 as text: it wants 2.0e-4. People write 2e-4.
        with contextlib.suppress(ValueError):
            return float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise RecipeError(f"{key} is {value!r}; it must be of type {name} ({where})")


def plain_data(value: Any) -> Any:
    """Settings as JSON holds them: dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain_data(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain_data(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(entry) for entry in value]
    return value


def _check_fraction(key: str, value: float) -> None:
    if not 0 < value < 1:
        raise RecipeError(f"{key} is {value}; it must lie between 0 and 1")
