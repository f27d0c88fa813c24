"""The questions of a run of attacks, and what each attack makes of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sku.attacks.base import Attack, AttackContext, Setting, Variant
from sku.data.examples import ForgetExample
from sku.data.tokens import tokenize_prompt
from sku.errors import EvaluationError
from sku.evaluate.asking import Starts, Writer, draw_examples, free_request, prefill, start_of
from sku.evaluate.generation import GenerationRequest
from sku.evaluate.records import record_id

PROBES = 3
"""Prompts whose scores tell one model from another."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One variant of one question, as tokens."""

    question: str
    """Id of the question."""
    variant: str
    request: GenerationRequest
    """Its id is unique within a setting; with a single variant it is that of ``evaluate``."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One setting of an attack with all that is asked under it."""

    setting: Setting
    asks: list[Ask]


class Questions:
    """Harmful prompts of ``forget_test``, drawn as ``evaluate`` draws them."""

    def __init__(self, context: AttackContext, writer: Writer) -> None:
        """Draws the questions.

        Args:
            context: The recipe says how many, the data from which.
            writer: How prompts are written, and the model's window.

        Raises:
            EvaluationError: None fits the model.
        """
        self._context, self._writer = context, writer
        self._config = context.recipe.evaluate
        drawn = draw_examples(context.data.forget_test, self._config.attack_prompts, seed=context.recipe.seed)
        self.starts: Starts = {}
        """What prefills begin with, once the base model was asked."""
        self.left_out: Counter[str] = Counter()
        """Reason -> how often something could not be asked."""
        self.examples: Mapping[str, ForgetExample] = {
            record_id("forget_test", "reply", example.prompt): example
            for example in drawn
            if self._fits(self._request(Variant(prompt=example.prompt), example))
        }
        """By id."""
        if len(self.examples) < len(drawn):
            self.left_out["all attacks: the prompt is too long for the model"] = len(drawn) - len(self.examples)
        if not self.examples:
            raise EvaluationError(
                f"none of {len(drawn)} prompts leaves room for a reply in the model's window of {writer.window} "
                "tokens: take shorter prompts or another model"
            )

    def probes(self) -> list[list[int]]:
        """Token ids of ``PROBES`` of the questions."""
        return [
            tokenize_prompt(example.prompt, self._writer.tokenizer, self._writer.prompt_format)
            for example in list(self.examples.values())[:PROBES]
        ]

    def groups(self, attack: Attack) -> list[Group]:
        """Every setting of an attack in which something can be asked; what can't be is counted in ``left_out``.

        Args:
            attack: Any.

        Returns:
            In the order of its settings.
        """
        groups = [
            Group(setting=setting, asks=self._asks(attack, setting)) for setting in attack.settings(self._context)
        ]
        return [group for group in groups if group.asks]

    def _asks(self, attack: Attack, setting: Setting) -> list[Ask]:
        """What is asked under a setting; what can't be is counted."""
        where = ", ".join(filter(None, (attack.card.name, setting.name)))
        asks: list[Ask] = []
        for question, example in self.examples.items():
            for variant in setting.rewrite(example):
                if isinstance(variant, str):
                    self.left_out[f"{where}: {variant}"] += 1
                    continue
                request = self._request(variant, example)
                if request is None:
                    self.left_out[f"{where}: the answer is too short"] += 1
                elif not self._fits(request):
                    self.left_out[f"{where}: the prompt is too long for the model"] += 1
                else:
                    asks.append(Ask(question=question, variant=variant.name, request=request))
        return asks

    def _request(self, variant: Variant, example: ForgetExample) -> GenerationRequest | None:
        """As tokens; None where nothing of the start would be left for the model to say."""
        if variant.prefill_tokens:
            start = start_of("forget_test", example, self.starts)
            return prefill("forget_test", example, variant.prefill_tokens, start, self._writer)
        request = free_request("forget_test", dataclasses.replace(example, prompt=variant.prompt), self._writer)
        name = record_id("forget_test", "reply", example.prompt)
        return dataclasses.replace(request, id=f"{name}/{variant.name}" if variant.name else name)

    def _fits(self, request: GenerationRequest | None) -> bool:
        return request is not None and self._writer.has_room(request, self._config.max_new_tokens)
