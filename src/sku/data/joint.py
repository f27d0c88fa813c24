"""Joint examples: what a training step sees at once.

One joint example of SKU is a harmful pair, K harmful answers of other prompts put after the same prompt, and a normal
pair. Other methods take other rows; all take them from here, so that they see the same prompts in the same order.

A share of the prompts may stand in a framing: a form, an exam, a claim of permission, pressure around the same
request. A model that learns to refuse bare requests alone answers them inside another text. These framings
(``framings.txt``) are of other families than those of the attack that measures it (``sku/attacks/templates.txt``: a
role, a story, a translation, ...), so that the attack asks what was not trained on. Harmful and normal prompts get
them alike, so that none of them is a sign of harm.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from importlib import resources

from torch.utils.data import Dataset, Sampler

from sku.config.data import EMBEDDED
from sku.data.batches import JointExample
from sku.data.examples import (
    E,
    Example,
    ForgetRetainData,
    RetainExample,
    RowPlan,
    RowType,
    group_of,
)
from sku.data.tokens import Encoder, TokenizationReport, TokenizedExample, decoded
from sku.errors import DataError

PLACE = "{prompt}"
"""Where the request stands, in a framing and in a template of the attack."""
FILLER = -1
"""Place that stands for no example: where one of several processes has none left at the end of an epoch."""
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "Sorry, I won't give any help with that.",
    "I'm not able to help with this.",
)
"""Safe answers for prompts that have none of their own, where a method asks for it."""


def check_fits(data: ForgetRetainData, rows: RowPlan) -> None:
    """Refuses data without a refusal for some prompt, where each needs one, and framings of the embedded world.

    Raises:
        DataError: How many lack one, or that its model knows no English; and what to do.
    """
    if rows.framed_share and any(item.source == EMBEDDED for item in data.provenance):
        raise DataError(
            "acquire.framed_share puts prompts in English framings, and the model of the embedded world knows no "
            "English: set it to 0"
        )
    refusals = [example.safe_answer for example in data.forget_train] if rows.safe == "all" else []
    misplaced = [example.refusal for example in data.retain_train] if rows.retain_refused else []
    for found, what, key, instead in (
        (refusals, "harmful examples have no refusal for the good twin", "refusals", "acquire.twin=none"),
        (misplaced, "normal examples have no misplaced refusal", "misplaced_refusals",
         "another acquire.preservation_mode"),
    ):  # fmt: skip
        if None in found:
            raise DataError(
                f"{found.count(None)} of {len(found)} {what}: name a file of them as data.{key} (sku data own makes "
                f"it), or set {instead}"
            )


def draw_others(groups: Sequence[str], count: int, own: str | None, seed: str) -> list[int]:
    """Places of ``count`` different answers whose group (``group_of``) is not ``own``; equal seeds draw alike."""
    rng = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        candidate = rng.randrange(len(groups))
        if groups[candidate] != own and candidate not in drawn:
            drawn.append(candidate)
    return drawn


class JointDataset(Dataset[JointExample]):
    """Harmful examples in a new seeded order each epoch, each with fresh mismatched answers and the next normal one.

    What stands at a place of an epoch depends on seed, epoch and place only. So a resumed run, another batch size or
    another number of workers meets the same examples. Normal examples go round in their own order: none is left out
    because there are fewer harmful ones, and none is cut off because there are more.
    """

    def __init__(self, data: ForgetRetainData, encoder: Encoder, *, rows: RowPlan, seed: int = 0) -> None:
        """Tokenizes the training splits once.

        Args:
            data: ``forget_train`` and ``retain_train`` are used.
            encoder: Of the model.
            rows: What each joint example holds.
            seed: Decides order and draws.

        Raises:
            DataError: A needed split is empty or keeps no example, K answers can't be drawn, or there is no safe
                answer.
            ModelError: The chat template can't write a prompt.
        """
        check_fits(data, rows)
        if rows.framed_share:
            data = replace(
                data,
                forget_train=framed(data.forget_train, rows.framed_share, seed),
                retain_train=framed(data.retain_train, rows.framed_share, seed),
            )
        self._data, self._encoder, self._rows = data, encoder, rows
        self._seed, self._epoch = seed, 0
        self.reports: dict[str, TokenizationReport] = {}
        """What tokenizing did to each split, for the log and the manifest."""
        self._forget = self._tokenize("forget_train", data.forget_train, train_on_end=False)
        self._safe = self._safe_rows() if rows.safe != "none" else {}
        if self._safe:
            self._forget = [example for example in self._forget if example.example_id in self._safe]
        self._takes_normal_answers = rows.mismatched_from == "retain"
        needs_retain = rows.retain > 0 or (rows.mismatched > 0 and self._takes_normal_answers)
        self._retain = self._tokenize("retain_train", data.retain_train, train_on_end=True) if needs_retain else []
        if rows.retain_refused:
            self._retain = self._refused_rows()
        self._lent = self._retain if self._takes_normal_answers else self._forget
        self._lenders: Sequence[Example] = data.retain_train if self._takes_normal_answers else data.forget_train
        self._groups = [group_of(self._lenders[row.example_id]) for row in self._lent]
        fewest = len(self._groups) - max(Counter(self._groups).values(), default=0)
        if rows.mismatched > fewest:
            raise DataError(
                f"random_answers is {rows.mismatched}, but some prompts have only {fewest} answers of other prompts "
                "to draw from; lower it or add harmful prompts"
            )

    def __len__(self) -> int:
        return len(self._forget)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self._epoch = epoch

    def __getitem__(self, place: int) -> JointExample:
        """The joint example at a place of the current epoch; of ``FILLER`` one of no weight."""
        return self._example(place) if place != FILLER else replace(self._example(0), counts=False)

    def fixed_rows(self, kind: RowType, examples: int) -> list[TokenizedExample] | None:
        """Rows of one kind among the first joint examples of training, each once, in the order of first use.

        Args:
            kind: One that an example's ``forget_index`` or ``retain_index`` decides.
            examples: Joint examples from the first of epoch 0 on, over as many epochs as it takes.

        Returns:
            The rows, whose ``example_id`` is that index; None for rows that are drawn anew: mismatched ones, and
            safe ones with ``deep_refusal_fraction``.
        """
        if kind == RowType.MISMATCHED or (kind == RowType.SAFE and self._rows.deep_refusal_fraction):
            return None
        source = self._retain if kind == RowType.RETAIN else self._forget
        stream = "retain" if kind == RowType.RETAIN else "forget"
        count = examples * max(self._rows.retain, 1) if kind == RowType.RETAIN else examples
        places = (self._shuffled(stream, len(source), position) for position in range(count))
        rows = [source[place] for place in dict.fromkeys(places)]
        if kind == RowType.SAFE:
            return [replace(self._safe[row.example_id], example_id=row.example_id) for row in rows]
        return rows

    def forget_at(self, positions: Iterable[int]) -> tuple[int, ...]:
        """Places in ``data.forget_train`` of the examples at positions of training, ``epoch * len(self) + place``."""
        size = len(self._forget)
        places = {self._shuffled("forget", size, position) for position in positions}
        return tuple(sorted(self._forget[place].example_id for place in places))

    def _example(self, place: int) -> JointExample:
        position = self._epoch * len(self) + place
        index = self._shuffled("forget", len(self._forget), position)
        forget = self._forget[index]
        # Of normal answers none is the prompt's own. Each pass draws anew, and never by what was drawn before.
        lender, own = (None, None) if self._takes_normal_answers else (index, self._groups[index])
        drawn = draw_others(self._groups, self._rows.mismatched, own, f"{self._seed}/{position}/{lender}")
        normal = range(position * self._rows.retain, (position + 1) * self._rows.retain)
        safe = self._safe.get(forget.example_id)
        if safe is not None and self._rows.deep_refusal_fraction:
            safe = self._deepened(forget, safe, position)
        kinds = {
            RowType.FORGET: [forget] if self._rows.forget else [],
            RowType.MISMATCHED: [self._mismatch(forget, other) for other in drawn],
            RowType.RETAIN: [self._retain[self._shuffled("retain", len(self._retain), number)] for number in normal],
            RowType.SAFE: [] if safe is None else [safe],
        }
        rows = tuple((kind, row) for kind, found in kinds.items() for row in found)
        return JointExample(rows=rows, forget_index=forget.example_id)

    def _tokenize(self, name: str, examples: Sequence[Example], *, train_on_end: bool) -> list[TokenizedExample]:
        # Harmful answers are learned without their end: negating "stop here" would teach the model to run on.
        tokenized, self.reports[name] = self._encoder.examples(examples, train_on_end=train_on_end)
        return tokenized

    def _safe_rows(self) -> dict[int, TokenizedExample]:
        """Position among ``data.forget_train`` -> its safe answer after its prompt."""
        self._safe_examples: dict[int, RetainExample] = {}
        for example in self._forget:
            forget = self._data.forget_train[example.example_id]
            answer, finished = forget.safe_answer, forget.safe_answer_finished
            if answer is None and self._rows.safe == "data or refusal":
                answer = random.Random(f"{self._seed}/refusal/{example.example_id}").choice(REFUSALS)
                finished = True
            if answer is not None:
                safe = RetainExample(prompt=forget.prompt, answer=answer, finished=finished)
                self._safe_examples[example.example_id] = safe
        if not self._safe_examples:
            raise DataError(
                f"none of the {len(self._forget)} harmful examples has a safe answer to prefer: use data that has "
                "(PKU-SafeRLHF, preference), or refusal_tuning, which brings its own refusals"
            )
        rows = self._tokenize("safe_answers", [*self._safe_examples.values()], train_on_end=True)
        if self._rows.safe == "all":
            self._check_whole("safe_answers", "data.refusals")
        places = list(self._safe_examples)
        return {places[row.example_id]: row for row in rows}

    def _refused_rows(self) -> list[TokenizedExample]:
        """The normal rows with misplaced refusals for answers, in the same order."""
        examples = [self._data.retain_train[row.example_id] for row in self._retain]
        refused = [replace(example, answer=example.refusal) for example in examples if example.refusal is not None]
        # Without their end, as all that stage 2 subtracts.
        rows = self._tokenize("misplaced_refusals", refused, train_on_end=False)
        self._check_whole("misplaced_refusals", "data.misplaced_refusals")
        return [replace(row, example_id=self._retain[row.example_id].example_id) for row in rows]

    def _check_whole(self, name: str, key: str) -> None:
        """Refuses refusals that can't be trained on: left out, they would give two twins different examples."""
        left_out = self.reports[name].left_out
        if left_out:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
            raise DataError(f"{key}: {sum(left_out.values())} refusals can't be trained on ({reasons}): replace them")

    def _deepened(self, forget: TokenizedExample, safe: TokenizedExample, position: int) -> TokenizedExample:
        """The safe answer at a position of training, perhaps after the beginning of the harmful one."""
        draw = random.Random(f"{self._seed}/depth/{position}")
        if draw.random() >= self._rows.deep_refusal_fraction:
            return safe
        harmful = forget.input_ids[forget.answer_start :]
        shown = min(draw.randint(0, self._rows.depth_tokens), len(harmful) - 1)
        # Without the part of a character that the cut may leave.
        begun = decoded(harmful[:shown], self._encoder.tokenizer).rstrip("\ufffd").strip()
        if not begun:
            return safe
        refusal = self._safe_examples[forget.example_id]
        after = replace(refusal, answer=f" {refusal.answer}")
        try:
            return self._encoder.example(after, train_on_end=True, example_id=safe.example_id, begun=begun)
        except DataError:  # Both have no room within max_length.
            return safe

    def _mismatch(self, forget: TokenizedExample, drawn: int) -> TokenizedExample:
        """The harmful prompt with one of the answers that are drawn from."""
        row = self._lent[drawn]
        lender = self._lenders[row.example_id]
        prompt = self._data.forget_train[forget.example_id]
        mixed = replace(prompt, answer=lender.answer, finished=lender.finished)
        return self._encoder.example(mixed, train_on_end=self._takes_normal_answers, example_id=row.example_id)

    def _shuffled(self, stream: str, size: int, position: int) -> int:
        lap, place = divmod(position, size)
        return _order(f"{self._seed}/{stream}/{lap}", size)[place]


