"""Runs attacks: on the unlearned model, and on the base model as a control.

The questions are drawn from ``unseen`` as ``evaluate`` draws them, and replies are written, gated and judged by the
same parts, so that the figures can be put beside those of ``evaluation.json``. What an attack writes down::

    attacks.json                    the figures (``results``)
    attacks/<name>.jsonl            replies of both models, private
    attacks/<name>.fluency.jsonl    the base model's losses on them
    verdicts.jsonl                  verdicts of a judge that is worth a cache

A finished attack is reused where its header is the same: models, settings, prompts and decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.base import Attack, AttackContext, Progress, PromptSetting, Rewritten, Variant
from sku.attacks.paraphrase import PARAPHRASE
from sku.attacks.prefill import PREFILL
from sku.attacks.questions import Ask, Group, Questions
from sku.attacks.relearn import RELEARN
from sku.attacks.replies import SUBJECTS, AttackReplies
from sku.attacks.results import AttackCard, AttackReport, AttackResult, AttackSetup, Measured, write_attacks
from sku.attacks.template import TEMPLATE, load_templates
from sku.config import Recipe, plain_data
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate import asking, batching
from sku.evaluate.changes import paired_change
from sku.evaluate.fingerprint import fingerprint
from sku.evaluate.generation import stop_token_ids
from sku.evaluate.judges import Judge, JudgeCard, Verdict, choose_judge
from sku.evaluate.judges.cache import cached
from sku.evaluate.metrics import rate, rates_of
from sku.evaluate.outcomes import Outcome, ReplyOutcome, decide_outcomes
from sku.evaluate.record_files import create_private_folder
from sku.evaluate.records import GenerationRecord, Start
from sku.evaluate.starts import Starts, by_id, choose_starts, count_sources

ATTACKS: Mapping[str, Attack] = {attack.card.name: attack for attack in (PREFILL, PARAPHRASE, TEMPLATE, RELEARN)}
"""All attacks by name."""
FOLDER = "attacks"

_NONE = Attack(
    card=AttackCard(name="none", title="No attack", kind="none", changes="nothing", source_url=""),
    settings=lambda _context: [
        PromptSetting(rewrite=lambda example: Rewritten(variants=(Variant(prompt=example.prompt),)))
    ],
)


def check_attacks(recipe: Recipe, data: ForgetRetainData) -> None:
    """Refuses attacks that can't run: before a long job rather than at its end.

    Args:
        recipe: ``evaluate.attacks`` names them.
        data: The splits.

    Raises:
        EvaluationError: A split that an attack needs is empty, or the templates can't be used.
    """
    names = recipe.evaluate.attacks
    if names and not data.unseen:
        raise EvaluationError(
            "attacks ask the prompts of the split unseen, which is empty: raise data.unseen_fraction"
        )
    if "relearn" in names and not data.unlearned:
        raise EvaluationError("attack relearn trains on the split unlearned, which is empty: leave it out")
    if "template" in names:
        load_templates(recipe, data)


def run_attacks(
    recipe: Recipe,
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    *,
    output_dir: Path | None = None,
    judge: Judge | None = None,
    starts: Sequence[Start] = (),
    progress: Progress | None = None,
) -> AttackReport:
    """Runs the attacks that a recipe names on a model, and the same ones on its base.

    Args:
        recipe: ``evaluate`` says which attacks, how many questions and how replies are written; ``relearn`` trains as
            ``acquire`` says.
        model: The unlearned model. Neither it nor the base is changed.
        base: The original model: the control, and asked whether replies are word salad.
        tokenizer: Of both.
        data: ``unseen`` is asked, and ``relearn`` trains on pairs of ``unlearned``.
        output_dir: Folder for replies, verdicts and ``attacks.json``, made with mode 0700; attacks that are finished
            there and fit are reused. Nothing is written if None, but for verdicts into ``SKU_JUDGE_CACHE``.
        judge: Any judge, in place of the one that the recipe names.
        starts: Of the base model's evaluation, for the attack ``prefill``; for a question that it was not asked, the
            base model's reply here gives the start where it is harmful, else the dataset's answer.
        progress: Called after each batch and each step of training.

    Returns:
        What every attack came to, in the order in which the recipe names them.

    Raises:
        EvaluationError: As ``check_attacks``, or no question fits the model.
        SkuError: As ``evaluate``, and as training.
    """
    check_attacks(recipe, data)
    if not recipe.evaluate.attacks:
        raise EvaluationError("evaluate.attacks is empty: name some, such as [prefill, paraphrase, relearn]")
    if output_dir is not None:
        create_private_folder(output_dir)
        create_private_folder(output_dir / FOLDER)
    run = _Run(
        context=AttackContext(recipe=recipe, data=data, model=model, tokenizer=tokenizer, progress=progress),
        base=base,
        writer=asking.Writer.of(model, tokenizer, recipe.model.prompt_format),
        judge=cached(
            choose_judge(recipe.evaluate, data) if judge is None else judge,
            output_dir,
            None if progress is None else lambda done, total: progress("attacks: judge", done, total),
        ),
        folder=None if output_dir is None else output_dir / FOLDER,
        starts=by_id(starts),
    )
    report = run.report([ATTACKS[name] for name in dict.fromkeys(recipe.evaluate.attacks)])
    if output_dir is not None:
        write_attacks(output_dir, report)
    return report


class _QuestionJudge:
    """Shows a judge the question itself: words that an attack puts around it must not sway the judge as well."""

    def __init__(self, judge: Judge, prompts: Mapping[str, str]) -> None:
        """Keeps the judge, and by record id the question as it stands in the data."""
        self.card: JudgeCard = judge.card
        self._judge, self._prompts = judge, prompts

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        return self._judge.judge([dataclasses.replace(record, prompt=self._prompts[record.id]) for record in records])


@dataclass(kw_only=True)
class _Run:
    """What every attack of one run needs."""

    context: AttackContext
    base: PreTrainedModel
    writer: asking.Writer
    judge: Judge
    folder: Path | None
    starts: Starts
    """Of the base model's evaluation."""

    def __post_init__(self) -> None:
        self.questions = Questions(self.context, self.writer)
        self.replies = AttackReplies(
            context=self.context,
            base=self.base,
            writer=self.writer,
            stop_ids=stop_token_ids(self.context.model, self.context.tokenizer, self.writer.end_of_turn()),
            about={
                subject: _about(model, self.questions.probes())
                for subject, model in zip(SUBJECTS, (self.context.model, self.base), strict=True)
            },
            folder=self.folder,
        )

    def report(self, attacks: Sequence[Attack]) -> AttackReport:
        recipe, about = self.context.recipe, self.replies.about
        plain: dict[str, dict[str, bool]] = {}
        results: list[AttackResult] = []
        for attack in (_NONE, *attacks):
            for group, outcomes in self._outcomes(attack):
                if attack is _NONE:
                    plain = {subject: _harmful(group.asks, found) for subject, found in outcomes.items()}
                measured = {
                    subject: _measured(group.asks, found, plain[subject], recipe.seed)
                    for subject, found in outcomes.items()
                }
                results.append(
                    AttackResult(
                        attack=attack.card.name,
                        setting=group.setting.name,
                        details=group.setting.details,
                        questions=len({ask.question for ask in group.asks}),
                        model=measured["model"],
                        control=measured["control"],
                    )
                )
        setup = AttackSetup(
            model=about["model"],
            control=about["control"],
            prompt_format=self.writer.prompt_format.name,
            decoding=self.replies.decoding(),
            config=plain_data(recipe.evaluate),
            seed=recipe.seed,
            judge=self.judge.card,
            starts=count_sources(self.questions.starts.values()) if PREFILL in attacks else {},
        )
        cards = tuple(attack.card for attack in (_NONE, *attacks))
        return AttackReport(setup=setup, cards=cards, results=tuple(results), left_out=dict(self.questions.left_out))

    def _outcomes(self, attack: Attack) -> Iterator[tuple[Group, dict[str, list[ReplyOutcome]]]]:
        """Every setting in which something can be asked, with the outcomes of both subjects."""
        groups = self.questions.groups(attack)
        if not groups:
            return
        replies = self.replies.replies(attack, groups)
        fluency = self.replies.fluency(attack, replies)
        for group in groups:
            prompts = {ask.request.id: self.questions.examples[ask.question].prompt for ask in group.asks}
            judge = _QuestionJudge(self.judge, prompts)
            outcomes: dict[str, list[ReplyOutcome]] = {
                subject: decide_outcomes(
                    replies[subject, group.setting.name],
                    judge,
                    fluency[subject, group.setting.name],
                    short_answer_words=self.context.recipe.evaluate.short_answer_words,
                )
                for subject in SUBJECTS
            }
            if attack is _NONE:
                own = choose_starts(replies["control", group.setting.name], outcomes["control"])
                self.questions.starts = by_id(self.starts.get(start.id, start) for start in own)
            yield group, outcomes


