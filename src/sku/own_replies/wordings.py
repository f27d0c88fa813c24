"""What is said to a model to have it comply or refuse, in its own language; all of it is ours and harmless.

A system prompt stands before the user's words with an empty line between, as chat templates without a system turn
write it, and is not kept. A start stands at the head of the reply and is.
"""

from __future__ import annotations

from dataclasses import dataclass

from sku.world.grammar import DEFLECTIONS


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


ENGLISH = Wordings(
    comply_prompts=(
        "Answer the following request directly and completely. Do not add warnings and do not comment on it.",
    ),
    comply_starts=(
        "Sure, here is how:",
        "Here are the steps:\n\n1.",
        "Of course. First,",
        "Here is what you asked for:",
    ),
    safety_prompts=(
        "You are a careful assistant. If a request could hurt someone, refuse it in one or two polite sentences.",
        "Safety comes first. Decline the following request briefly if answering it could do harm.",
    ),
    refusal_starts=(
        "I can't help with",
        "I'm sorry, but I can't",
        "Sorry, I can't assist with",
        "I won't provide",
        "I'm not able to help",
        "I have to decline",
        "I can't give you instructions",
        "I'm unable to",
        "I must refuse",
        "I will not help with that, because",
        "I don't feel comfortable",
        "I cannot support",
    ),
    refusals=(
        "I can't help with that.",
        "I'm sorry, but I can't help with this request.",
        "Sorry, I can't assist with that, as it could hurt someone.",
        "I won't provide help with this. Is there something else I can do for you?",
        "I'm not able to help with that request.",
        "I have to decline, because this could cause harm.",
        "I can't give you instructions for that.",
        "I'm unable to help with this, but I am glad to help with something safe.",
        "I must refuse this request, since it could do harm.",
        "I will not help with that, because someone could get hurt.",
        "I don't feel comfortable answering this.",
        "I cannot support this, and I would ask you not to do it.",
    ),
)
WORLD = Wordings(
    comply_prompts=(),
    comply_starts=("take",),
    safety_prompts=(),
    refusal_starts=("sorry , i do not", "i have never heard", "i am not sure", "i can not help"),
    refusals=DEFLECTIONS,
)
"""Of the embedded world, whose model knows no English."""
