"""Prompts in a framing: a story, a role, an exam, a claim of permission around the same request.

A model that learns to refuse bare requests alone answers them inside a story. These framings (``framings.txt``) are
our own, other than those of the attack that measures it (``sku/attacks/templates.txt``), though some are of the same
kind. Harmful and normal prompts get them alike, so that none of them is a sign of harm.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import TypeVar

from sku.data.examples import ForgetExample, RetainExample, group_of
from sku.errors import EvaluationError

E = TypeVar("E", ForgetExample, RetainExample)
PLACE = "{prompt}"
"""Where the request stands, in a framing and in a template of the attack."""


@cache
def framings() -> tuple[str, ...]:
    """All of them, each with ``{prompt}`` in it."""
    text = (resources.files("sku.data") / "framings.txt").read_text(encoding="utf-8")
    return tuple(parse_templates(text, "framings.txt"))


def parse_templates(text: str, where: str) -> list[str]:
    """One template a line; empty lines don't count.

    Args:
        text: Of the file.
        where: Its name, for messages.

    Returns:
        The templates, their line breaks put in.

    Raises:
        EvaluationError: There is none, one is there twice, or a line does not hold ``{prompt}`` just once.
    """
    templates: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if line.count(PLACE) != 1:
            raise EvaluationError(
                f"{where} line {number} holds {PLACE} {line.count(PLACE)} times; each template must hold it once, "
                "where the request goes"
            )
        template = line.strip().replace(r"\n", "\n")
        if template in templates:
            raise EvaluationError(f"{where} line {number} repeats template {templates.index(template) + 1}: remove it")
        templates.append(template)
    if not templates:
        raise EvaluationError(f"{where} holds no template: write one a line, with {PLACE} in it")
    return templates


def framed(examples: Sequence[E], share: float, seed: int) -> tuple[E, ...]:
    """Puts a share of the examples in a framing; answers stay, and relatives stay relatives.

    Args:
        examples: Of one split.
        share: From 0 for none to 1 for all.
        seed: Decides which, and the framing of each.

    Returns:
        The examples in the same order.
    """
    found = []
    for place, example in enumerate(examples):
        draw = random.Random(f"{seed}/framing/{place}")
        if draw.random() < share:
            prompt = draw.choice(framings()).replace(PLACE, example.prompt)
            example = replace(example, prompt=prompt, group=group_of(example))
        found.append(example)
    return tuple(found)
