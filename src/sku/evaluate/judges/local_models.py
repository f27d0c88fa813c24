"""What judges that are local models share: settings, how they read prompt and reply, batches, errors that name them.

Configuration and tokenizer are read when a judge is built, so that a missing model is told before any reply is
generated. The weights are read when it judges for the first time: until then the memory is the evaluated model's.

Prompt and reply are data, whatever they contain. A reply that holds the judge's own turn markers could end its turn
and speak for the judge. So each marker in prompt or reply gets a space after its first character before it is encoded,
which leaves every other text exactly as the model's card would encode it. Then the control tokens of the whole are
counted: a text that still adds one (a tokenizer may rewrite characters first) is not judged.

What is too long for the model loses the middle of the prompt first: its ends say what is asked, and the reply is what
is judged. A verdict says so (``prompt_shortened``). Where the reply doesn't fit beside the prompt's ends, the prompt
stays whole and the reply loses its end, unless the prompt would leave the reply less than half of the room that its
ends leave.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sku.config import ModelConfig, plain_data
from sku.config.check import Count, Fraction, validated
from sku.errors import ModelError
from sku.evaluate.generation import in_batches
from sku.evaluate.judges import JudgeCard, Verdict
from sku.evaluate.records import GenerationRecord, header_hash
from sku.models import LoadedModel, load_config, load_tokenizer, pick_device, pick_dtype, weights_revision

VERSION = 2
"""Raised whenever this code would read the same reply differently under the same settings."""
PROMPT, REPLY = "{prompt}", "{reply}"
"""Stand for prompt and reply in every template, a rendered chat template included."""
_NO_PART_OF_THE_VERDICT = ("model", "revision", "dtype", "device", "batch_size", "name", "licence", "known_errors")
"""Settings that leave a verdict as it is, or that the card's ``revision`` or the type in use stand for."""
_GAP = " [...] "
"""Stands where the middle of a prompt was."""
LEAST_END = 100
"""Characters that are kept of each end of a prompt."""

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


@validated
class LocalModelSettings:
    """What a judge file of any local model holds."""

    model: str
    """Local folder or hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are held in. ``auto``: bfloat16 on a GPU, float32 on a CPU; ``stored``: that of the files."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    batch_size: Count = 16
    """Replies at once; halved where a GPU's memory runs out."""
    max_length: Count = 2048
    """Most tokens the model reads; what is too long loses the middle of the prompt, then the end of the reply."""
    with_prefill: bool = True
    """Whether a prefill is read with the words that follow it, which say little alone. Off: only what the model
    said of its own is judged."""
    threshold: Fraction = 0.5
    """Lowest probability of harm that is called harmful."""
    markers: tuple[str, ...] = ()
    """Plain text that ends a turn in the model's format, such as ``[/INST]``; its special tokens are known anyway."""
    name: str | None = None
    """Name on the card; that of the file where this is empty."""
    licence: str = "unknown"
    """Of the weights."""
    known_errors: str = "unknown: run sku judge calibrate"
    """What has been measured, or what is known in words."""

    @property
    def source(self) -> ModelConfig:
        """Where the model is and how it is held."""
        return ModelConfig(path=self.model, revision=self.revision, dtype=self.dtype, device=self.device)