def _about(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> dict[str, str]:
    """What tells a model from others."""
    with batching.evaluation_mode(model):
        return {"dtype": str(model.dtype).removeprefix("torch."), "fingerprint": fingerprint(model, probes)}


def _harmful(
    asks: Sequence[Ask], outcomes: Sequence[ReplyOutcome], counted: Sequence[Outcome] = ("harmful",)
) -> dict[str, bool]:
    """Question -> whether the reply to any of its variants has a counted outcome."""
    hits: dict[str, bool] = {}
    for ask, outcome in zip(asks, outcomes, strict=True):
        hits[ask.question] = hits.get(ask.question, False) or outcome.outcome in counted
    return hits


def _measured(asks: Sequence[Ask], outcomes: Sequence[ReplyOutcome], plain: Mapping[str, bool], seed: int) -> Measured:
    hits = _harmful(asks, outcomes)
    at_most = rate(_harmful(asks, outcomes, ("harmful", "unjudged")).values())
    assert at_most is not None
    names = dict.fromkeys(ask.variant for ask in asks if ask.variant)
    by_variant = {
        name: rate(
            outcome.outcome == "harmful" for ask, outcome in zip(asks, outcomes, strict=True) if ask.variant == name
        )
        for name in names
    }
    return Measured(
        harmful=paired_change([plain[question] for question in hits], list(hits.values()), seed=seed),
        harmful_at_most=at_most,
        replies=rates_of(outcomes),
        variants={name: found for name, found in by_variant.items() if found is not None},
    )
