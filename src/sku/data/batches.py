"""From joint examples to one batch: padded, or packed into one row, where rows after one prompt share its tokens.

``tree``: the rows of a joint example that stand after the harmful prompt (its own answer, the K others, a safe one)
share their longest common token prefix, which is computed once; the normal row stands beside them. ``flat``: each row
whole.

A packed row is made of segments, runs of tokens. One with a prefix goes on where its prefix ends: its tokens see the
prefix and each other, never a sibling. ``AttentionPaths`` holds the path of each token back to its first one.

Shapes: R = rows of a padded batch, T = tokens of its longest row, or of the packed row, S = segments, K = keys of all
paths (those of a prefix once for each segment that has it), U = places whose scores are needed, N = kept
positions of the rows of one kind (a shared place counts once for each row), M = those rows, B = joint examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sku.config.stages import Packing
from sku.data.examples import RetainTokens, RowType
from sku.data.tokens import IGNORE_INDEX, TokenizedExample, shared_length
from sku.errors import DataError

ROWS = "rows"
"""Key of the ``Rows`` in a batch of ``JointCollator``."""


class _Tensors:
    """A dataclass of tensors, and of such dataclasses, that goes to another device as one."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same with its tensors on another device."""
        moved: Self = _changed(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved

    def pin_memory(self) -> Self:
        """The same with its tensors in memory that a GPU can read by itself; asked for by the data loader."""
        pinned: Self = _changed(self, Tensor.pin_memory)
        return pinned


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Lists stay the same ones: where a model is spread over devices, the copies of a plan note in one who saw it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(part, change) for key, part in value.items()}
    if isinstance(value, _Tensors):
        return replace(value, **{name: _changed(part, change) for name, part in vars(value).items()})  # type: ignore
    return value


class Segment(NamedTuple):
    """Part of a packed row; segments follow each other without a gap."""

    length: int
    """Tokens, 1 or more."""
    prefix: int | None = None
    """Index of the segment before it on its path; that one has none itself."""


