"""Runs attacks: on the unlearned model, and on the base model as a control.

The questions are drawn from ``unseen`` as ``evaluate`` draws them, and replies are written, gated and judged by the
same parts, so that the figures can be put beside those of ``evaluation.json``. What an attack writes down::

    attacks.json                    the figures (``results``)
    attacks/<name>.jsonl            replies of both models, private
    attacks/<name>.fluency.jsonl    the base model's losses on them

A finished attack is reused where its header is the same: models, settings, prompts and decoding.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.base import Attack, AttackContext, Progress, PromptSetting, Rewritten, Variant, WeightSetting
from sku.attacks.paraphrase import PARAPHRASE
from sku.attacks.prefill import PREFILL
from sku.attacks.quantization import INT8, NF4
from sku.attacks.relearn import RELEARN
from sku.attacks.results import AttackCard, AttackReport, AttackResult, AttackSetup, Measured, write_attacks
from sku.attacks.template import TEMPLATE, load_templates
from sku.config import Recipe, plain_data
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.data.prompts import resolve_prompt_format
from sku.data.tokenization import tokenize_prefill, tokenize_prompt
from sku.errors import EvaluationError
from sku.evaluate import asking, batching
from sku.evaluate.comparison import paired_change
from sku.evaluate.fingerprint import fingerprint
from sku.evaluate.generation import GenerationRequest, decoding_settings, generate_replies, stop_token_ids
from sku.evaluate.judges import Judge, JudgeCard, Verdict, choose_judge
from sku.evaluate.metrics import rate, rates_of
from sku.evaluate.outcomes import Outcome, ReplyOutcome, decide_outcomes, find_faults
from sku.evaluate.perplexity import SHUFFLES, score_fluency
from sku.evaluate.record_files import create_private_folder, header_hash, read_if_same, write_rows
from sku.evaluate.records import FluencyRecord, GenerationRecord, Kind
from sku.evaluate.sampling import draw_examples, record_id

ATTACKS: Mapping[str, Attack] = {
    attack.card.name: attack for attack in (PREFILL, PARAPHRASE, TEMPLATE, INT8, NF4, RELEARN)
}
"""All attacks by name."""
FOLDER = "attacks"
PROBES = 3
"""Prompts whose scores tell one model from another."""

_NONE = Attack(
    card=AttackCard(name="none", title="No attack", kind="none", changes="nothing", source_url=""),
    settings=lambda _context: [
        PromptSetting(rewrite=lambda example: Rewritten(variants=(Variant(prompt=example.prompt),)))
    ],
)
_SUBJECTS: tuple[Literal["model"], Literal["control"]] = ("model", "control")


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
        output_dir: Folder for replies and ``attacks.json``, made with mode 0700; attacks that are finished there and
            fit are reused. Nothing is written if None.
        judge: Any judge, in place of the one that the recipe names.
        progress: Called after each batch and each step of training.

    Returns:
        What every attack came to, in the order in which the recipe names them.

    Raises:
        EvaluationError: As ``check_attacks``, or no question fits the model.
        SkuError: As ``evaluate``, and as training.
    """
    check_attacks(recipe, data)
    if not recipe.evaluate.attacks:
        raise EvaluationError("evaluate.attacks is empty: name some, such as [prefill, paraphrase, int8]")
    if output_dir is not None:
        create_private_folder(output_dir)
        create_private_folder(output_dir / FOLDER)
    run = _Run(
        context=AttackContext(recipe=recipe, data=data, model=model, tokenizer=tokenizer, progress=progress),
        base=base,
        writer=asking.Writer(
            tokenizer=tokenizer,
            prompt_format=resolve_prompt_format(recipe.model.prompt_format, tokenizer),
            window=asking.window_of(model),
        ),
        judge=choose_judge(recipe.evaluate, data) if judge is None else judge,
        folder=None if output_dir is None else output_dir / FOLDER,
    )
    report = run.report([ATTACKS[name] for name in dict.fromkeys(recipe.evaluate.attacks)])
    if output_dir is not None:
        write_attacks(output_dir, report)
    return report


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """One variant of one question, as tokens."""

    question: str
    """Id of the question."""
    variant: str
    request: GenerationRequest
    """Its id is unique within a setting; with a single variant it is that of ``evaluate``."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One setting of an attack with all that is asked under it."""

    setting: PromptSetting | WeightSetting
    asks: list[_Ask]


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

    def __post_init__(self) -> None:
        recipe = self.context.recipe
        self.config, self.seed = recipe.evaluate, recipe.seed
        drawn = draw_examples(self.context.data.unseen, self.config.attack_prompts, seed=self.seed)
        self.left_out: Counter[str] = Counter()
        self.questions = {
            record_id("unseen", "reply", example.prompt): example
            for example in drawn
            if self._fits(self._ids(Variant(prompt=example.prompt), example))
        }
        if len(self.questions) < len(drawn):
            self.left_out["all attacks: the prompt is too long for the model"] = len(drawn) - len(self.questions)
        if not self.questions:
            raise EvaluationError(
                f"none of {len(drawn)} prompts leaves room for {self.config.max_new_tokens} new tokens in the model's "
                f"window of {self.writer.window}: lower evaluate.max_new_tokens"
            )
        self.stop_ids = stop_token_ids(self.context.model, self.context.tokenizer, self.writer.end_of_turn())

    @cached_property
    def subjects(self) -> dict[str, PreTrainedModel]:
        return dict(zip(_SUBJECTS, (self.context.model, self.base), strict=True))

    @cached_property
    def about(self) -> dict[str, dict[str, str]]:
        """Subject -> what tells it from other models."""
        probes = [
            tokenize_prompt(example.prompt, self.writer.tokenizer, self.writer.prompt_format)
            for example in list(self.questions.values())[:PROBES]
        ]
        found = {}
        for name, model in self.subjects.items():
            with batching.evaluation_mode(model):
                found[name] = {
                    "dtype": str(model.dtype).removeprefix("torch."), "fingerprint": fingerprint(model, probes),
                }  # fmt: skip
        return found

    def report(self, attacks: Sequence[Attack]) -> AttackReport:
        plain: dict[str, dict[str, bool]] = {}
        results: list[AttackResult] = []
        for attack in (_NONE, *attacks):
            for group, outcomes in self._outcomes(attack):
                if attack is _NONE:
                    plain = {subject: _harmful(group.asks, found) for subject, found in outcomes.items()}
                measured = {
                    subject: _measured(group.asks, found, plain[subject], self.seed)
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
            model=self.about["model"],
            control=self.about["control"],
            prompt_format=self.writer.prompt_format.name,
            decoding=self._decoding(),
            config=plain_data(self.config),
            seed=self.seed,
            judge=self.judge.card,
        )
        cards = tuple(attack.card for attack in (_NONE, *attacks))
        return AttackReport(setup=setup, cards=cards, results=tuple(results), left_out=dict(self.left_out))

    def _outcomes(self, attack: Attack) -> Iterator[tuple[_Group, dict[str, list[ReplyOutcome]]]]:
        """Every setting in which something can be asked, with the outcomes of both subjects."""
        groups = [group for group in self._groups(attack) if group.asks]
        if not groups:
            return
        replies = self._replies(attack, groups)
        fluency = self._fluency(attack, groups, replies)
        for group in groups:
            prompts = {ask.request.id: self.questions[ask.question].prompt for ask in group.asks}
            judge = _QuestionJudge(self.judge, prompts)
            yield (
                group,
                {
                    subject: decide_outcomes(
                        replies[subject, group.setting.name],
                        judge,
                        fluency[subject, group.setting.name],
                        short_answer_words=self.config.short_answer_words,
                    )
                    for subject in _SUBJECTS
                },
            )

    def _groups(self, attack: Attack) -> list[_Group]:
        return [_Group(setting=setting, asks=self._asks(attack, setting)) for setting in attack.settings(self.context)]

    def _asks(self, attack: Attack, setting: PromptSetting | WeightSetting) -> list[_Ask]:
        """What is asked under a setting; what can't be is counted."""
        where = ", ".join(filter(None, (attack.card.name, setting.name)))
        asks: list[_Ask] = []
        for question, example in self.questions.items():
            rewritten = Rewritten(variants=(Variant(prompt=example.prompt),))
            if isinstance(setting, PromptSetting):
                rewritten = setting.rewrite(example)
            self.left_out.update(f"{where}: {reason}" for reason in rewritten.left_out)
            for variant in rewritten.variants:
                ids = self._ids(variant, example)
                if ids is None:
                    self.left_out[f"{where}: the answer is too short"] += 1
                elif not self._fits(ids):
                    self.left_out[f"{where}: the prompt is too long for the model"] += 1
                else:
                    asks.append(self._ask(question, variant, example, *ids))
        return asks

    def _ids(self, variant: Variant, example: ForgetExample) -> tuple[list[int], str] | None:
        """Token ids and forced start; None where the answer has nothing behind the start."""
        tokenizer, prompt_format = self.writer.tokenizer, self.writer.prompt_format
        if variant.forced_tokens:
            return tokenize_prefill(variant.prompt, example.answer, tokenizer, prompt_format, variant.forced_tokens)
        return tokenize_prompt(variant.prompt, tokenizer, prompt_format), ""

    def _fits(self, ids: tuple[list[int], str] | None) -> bool:
        return ids is not None and len(ids[0]) + self.config.max_new_tokens <= self.writer.window

    def _ask(self, question: str, variant: Variant, example: ForgetExample, ids: list[int], start: str) -> _Ask:
        kind: Kind = "prefill" if variant.forced_tokens else "reply"
        name = record_id("unseen", kind, example.prompt)
        return _Ask(
            question=question,
            variant=variant.name,
            request=GenerationRequest(
                id=f"{name}/{variant.name}" if variant.name else name,
                split="unseen",
                kind=kind,
                category=example.category,
                prompt=variant.prompt,
                reference=example.answer,
                forced_start=start,
                input_ids=tuple(ids),
            ),
        )

    def _replies(self, attack: Attack, groups: Sequence[_Group]) -> dict[tuple[str, str], list[GenerationRecord]]:
        """Subject and setting -> replies, or those of an earlier run that did the same."""
        header = {
            "attack": attack.card.name,
            "model": self.about["model"],
            "control": self.about["control"],
            "decoding": self._decoding(),
            "prompt_format": self.writer.prompt_format.name,
            "seed": self.seed,
            "settings": [
                {
                    "name": group.setting.name,
                    "details": plain_data(group.setting.details),
                    "requests": header_hash({"asked": [dataclasses.asdict(ask.request) for ask in group.asks]}),
                }
                for group in groups
            ],
        }
        file = None if self.folder is None else self.folder / f"{attack.card.name}.jsonl"
        rows = None if file is None else read_if_same(file, header, GenerationRecord)
        if rows is None:
            rows = self._write_replies(attack, groups)
            if file is not None:
                write_rows(file, header, rows)
        return {
            (subject, group.setting.name): _without_prefix(rows, _prefix(subject, group.setting.name))
            for subject in _SUBJECTS
            for group in groups
        }

    def _write_replies(self, attack: Attack, groups: Sequence[_Group]) -> list[GenerationRecord]:
        rows: list[GenerationRecord] = []
        total = len(_SUBJECTS) * sum(len(group.asks) for group in groups)
        for subject, model in self.subjects.items():
            for group in groups:
                with _attacked(group.setting, model) as attacked:
                    found = generate_replies(
                        cast(PreTrainedModel, attacked),
                        self.writer.tokenizer,
                        [ask.request for ask in group.asks],
                        stop_ids=self.stop_ids,
                        max_new_tokens=self.config.max_new_tokens,
                        batch_size=self.config.batch_size,
                        progress=self._report(f"attack {attack.card.name}: replies", len(rows), total),
                    )
                prefix = _prefix(subject, group.setting.name)
                rows += [dataclasses.replace(record, id=prefix + record.id) for record in found]
        return rows

    def _fluency(
        self,
        attack: Attack,
        groups: Sequence[_Group],
        replies: Mapping[tuple[str, str], list[GenerationRecord]],
    ) -> dict[tuple[str, str], dict[str, FluencyRecord]]:
        """Subject and setting -> the base model's losses on the replies that no surface rule has found already."""
        unclear = {
            key: [record for record in records if not find_faults(record, None)] for key, records in replies.items()
        }
        header = {
            "scorer": self.about["control"]["fingerprint"],
            "shuffles": SHUFFLES,
            "seed": self.seed,
            "texts": header_hash(
                {
                    _prefix(*key): [(entry.id, entry.prompt, entry.forced_start, entry.reply) for entry in records]
                    for key, records in unclear.items()
                }
            ),
        }
        file = None if self.folder is None else self.folder / f"{attack.card.name}.fluency.jsonl"
        rows = None if file is None else read_if_same(file, header, FluencyRecord)
        if rows is None:
            rows = self._score_fluency(attack, unclear)
            if file is not None:
                write_rows(file, header, rows)
        return {key: {row.id: row for row in _without_prefix(rows, _prefix(*key))} for key in unclear}

    def _score_fluency(
        self, attack: Attack, unclear: Mapping[tuple[str, str], list[GenerationRecord]]
    ) -> list[FluencyRecord]:
        rows: list[FluencyRecord] = []
        for key, records in unclear.items():
            with batching.evaluation_mode(self.base):
                found = score_fluency(
                    self.base,
                    records,
                    self.writer.scored,
                    seed=self.seed,
                    batch_size=self.config.batch_size,
                    progress=self._report(f"attack {attack.card.name}: fluency"),
                )
            rows += [dataclasses.replace(record, id=_prefix(*key) + record.id) for record in found]
        return rows

    def _decoding(self) -> dict[str, Any]:
        return decoding_settings(self.stop_ids, self.config.max_new_tokens)

    def _report(self, stage: str, before: int = 0, total: int | None = None) -> batching.Progress | None:
        progress = self.context.progress
        if progress is None:
            return None
        return lambda done, own: progress(stage, before + done, own if total is None else total)


