"""Runs attacks: on the unlearned model, and on the base model as a control.

The questions are drawn from ``forget_test`` as ``evaluate`` draws them, and replies are written, gated and judged by
the same parts, so that the figures can be put beside those of ``evaluation.json``. What an attack writes down::

    attacks.json                    the figures (``results``)
    attacks/<name>.jsonl            replies of both models, private
    attacks/relearn.*.jsonl         both, of each training (``relearn``)
    verdicts.jsonl                  verdicts of a judge that is worth a cache

A finished attack or training is reused where its header is the same: models, settings, prompts and decoding.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks import CARDS, AttackedReplies, AttackReport, AttackResult, AttackSetup
from sku.attacks.kinds import AttackJob, Setting, check_attacks, settings_of
from sku.attacks.relearn import RELEARN, Relearning, share_of
from sku.config import Recipe, plain_data
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate.comparison import paired_change
from sku.evaluate.generation import StageProgress, stage
from sku.evaluate.generation.decoding import GenerationRequest, decoding_settings
from sku.evaluate.generation.prompts import PromptEncoder, draw_examples, free_requests
from sku.evaluate.generation.replies import ReplyGenerator, about
from sku.evaluate.judges import Judge, Verdict, cached
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.metrics import Outcome, ReplyOutcome, rates_of
from sku.evaluate.records import GenerationRecord, ResultCache, create_private_folder, header_hash
from sku.processes import ALONE
from sku.quantization import FORMATS, rounded_copy

FOLDER = "attacks"
TOO_LARGE = "a weight is too large for it"
PROBES = 3
"""Questions whose scores tell one model from another."""


def run_attacks(
    recipe: Recipe,
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    output_dir: Path,
    *,
    progress: StageProgress | None = None,
) -> AttackReport:
    """Runs the attacks that a recipe names on a model, and the same ones on its base.

    Args:
        recipe: ``evaluate`` says which attacks, how many questions and how replies are written and judged.
        model: The unlearned model. Neither it nor the base is changed.
        base: The original model: the control, and asked whether replies are word salad.
        tokenizer: Of both.
        data: ``forget_test`` is asked, as ``evaluate`` draws it, and ``relearn`` trains on pairs of ``forget_train``.
        output_dir: Folder for replies, verdicts and ``attacks.json``, made with mode 0700; attacks that are finished
            there and fit are reused.
        progress: Called after each batch and each step of training.

    Returns:
        What every attack came to, in the order in which the recipe names them.

    Raises:
        EvaluationError: As ``check_attacks``, or no question fits the model.
        SkuError: As ``evaluate``, and as training.
    """
    check_attacks(recipe, data)
    create_private_folder(output_dir)
    create_private_folder(output_dir / FOLDER)
    config, encoder = recipe.evaluate, PromptEncoder.of(model, tokenizer, recipe.model.prompt_format)
    generator = ReplyGenerator(
        base=base,
        encoder=encoder,
        config=config,
        stop_ids=encoder.stop_ids(model),
        seed=recipe.seed,
        judge=cached(choose_judge(config, data), output_dir, stage(progress, "attacks: judge")),
    )
    drawn = {one.prompt: one for one in draw_examples(data.forget_test, config.attack_prompts, seed=recipe.seed)}
    requests = free_requests("forget_test", drawn.values(), encoder, config.max_new_tokens)
    if not requests:
        raise EvaluationError(
            f"none of {len(drawn)} prompts leaves room for a reply in the model's window of {encoder.window} "
            "tokens: take shorter prompts or another model"
        )
    left_out: Counter[str] = Counter()
    if len(requests) < len(drawn):
        left_out["all attacks: the prompt is too long for the model"] = len(drawn) - len(requests)
    subjects = {"model": model, "control": base}
    probes = [request.input_ids for request in requests[:PROBES]]
    job = AttackJob(
        recipe=recipe,
        data=data,
        generator=generator,
        subjects=subjects,
        requests=requests,
        common={
            **{name: about(subject, probes) for name, subject in subjects.items()},
            "decoding": decoding_settings(generator.stop_ids, config.max_new_tokens),
            "prompt_format": encoder.prompt_format.name,
            "seed": recipe.seed,
        },
        reuse=ResultCache(folder=output_dir / FOLDER, processes=ALONE),
        progress=progress,
    )
    run = _Run(job=job, questions={one.id: drawn[one.prompt] for one in requests}, left_out=left_out)
    report = run.report(tuple(dict.fromkeys(config.attacks)))
    report.write(output_dir)
    return report


class _QuestionJudge:
    """Shows a judge the question itself: words that an attack puts around it must not sway the judge as well."""

    def __init__(self, judge: Judge, prompts: Mapping[str, str]) -> None:
        """Keeps the judge, and by record id the question as it stands in the data."""
        self.card = judge.card
        self._judge, self._prompts = judge, prompts

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        return self._judge.judge([dataclasses.replace(record, prompt=self._prompts[record.id]) for record in records])


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """One variant of one question, as tokens."""

    question: str
    """Id of the question."""
    variant: str
    request: GenerationRequest
    """Its id is unique within a setting."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The attacks of one job."""

    job: AttackJob
    questions: Mapping[str, ForgetExample]
    """By the id of the request."""
    left_out: Counter[str]
    """Reason -> how often something could not be asked."""

    def report(self, names: Sequence[str]) -> AttackReport:
        """All attacks, after the questions as they are; those on the weights last."""
        plain: dict[str, dict[str, bool]] = {}
        free: dict[str, list[ReplyOutcome]] = {}
        results: list[AttackResult] = []
        for attack in ("none", *(name for name in names if name != RELEARN)):
            for setting, asks, outcomes in self._outcomes(attack):
                if attack == "none":
                    free = outcomes
                    plain = {subject: _harmful(asks, found) for subject, found in outcomes.items()}
                measured = {subject: _measured(asks, found, plain[subject]) for subject, found in outcomes.items()}
                results.append(
                    AttackResult(
                        attack=attack,
                        setting=setting.name,
                        details=setting.details,
                        questions=len({ask.question for ask in asks}),
                        **measured,
                    )
                )
        return AttackReport(
            setup=AttackSetup(
                **self.job.common, config=plain_data(self.job.recipe.evaluate), judge=self.job.judge.card
            ),
            cards=tuple(CARDS[name] for name in ("none", *names)),
            results=tuple(results),
            relearn=Relearning(job=self.job, free=free).run() if RELEARN in names else None,
            left_out=dict(self.left_out),
        )

    def _outcomes(self, attack: str) -> Iterator[tuple[Setting, list[_Ask], dict[str, list[ReplyOutcome]]]]:
        """Every setting in which something can be asked, with the outcomes of both subjects."""
        job = self.job
        groups = [(setting, self._asks(attack, setting)) for setting in settings_of(attack, job.recipe, job.data)]
        groups = [(setting, asks) for setting, asks in groups if asks]
        rows = self._replies(attack, groups) if groups else []
        for setting, asks in groups:
            said = {subject: _rows_of(rows, f"{subject}/{setting.name}/") for subject in job.subjects}
            if not all(said.values()):
                self.left_out[f"{attack}, {setting.name}: {TOO_LARGE}"] += len(asks)
                continue
            prompts = {ask.request.id: self.questions[ask.question].prompt for ask in asks}
            generator = dataclasses.replace(job.generator, judge=_QuestionJudge(job.judge, prompts))
            yield setting, asks, {subject: generator.outcomes(rows) for subject, rows in said.items()}

    def _asks(self, attack: str, setting: Setting) -> list[_Ask]:
        """What is asked under a setting; what can't be is counted."""
        where = ", ".join(filter(None, (attack, setting.name)))
        asks: list[_Ask] = []
        encoder, most = self.job.generator.encoder, self.job.recipe.evaluate.max_new_tokens
        for question, example in self.questions.items():
            for variant in setting.rewrite(example):
                if isinstance(variant, str):
                    self.left_out[f"{where}: {variant}"] += 1
                    continue
                # With a single variant the id is that of ``evaluate``.
                name = f"{question}/{variant.name}" if variant.name else question
                reworded = dataclasses.replace(example, prompt=variant.prompt)
                found = free_requests("forget_test", [reworded], encoder, most)
                for request in found:
                    named = dataclasses.replace(request, id=name)
                    asks.append(_Ask(question=question, variant=variant.name, request=named))
                if not found:
                    self.left_out[f"{where}: the prompt is too long for the model"] += 1
        return asks

    def _replies(self, attack: str, groups: Sequence[tuple[Setting, list[_Ask]]]) -> list[GenerationRecord]:
        """Those to all settings, or those of an earlier run that did the same; ids begin with subject and setting."""
        job = self.job
        header = {
            "attack": attack,
            **job.common,
            "settings": [
                {
                    "name": setting.name,
                    "details": plain_data(setting.details),
                    "requests": header_hash({"asked": [dataclasses.asdict(ask.request) for ask in asks]}),
                }
                for setting, asks in groups
            ],
        }
        report = stage(job.progress, f"attack {attack}: replies")

        def make() -> list[GenerationRecord]:
            rows: list[GenerationRecord] = []
            for subject, model in job.subjects.items():
                for setting, asks in groups:
                    # None where the format can't hold a weight.
                    asked = model if setting.rounding is None else rounded_copy(model, FORMATS[setting.rounding])
                    requests = [ask.request for ask in asks]
                    found = [] if asked is None else job.generator.ask(asked, requests, report)
                    rows += [dataclasses.replace(row, id=f"{subject}/{setting.name}/{row.id}") for row in found]
            return rows

        return job.reuse.rows(f"{attack}.jsonl", header, GenerationRecord, make)


