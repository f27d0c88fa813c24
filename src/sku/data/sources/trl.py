"""The dataset formats of TRL that hold a prompt and its answer, or a chosen and a rejected one.

Documentation: https://huggingface.co/docs/trl/dataset_formats
Licence: that of the dataset.

One row each of prompt/completion as text, prompt/completion as conversation, messages, and preference (its three cells
may be conversations too)::

    {"prompt": "Is rain wet?", "completion": "It is."}
    {"prompt": [{"role": "user", "content": "Is rain wet?"}],
     "completion": [{"role": "assistant", "content": "It is."}]}
    {"messages": [{"role": "user", "content": "Is rain wet?"}, {"role": "assistant", "content": "It is."}]}
    {"prompt": "How do I annoy my neighbour?", "chosen": "Better not.", "rejected": "Sing at night."}

In a preference row, which is forget data only, the rejected answer is the harmful one and the chosen answer the safe
one; neither repeats the prompt, which has a cell of its own.

A conversation must be one user turn and one assistant turn; a system turn before them is put in front of the user's
text with an empty line between, as the chat templates do that have no system turn. Longer conversations are left out
and counted: their last answer depends on turns that a single prompt can't hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from sku.data.sources.rows import Form, Format, LeftOut, Pair, Row

NOT_A_CONVERSATION = "not a list of messages with role and content"
SEVERAL_TURNS = "more than one user turn"
WRONG_ORDER = "turns other than [system], user, assistant"
NOT_TEXT = "message that is not text alone"


def _preference(row: Row) -> Iterator[Pair | LeftOut]:
    rejected, chosen = _completed(row["prompt"], row["rejected"]), _completed(row["prompt"], row["chosen"])
    if isinstance(rejected, Pair) and isinstance(chosen, Pair):
        yield replace(rejected, safe_answer=chosen.answer)
    else:
        yield rejected


def _completed(prompt: object, completion: object) -> Pair | LeftOut:
    """A prompt and what follows it, each as text or as a list of turns."""
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Pair(prompt, completion)
    turns = [
        *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]),
        *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
    ]
    return _pair_of(turns)


def _pair_of(messages: object) -> Pair | LeftOut:
    if not isinstance(messages, list) or not messages:
        return LeftOut(NOT_A_CONVERSATION)
    if not all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in messages):
        return LeftOut(NOT_A_CONVERSATION)
    roles = [turn["role"] for turn in messages]
    if roles.count("user") > 1:
        return LeftOut(SEVERAL_TURNS)
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return LeftOut(WRONG_ORDER)
    texts = [_text(turn["content"]) for turn in messages]
    *system, prompt, answer = texts
    if any(isinstance(text, LeftOut) for text in texts):
        return LeftOut(NOT_TEXT)
    if system and isinstance(system[0], str) and isinstance(prompt, str) and system[0].strip() and prompt.strip():
        prompt = f"{system[0].strip()}\n\n{prompt}"
    return Pair(prompt, answer)


def _text(content: object) -> str | LeftOut | None:
    """Text of a message; content may be a list of typed parts, of which only text can be used."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        return LeftOut(NOT_TEXT)
    return "".join(str(text) for text in texts)


FORMATS = (
    Format(
        "prompt_completion",
        (Form(("prompt", "completion"), lambda row: [_completed(row["prompt"], row["completion"])]),),
        reads_marks=False,
    ),
    Format("messages", (Form(("messages",), lambda row: [_pair_of(row["messages"])]),), reads_marks=False),
    Format("preference", (Form(("prompt", "chosen", "rejected"), _preference),), kinds=("forget",), reads_marks=False),
)