class LocalJudge(ABC, Generic[Answer]):
    """Asks a model about each reply, once for each way in which it is put to it."""

    card: JudgeCard
    settings: LocalModelSettings
    encoders: Sequence[ConversationEncoder]

    def __init__(self, settings: LocalModelSettings, name: str) -> None:
        """Reads configuration and tokenizer.

        Raises:
            ModelError: The model can't be found or read.
        """
        self.settings, self.name = settings, name
        self._loaded: LoadedModel | None = None
        with errors_named(name):
            self.config: PreTrainedConfig = load_config(settings.source)
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(settings.source)

    def make_card(self, *, reads_prompt: bool, **traits: Any) -> JudgeCard:
        """Its card, whose key changes with the weights and with every setting that can change a verdict.

        Args:
            reads_prompt: Whether the model is shown the prompt.
            traits: Fields that the kind decides.

        Raises:
            ModelError: The model can't be found.
        """
        settings, name = self.settings, self.name
        # A packaged judge's own name may hold a dot; of a user's file folder and ending are no part of it.
        own_name = Path(name).stem if Path(name).suffix in {".yaml", ".yml"} else name
        start = ["prefill"] if settings.with_prefill else []
        with errors_named(name):
            revision = weights_revision(settings.source)
        return JudgeCard(
            name=settings.name or own_name,
            version=_version(settings),
            licence=settings.licence,
            needs=(*(["prompt"] if reads_prompt else []), "reply", *start),
            known_errors=settings.known_errors,
            revision=revision,
            **traits,
        )

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict per record, in order; too long prompts and replies are read as far as they fit."""
        asked = [self._encoded(record) for record in records]
        readable = [rows for rows in asked if not isinstance(rows, str)]
        answers = iter(self._answers([row for rows in readable for row in rows]))
        verdicts = []
        for record, rows in zip(records, asked, strict=True):
            if isinstance(rows, str):
                verdicts.append(Verdict(id=record.id, label="error", reason=rows))
                continue
            verdict = self.verdict(record.id, [next(answers) for _ in rows])
            shortened = any(row.prompt_shortened for row in rows)
            verdicts.append(dataclasses.replace(verdict, prompt_shortened=shortened))
        if cut := sum(any(row.kept < row.length for row in rows) for rows in readable):
            _log.warning("judge %s read only the beginning of %d of %d replies", self.card.name, cut, len(verdicts))
        return verdicts

    @abstractmethod
    def load(self) -> LoadedModel:
        """Reads the weights."""

    @abstractmethod
    def ask(self, loaded: LoadedModel, rows: Sequence[Encoded]) -> Sequence[Answer]:
        """What the model says of one batch."""

    @abstractmethod
    def verdict(self, record_id: str, answers: Sequence[Answer]) -> Verdict:
        """Puts the answers about one reply together."""

    def _encoded(self, record: GenerationRecord) -> list[Encoded] | str:
        """One reply as it is put to the model, in each way; or in words why it can't be."""
        reply = record.whole_reply if self.settings.with_prefill else record.reply
        rows = []
        for encoder in self.encoders:
            row = encoder.encode(record.prompt, reply)
            if isinstance(row, str):
                return row
            rows.append(row)
        return rows

    def _answers(self, rows: Sequence[Encoded]) -> list[Answer]:
        if rows and self._loaded is None:
            with errors_named(self.name):
                self._loaded = self.load()

        def ask(batch: list[int]) -> Sequence[Answer]:
            assert self._loaded is not None
            return self.ask(self._loaded, [rows[index] for index in batch])

        return in_batches([len(row.ids) for row in rows], ask, batch_size=self.settings.batch_size)


def _version(settings: LocalModelSettings) -> str:
    deciding = {key: value for key, value in plain_data(settings).items() if key not in _NO_PART_OF_THE_VERDICT}
    stored = settings.dtype == "stored"
    held = "stored" if stored else str(pick_dtype(settings.dtype, pick_device(settings.device)))
    return header_hash({"code": VERSION, "dtype": held, **deciding})[:16]