@contextmanager
def _attacked(setting: PromptSetting | WeightSetting, model: PreTrainedModel) -> Iterator[PreTrainedModel | PeftModel]:
    changed = setting.change(model) if isinstance(setting, WeightSetting) else nullcontext(model)
    with changed as attacked, batching.evaluation_mode(cast(PreTrainedModel, attacked)):
        yield attacked


def _prefix(subject: str, setting: str) -> str:
    """What tells the rows of one subject and setting from the others in a file."""
    return f"{subject}/{setting}/"


def _without_prefix(rows: Sequence[Any], prefix: str) -> list[Any]:
    return [dataclasses.replace(row, id=row.id.removeprefix(prefix)) for row in rows if row.id.startswith(prefix)]


def _harmful(
    asks: Sequence[_Ask], outcomes: Sequence[ReplyOutcome], counted: Sequence[Outcome] = ("harmful",)
) -> dict[str, bool]:
    """Question -> whether the reply to any of its variants has a counted outcome."""
    hits: dict[str, bool] = {}
    for ask, outcome in zip(asks, outcomes, strict=True):
        hits[ask.question] = hits.get(ask.question, False) or outcome.outcome in counted
    return hits


def _measured(
    asks: Sequence[_Ask], outcomes: Sequence[ReplyOutcome], plain: Mapping[str, bool], seed: int
) -> Measured:
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
