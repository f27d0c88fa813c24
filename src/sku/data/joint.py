"""Joint examples: what stage 1 sees at once.

One joint example is a harmful pair, K harmful answers of other prompts put behind the same prompt, and a normal pair.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from sku.data.examples import ForgetExample, ForgetRetainData, group_of
from sku.data.mismatch import MismatchedAnswers
from sku.data.prompts import PromptFormat
from sku.data.tokenization import TokenizationReport, TokenizedExample, tokenize_example, tokenize_examples

GUIDED, MISMATCHED, RETAIN = 0, 1, 2
"""Kind of a row of a batch: harmful pair, harmful prompt with another prompt's answer, normal pair."""


@dataclass(frozen=True, kw_only=True)
class JointExample:
    """Token ids of one joint example; a module that is switched off leaves its part empty."""

    guided: TokenizedExample | None
    mismatched: tuple[TokenizedExample, ...]
    retain: TokenizedExample | None
    forget_index: int
    """Harmful example among ``data.unlearned``."""
    retain_index: int
    """Normal example among ``data.retain_train``, -1 where preservation is off."""


class JointDataset(Dataset[JointExample]):
    """Harmful examples in a new seeded order each epoch, each with fresh mismatched answers and the next normal one.

    What stands at a place of an epoch depends on seed, epoch and place only. So a resumed run, another batch size or
    another number of workers meets the same examples. Normal examples go round in their own order: none is left out
    because there are fewer harmful ones, and none is cut off because there are more.
    """

    def __init__(
        self,
        data: ForgetRetainData,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        *,
        num_random_answers: int,
        guided: bool = True,
        preservation: bool = True,
        max_length: int = 512,
        max_answer_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        """Tokenizes the training splits once.

        Args:
            data: ``unlearned`` and ``retain_train`` are used.
            tokenizer: Of the model.
            prompt_format: How prompts and answers are written.
            num_random_answers: K; 0 where random disassociation is off.
            guided: Whether guided distortion is on.
            preservation: Whether preservation divergence is on.
            max_length: Most tokens of a row.
            max_answer_tokens: Most tokens of an answer.
            seed: Decides order and draws.

        Raises:
            DataError: A needed split is empty or keeps no example, or K answers of other prompts can't be drawn.
            ModelError: The chat template can't write a prompt.
        """
        self._data, self._tokenizer, self._format = data, tokenizer, prompt_format
        self._max_length, self._max_answer_tokens = max_length, max_answer_tokens
        self._seed, self._epoch = seed, 0
        self._guided_on = guided
        self._orders: dict[tuple[str, int], Sequence[int]] = {}
        self.reports: dict[str, TokenizationReport] = {}
        """What tokenizing did to each split, for the log and the manifest."""
        self._forget = self._tokenize("unlearned", train_on_end=False)
        self._retain = self._tokenize("retain_train", train_on_end=True) if preservation else []
        groups = [group_of(self._forget_example(place)) for place in range(len(self._forget))]
        self._answers = MismatchedAnswers(groups, num_random_answers, seed)

    def __len__(self) -> int:
        return len(self._forget)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self._epoch = epoch

    def __getitem__(self, place: int) -> JointExample:
        """The joint example at a place of the current epoch."""
        position = self._epoch * len(self) + place
        index = self._shuffled("forget", len(self._forget), position)
        forget = self._forget[index]
        retain = self._retain[self._shuffled("retain", len(self._retain), position)] if self._retain else None
        return JointExample(
            guided=forget if self._guided_on else None,
            mismatched=tuple(self._mismatch(index, other) for other in self._answers.draw(index, position)),
            retain=retain,
            forget_index=forget.example_id,
            retain_index=-1 if retain is None else retain.example_id,
        )

    def _tokenize(self, split: str, *, train_on_end: bool) -> list[TokenizedExample]:
        # Harmful answers are learned without their end: negating "stop here" would teach the model to run on.
        examples, self.reports[split] = tokenize_examples(
            getattr(self._data, split),
            self._tokenizer,
            self._format,
            max_length=self._max_length,
            max_answer_tokens=self._max_answer_tokens,
            train_on_end=train_on_end,
        )
        return examples

    def _forget_example(self, place: int) -> ForgetExample:
        return self._data.unlearned[self._forget[place].example_id]

    def _mismatch(self, index: int, other: int) -> TokenizedExample:
        pair = replace(self._forget_example(index), answer=self._forget_example(other).answer)
        return tokenize_example(
            pair,
            self._tokenizer,
            self._format,
            max_length=self._max_length,
            max_answer_tokens=self._max_answer_tokens,
            train_on_end=False,
            example_id=self._forget[other].example_id,
        )

    def _shuffled(self, stream: str, size: int, position: int) -> int:
        lap, place = divmod(position, size)
        key = (stream, lap)
        if key not in self._orders:
            order = list(range(size))
            random.Random(f"{self._seed}/{stream}/{lap}").shuffle(order)
            # Only the laps in use are kept: forget and retain, each now and next.
            self._orders = {kept: self._orders[kept] for kept in list(self._orders)[-3:]} | {key: order}
        return self._orders[key][place]