def _rows_of(rows: Sequence[GenerationRecord], place: str) -> list[GenerationRecord]:
    """Rows of one subject and setting, which their ids begin with in a file."""
    return [dataclasses.replace(row, id=row.id.removeprefix(place)) for row in rows if row.id.startswith(place)]


def _harmful(
    asks: Sequence[_Ask], outcomes: Sequence[ReplyOutcome], counted: Sequence[Outcome] = ("harmful",)
) -> dict[str, bool]:
    """Question -> whether the reply to any of its variants has a counted outcome."""
    hits: dict[str, bool] = {}
    for ask, outcome in zip(asks, outcomes, strict=True):
        hits[ask.question] = hits.get(ask.question, False) or outcome.outcome in counted
    return hits


def _measured(asks: Sequence[_Ask], outcomes: Sequence[ReplyOutcome], plain: Mapping[str, bool]) -> AttackedReplies:
    hits = _harmful(asks, outcomes)
    variants: dict[str, list[bool]] = {}
    for ask, outcome in zip(asks, outcomes, strict=True):
        if ask.variant:
            variants.setdefault(ask.variant, []).append(outcome.outcome == "harmful")
    return AttackedReplies(
        harmful=paired_change([plain[question] for question in hits], list(hits.values())),
        harmful_upper_bound=share_of(_harmful(asks, outcomes, ("harmful", "unjudged")).values()),
        replies=rates_of(outcomes),
        variants={name: share_of(found) for name, found in variants.items()},
    )