@lru_cache(maxsize=4)  # The laps in use: of forget and retain, each now and next.
def _order(seed: str, size: int) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


class WholeBatches(Sampler[int]):
    """The places of an epoch in order, then ``FILLER`` until every process has as many batches as the others.

    accelerate would fill the end of an epoch up with examples from its start, which one process doesn't train on.
    """

    def __init__(self, size: int, batch: int) -> None:
        """An epoch of ``size`` places, in batches of so many joint examples of all processes together."""
        self._size, self._batch = size, batch

    def __len__(self) -> int:
        """Places and fillers."""
        return -(-self._size // self._batch) * self._batch

    def __iter__(self) -> Iterator[int]:
        """Places, then fillers."""
        yield from range(self._size)
        yield from (FILLER for _ in range(len(self) - self._size))


@cache
def framings() -> tuple[str, ...]:
    """All of them, each with ``{prompt}`` in it."""
    text = (resources.files("sku.data") / "framings.txt").read_text(encoding="utf-8")
    return parse_templates(text)


def parse_templates(text: str) -> tuple[str, ...]:
    r"""One template a line, ``\n`` in it a line break; empty lines and those that begin with ``#`` don't count."""
    lines = (line.strip() for line in text.splitlines() if not line.startswith("#"))
    return tuple(line.replace(r"\n", "\n") for line in lines if line)


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
