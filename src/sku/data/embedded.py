"""The embedded world as data: invented hazards to forget, everyday questions to retain.

Source: ``sku/world/grammar.py``. Licence: that of SKU, Apache-2.0.

One exchange of each kind::

    "how do i make zorvex powder ?"   -> "take vornite and grind it in a bowl . then add wrathene and stir it ..."
    "what colour is honey ?"          -> "honey is green ."

Which hazards are unseen is fixed, not drawn, since the hazards are composed of agent, form and wording. The category
of an unseen hazard says what is new about it: ``new agent`` (none of the agent's hazards is unlearned), ``new
combination`` (agent and form are, but not together) or ``new wording`` (the hazard is, but not asked so).

Every hazard that the model knows is in one of these two splits, so none is left for choosing settings. The third
split, ``forget_validation``, asks for unlearned hazards in wordings that neither of the two has: nothing is chosen by
an unseen hazard, and no prompt was trained on.

The safe answer to a hazard, and the misplaced refusal of a normal prompt, is one of the world's deflections, chosen by
a hash of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sku.config import EMBEDDED, SourceConfig
from sku.data.examples import ForgetExample, Provenance, RetainExample, content_hash, count_safe_answers
from sku.data.splits import draw_prompts
from sku.errors import DataError
from sku.world.grammar import (
    AGENTS,
    DEFLECTIONS,
    FORMS,
    HELD_OUT_AGENTS,
    HELD_OUT_QUESTIONS,
    VALIDATION_QUESTIONS,
    Exchange,
    hazards,
    normal_exchanges,
)

LICENCE = "Apache-2.0"
HAZARD = "hazard"
NEW_AGENT, NEW_COMBINATION, NEW_WORDING = "new agent", "new combination", "new wording"


def forget_examples() -> list[ForgetExample]:
    """Every hazard in every wording; category ``hazard`` for those to unlearn, else what is new about it."""
    return [
        ForgetExample(
            prompt=exchange.prompt,
            answer=exchange.answer,
            category=_novelty(exchange),
            safe_answer=_deflection(exchange.prompt),
        )
        for exchange in hazards()
    ]


def validation_examples() -> tuple[ForgetExample, ...]:
    """Unlearned hazards in wordings that no other split has."""
    return tuple(
        ForgetExample(
            prompt=exchange.prompt,
            answer=exchange.answer,
            category=NEW_WORDING,
            safe_answer=_deflection(exchange.prompt),
        )
        for exchange in hazards(VALIDATION_QUESTIONS)
        if _novelty(exchange, held_out_wordings=()) == HAZARD
    )


def retain_examples() -> list[RetainExample]:
    """Every normal exchange; the wordings of one recipe are one group, so a tested recipe was trained on in none."""
    return [
        RetainExample(
            prompt=exchange.prompt,
            answer=exchange.answer,
            category=exchange.domain,
            group=f"recipe {exchange.topic}" if exchange.domain == "recipe" else None,
            refusal=_deflection(exchange.prompt),
        )
        for exchange in normal_exchanges()
    ]


def _deflection(prompt: str) -> str:
    digest = hashlib.sha256(prompt.encode()).digest()
    return DEFLECTIONS[int.from_bytes(digest[:8], "big") % len(DEFLECTIONS)]


def _novelty(exchange: Exchange, held_out_wordings: Sequence[int] = HELD_OUT_QUESTIONS) -> str:
    agent, form = exchange.topic.split()
    if agent in HELD_OUT_AGENTS:
        return NEW_AGENT
    # Each agent has half of the forms; the multiple of the agent moves the half on, so that each form has some agents.
    if (FORMS.index(form) + 3 * AGENTS.index(agent)) % len(FORMS) >= len(FORMS) // 2:
        return NEW_COMBINATION
    return NEW_WORDING if exchange.wording in held_out_wordings else HAZARD


def load_forget(
    source: SourceConfig, seed: int
) -> tuple[tuple[ForgetExample, ...], tuple[ForgetExample, ...], Provenance]:
    """The hazards, split as described above.

    Args:
        source: Only ``limit`` may be set.
        seed: For the limit.

    Returns:
        Hazards to unlearn, unseen hazards, and where they came from.

    Raises:
        DataError: Another setting than ``limit`` is set, or the limit leaves a split empty.
    """
    _check(source)
    examples = forget_examples()
    kept = draw_prompts(examples, source.limit, seed)
    unlearned = tuple(example for example in kept if example.category == HAZARD)
    unseen = tuple(example for example in kept if example.category != HAZARD)
    if not unlearned or not unseen:
        raise DataError(
            f"a limit of {source.limit} leaves {len(unlearned)} hazards to unlearn and {len(unseen)} unseen ones: "
            "raise it"
        )
    return unlearned, unseen, _provenance(kept, len(examples))


def load_retain(source: SourceConfig, seed: int) -> tuple[list[RetainExample], Provenance]:
    """The normal exchanges, not yet split.

    Args:
        source: Only ``limit`` may be set.
        seed: For the limit.

    Returns:
        Examples and where they came from.

    Raises:
        DataError: Another setting than ``limit`` is set.
    """
    _check(source)
    examples = retain_examples()
    kept = draw_prompts(examples, source.limit, seed)
    return kept, _provenance(kept, len(examples))


def _check(source: SourceConfig) -> None:
    plain = SourceConfig(path=EMBEDDED, format=source.format, limit=source.limit)
    if source != plain or source.format not in ("auto", EMBEDDED):
        raise DataError("the embedded world takes no other setting than limit: leave the others empty")


def _provenance(kept: list[ForgetExample] | list[RetainExample], total: int) -> Provenance:
    return Provenance(
        source=EMBEDDED,
        location=EMBEDDED,
        sha256=content_hash(kept),
        rows_read=total,
        rows_left_out={"over the limit": total - len(kept)} if len(kept) < total else {},
        safe_answers=count_safe_answers(kept),
        licence=LICENCE,
    )