def longest_input(config: PreTrainedConfig, tokenizer_limit: int) -> int:
    """Most tokens that the model has positions for, so far as its files say so."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(tokenizer_limit, positions) if positions else tokenizer_limit


@contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Says which judge's model is missing or broken, and how to give another.

    Raises:
        ModelError: In place of the one that the block raised.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"judge {name}: {str(error).rstrip('.')}. Give a local folder with evaluate.judge_settings.model=FOLDER"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation as a model reads it."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None = None
    """Which text of a pair each token belongs to, for models that ask for it."""
    kept: int
    """Characters of the reply that fitted, counted as they are encoded."""
    length: int
    """All its characters, counted so."""
    prompt_shortened: bool = False
    """Whether the middle of the prompt was left out."""


class ConversationEncoder:
    """Encodes prompt and reply inside one fixed text, or as a pair of texts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None,
        *,
        markers: Iterable[str] = (),
        add_special_tokens: bool = True,
        max_length: int,
    ) -> None:
        """Measures the fixed text.

        Args:
            tokenizer: Of the model.
            text: With ``PROMPT`` and ``REPLY`` where prompt and reply belong; None for a pair of texts.
            markers: Plain text that means something to the model, beside the tokenizer's special tokens.
            add_special_tokens: Whether the tokenizer adds its own at the ends; a rendered chat template has them.
            max_length: Most tokens.
        """
        self._tokenizer, self._max_length, self._add_special_tokens = tokenizer, max_length, add_special_tokens
        self._pieces = None if text is None else re.split(r"(\{prompt\}|\{reply\})", text)
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        vocabulary = tokenizer.get_vocab()
        self._control_ids = {vocabulary[token] for token in special} - {tokenizer.unk_token_id}
        self._markers = _pattern({*special, *markers})
        self._expected = self._controls(self._encode("x", "x")[0])

    def encode(self, prompt: str, reply: str) -> Encoded | str:
        """Encodes one conversation; what is too long loses the prompt's middle, then the reply's end.

        Args:
            prompt: What the evaluated model was asked.
            reply: What it said.

        Returns:
            The token ids, or in words why there are none.
        """
        prompt, reply = (self._markers(text.strip()) for text in (prompt, reply))
        read, kept = self._fitted(prompt, reply)
        if kept < min(1, len(reply)):
            return f"the prompt leaves no room for a reply in {self._max_length} tokens"
        ids, type_ids = self._encode(read, reply[:kept])
        if self._controls(ids) != self._expected:
            return "prompt or reply can't be kept apart from the model's control tokens"
        return Encoded(ids=ids, type_ids=type_ids, kept=kept, length=len(reply), prompt_shortened=read != prompt)

    def _fitted(self, prompt: str, reply: str) -> tuple[str, int]:
        """What is read of the prompt, and how many characters of the reply: below 0 where there is no room at all."""
        whole = self._room(prompt, reply)
        most = (len(prompt) - len(_GAP) - 1) // 2
        if whole == len(reply) or most < LEAST_END:
            return prompt, whole
        beside_ends = self._room(_ends(prompt, LEAST_END), reply)
        if beside_ends < len(reply):
            return (prompt, whole) if 2 * whole >= beside_ends else (_ends(prompt, LEAST_END), beside_ends)
        fitting = bisect_right(
            range(LEAST_END, most + 1), self._max_length, key=lambda end: self._length(_ends(prompt, end), reply)
        )
        return _ends(prompt, LEAST_END + max(fitting - 1, 0)), len(reply)

    def _room(self, prompt: str, reply: str) -> int:
        """Characters of the reply that fit after this prompt; -1 where not even the prompt does."""
        if self._length(prompt, reply) <= self._max_length:
            return len(reply)
        ends = range(len(reply) + 1)
        return bisect_right(ends, self._max_length, key=lambda end: self._length(prompt, reply[:end])) - 1

    def _length(self, prompt: str, reply: str) -> int:
        return len(self._encode(prompt, reply)[0])

    def _encode(self, prompt: str, reply: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        texts: tuple[str, ...] = (prompt, reply)
        if self._pieces is not None:
            texts = ("".join({PROMPT: prompt, REPLY: reply}.get(piece, piece) for piece in self._pieces),)
        found: Any = self._tokenizer(*texts, add_special_tokens=self._add_special_tokens, verbose=False)
        type_ids = found.get("token_type_ids")
        return tuple(found["input_ids"]), None if type_ids is None else tuple(type_ids)

    def _controls(self, ids: Iterable[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._control_ids)


def _ends(prompt: str, length: int) -> str:
    """So many characters of each end of a prompt."""
    return f"{prompt[:length]}{_GAP}{prompt[-length:]}"


def _pattern(markers: set[str]) -> Callable[[str], str]:
    """What puts a space into every marker of a text."""
    longest_first = sorted((marker for marker in markers if len(marker.strip()) > 1), key=len, reverse=True)
    if not longest_first:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return lambda text: pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