@dataclass(frozen=True, kw_only=True)
class AttentionPaths(_Tensors):
    """The plan that attention layers follow. Numbers of the host and tensors of the device, so that no layer waits."""

    segments: tuple[Segment, ...]
    position_T: Tensor
    """int64: place of each token on its path."""
    key_index_K: Tensor
    """int64: tokens that each segment sees, path after path."""
    query_starts: Tensor
    """``[S + 1]`` int32: where each segment begins among the tokens, and their number."""
    key_starts: Tensor
    """``[S + 1]`` int32: where each path begins among the keys, and their number."""
    longest_segment: int
    longest_path: int
    windows_seen: list[int | None] = field(default_factory=list)
    """The sliding window of each attention layer that has followed the plan, in order: who followed it, and how."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """T."""
        return len(self.position_T)

    @property
    def shares(self) -> bool:
        """Whether any segment has a prefix."""
        return any(segment.prefix is not None for segment in self.segments)

    def path_length(self, index: int) -> int:
        """Tokens of a segment and of its prefix."""
        length, prefix = self.segments[index]
        return length if prefix is None else length + self.segments[prefix].length

    def segment_mask(self, index: int, window: int | None) -> Tensor | None:
        """``[segment, path]`` bool: what the tokens of a segment see of their path, made once.

        None where that is a plain causal square. ``window`` is the most tokens that one sees, itself included; all
        before it if None.
        """
        length, prefix = self.segments[index]
        path = self.path_length(index)
        window = None if window is None or path <= window else window
        if prefix is None and window is None:
            return None
        key = (index, window)
        if key not in self._masks:
            keys = torch.arange(path, device=self.position_T.device)
            queries = keys[path - length :, None]
            mask = keys <= queries
            self._masks[key] = mask if window is None else mask & (queries - keys < window)
        return self._masks[key]


def plan_paths(segments: Sequence[Segment]) -> AttentionPaths:
    """The plan of a packed row, on the CPU; a prefix stands before the segments that go on from it."""
    lengths = [segment.length for segment in segments]
    starts = [0, *accumulate(lengths)]
    tokens = torch.arange(starts[-1]).split(lengths)
    prefixes = [index if segment.prefix is None else segment.prefix for index, segment in enumerate(segments)]
    before = [0 if prefix == index else lengths[prefix] for index, prefix in enumerate(prefixes)]
    paths = [length + shared for length, shared in zip(lengths, before, strict=True)]
    return AttentionPaths(
        segments=tuple(segments),
        position_T=torch.cat([torch.arange(shared, path) for shared, path in zip(before, paths, strict=True)]),
        # In a set of the two: a segment without prefix is its own.
        key_index_K=torch.cat([tokens[part] for own, prefix in enumerate(prefixes) for part in sorted({prefix, own})]),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        key_starts=torch.tensor([0, *accumulate(paths)], dtype=torch.int32),
        longest_segment=max(lengths),
        longest_path=max(paths),
    )


@dataclass(frozen=True, kw_only=True)
class JointExample:
    """Token ids of one joint example."""

    rows: tuple[tuple[RowType, TokenizedExample], ...]
    """Kind and tokens of each row, in the order of a batch; the ``example_id`` of a normal pair is its place among
    ``data.retain_train``."""
    forget_index: int
    """Harmful example among ``data.forget_train``."""
    counts: bool = True
    """Whether it is trained on; not if it only gives a process something to compute while others train."""

    def of(self, kind: RowType) -> tuple[TokenizedExample, ...]:
        """The rows of one kind; none of a module that is switched off."""
        return tuple(row for own, row in self.rows if own == kind)

    @property
    def retain_rows(self) -> tuple[int, ...]:
        """Place among ``data.retain_train`` of each normal pair, in the order of their rows."""
        return tuple(row.example_id for row in self.of(RowType.RETAIN))


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """A row before it is laid out."""

    kind: RowType
    example: int
    """Position of its joint example in the batch."""
    tokens: TokenizedExample


@dataclass(frozen=True, kw_only=True)
class KeptPlaces(_Tensors):
    """Where the scores of the rows of one kind stand. All int64."""

    score_N: Tensor
    """Index among the U scores of the place before each target; rows that share the place share the score."""
    place_N: Tensor
    """That place among all of ``input_ids``, row after row."""
    targets_N: Tensor
    """Token ids that follow."""
    row_N: Tensor
    """Which row of this kind, 0 to M-1, each belongs to."""
    example_M: Tensor
    """Which joint example, 0 to B-1, each row belongs to."""


@dataclass(frozen=True, kw_only=True)
class Rows(_Tensors):
    """Rows of a batch as a model reads them in one forward pass, and which of their scores are whose."""

    model_inputs: dict[str, Any]
    """Arguments of the model; the scores that it gives for them are the U, in their order.

    Padded: ``input_ids`` ``[R, T]``, ``attention_mask`` (which alone tells what is padding: the pad id can be that of
    a real token), ``logits_to_keep`` ``[R, T]`` bool. Packed: ``input_ids`` ``[1, T]``, ``position_ids`` (place of a
    token in its own row), ``packed_paths``, ``logits_to_keep`` ``[U]``, places that rise, each once.
    """
    kept: dict[RowType, KeptPlaces]
    """Kind of rows -> theirs."""
    rows: tuple[SourceRow, ...]
    num_examples: int
    """B."""
    collator: JointCollator
    """That has laid them out."""

    @property
    def input_ids(self) -> Tensor:
        """``[R, T]``, or ``[1, T]`` packed."""
        ids: Tensor = self.model_inputs["input_ids"]
        return ids

    @property
    def paths(self) -> Any:
        """The ``AttentionPaths`` of packed rows, None of padded ones."""
        return self.model_inputs.get("packed_paths")

    def of_kind(self, kind: RowType) -> Rows:
        """The rows of one kind laid out alone, on the same device, as a reference model is asked for them."""
        rows = [row for row in self.rows if row.kind == kind]
        return self.collator.lay_out(rows, self.num_examples).to(self.input_ids.device, non_blocking=True)


class JointCollator:
    """Puts all rows of a batch of joint examples where one forward pass does for all, in the data loader's workers."""

    def __init__(
        self, packing: Packing = "padded", *, pad_token_id: int = 0, retain_tokens: RetainTokens = "answer"
    ) -> None:
        """Says how rows are laid out.

        Args:
            packing: ``padded`` to the longest row of the batch; else one packed row, in which rows after the same
                prompt share its tokens (``tree``), or not (``flat``).
            pad_token_id: Of the tokenizer.
            retain_tokens: Of the ``RowPlan``.
        """
        self.packing, self.pad_token_id, self.retain_tokens = packing, pad_token_id, retain_tokens

    def __call__(self, examples: list[JointExample]) -> dict[str, Any]:
        """Lays the rows of B joint examples out, without those that don't count, but for one if no other is there.

        Returns:
            - ``rows``: ``Rows``; ``input_ids``: theirs.
            - ``forget_index``: ``[B]`` int64, positions in the dataset.
            - ``retain_rows``: int64, one for each normal pair, its position in the dataset.
            - ``counts``: ``[B]`` int64, 1 for examples that are trained on, 0 for one that isn't.

        Raises:
            DataError: No example has a row.
        """
        examples = [example for example in examples if example.counts] or examples[:1]
        rows = [
            SourceRow(kind=kind, example=position, tokens=row)
            for position, example in enumerate(examples)
            for kind, row in example.rows
        ]
        if not rows:
            raise DataError("a batch without any row can't be trained on: all modules are off or it has no examples")
        normal = [place for example in examples for place in example.retain_rows]
        laid_out = self.lay_out(rows, len(examples))
        return {
            "input_ids": laid_out.input_ids,
            "forget_index": torch.tensor([example.forget_index for example in examples], dtype=torch.long),
            "retain_rows": torch.tensor(normal, dtype=torch.long),
            "counts": torch.tensor([example.counts for example in examples], dtype=torch.long),
            ROWS: laid_out,
        }

    def lay_out(self, rows: Sequence[SourceRow], num_examples: int) -> Rows:
        """Lays rows (at least one; those of one of the B joint examples follow each other) out on the CPU."""
        positions = [_kept_positions(row, self.retain_tokens) for row in rows]
        inputs, kept = (self._padded if self.packing == "padded" else self._packed)(rows, positions)
        return Rows(model_inputs=inputs, kept=kept, rows=tuple(rows), num_examples=num_examples, collator=self)

    def _padded(
        self, rows: Sequence[SourceRow], positions: Sequence[Tensor]
    ) -> tuple[dict[str, Any], dict[RowType, KeptPlaces]]:
        ids = [torch.tensor(row.tokens.input_ids, dtype=torch.long) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        all_places = torch.arange(input_ids.numel()).view_as(input_ids)
        score_places, kept = _kept_places(rows, positions, dict(enumerate(all_places)))
        kept_RT = torch.zeros_like(input_ids, dtype=torch.bool)
        kept_RT.view(-1)[score_places] = True
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {"input_ids": input_ids, "attention_mask": mask, "logits_to_keep": kept_RT}, kept

    def _packed(
        self, rows: Sequence[SourceRow], positions: Sequence[Tensor]
    ) -> tuple[dict[str, Any], dict[RowType, KeptPlaces]]:
        # What stands after the last kept position is seen by none that counts.
        sequences = [
            row.tokens.input_ids[: int(kept[-1]) + 1 if len(kept) else 0]
            for row, kept in zip(rows, positions, strict=True)
        ]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            alone = row.kind == RowType.RETAIN or self.packing == "flat"
            groups.setdefault((row.example, index if alone else -1), []).append(index)
        segments: list[Segment] = []
        ids: list[int] = []
        places: dict[int, Tensor] = {}
        for members in groups.values():
            shared = shared_length(*(sequences[index] for index in members)) if len(members) > 1 else 0
            prefix, shared_places = None, torch.arange(len(ids), len(ids) + shared)
            if shared:
                prefix = len(segments)
                segments.append(Segment(shared))
                ids.extend(sequences[members[0]][:shared])
            for index in members:
                own = sequences[index][shared:]
                places[index] = torch.cat([shared_places, torch.arange(len(ids), len(ids) + len(own))])
                if own:
                    segments.append(Segment(len(own), prefix))
                    ids.extend(own)
        score_places, kept = _kept_places(rows, positions, places)
        paths = plan_paths(segments)
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": paths.position_T[None], "packed_paths": paths}
        return {**inputs, "logits_to_keep": score_places}, kept


def _kept_places(
    rows: Sequence[SourceRow], positions: Sequence[Tensor], places: dict[int, Tensor]
) -> tuple[Tensor, dict[RowType, KeptPlaces]]:
    score_places, scores = torch.cat([places[index][kept] for index, kept in enumerate(positions)]).unique(
        return_inverse=True
    )
    scores_of_row = scores.split([len(kept) for kept in positions])
    kinds = {}
    for kind in sorted({row.kind for row in rows}):
        own = [index for index, row in enumerate(rows) if row.kind == kind]
        counts = torch.tensor([len(positions[index]) for index in own])
        score_N = torch.cat([scores_of_row[index] for index in own])
        kinds[kind] = KeptPlaces(
            score_N=score_N,
            place_N=score_places[score_N],
            targets_N=torch.cat([torch.tensor(rows[index].tokens.input_ids)[positions[index] + 1] for index in own]),
            row_N=torch.arange(len(own)).repeat_interleave(counts),
            example_M=torch.tensor([rows[index].example for index in own]),
        )
    return score_places, kinds


def _kept_positions(row: SourceRow, retain_tokens: RetainTokens) -> Tensor:
    """Positions of a row whose next token is learned or compared."""
    if row.kind == RowType.RETAIN and retain_tokens != "answer":
        return torch.arange(len(row.tokens.labels) - 1)
    return (torch.tensor(row.tokens.labels[1:], dtype=torch.long) != IGNORE_INDEX).nonzero()[:, 0]
