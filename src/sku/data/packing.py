"""From joint examples to one packed row without padding, in which rows of the same prompt share its tokens.

``tree``: the rows of a joint example that stand behind the harmful prompt (its own answer, the K others, a safe one)
share their longest common token prefix, which is computed once; the normal row stands beside them. ``flat``: each row
whole. Shapes: T = tokens of the packed row, R = rows, U = packed places whose scores are needed, N = kept positions of
the rows of one kind (a shared place counts once for each row), M = those rows, B = joint examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from sku.data.attention_paths import AttentionPaths, Segment, plan_paths
from sku.data.collation import rows_of
from sku.data.joint import RETAIN, JointExample
from sku.data.tokenization import TokenizedExample
from sku.errors import DataError
from sku.losses import IGNORE_INDEX

RetainTokens = Literal["answer", "all"]
PACKED = "packed"
"""Key of the ``PackedRows`` in a batch of ``PackedCollator``."""


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """A row before it is packed."""

    kind: int
    """``FORGET``, ``MISMATCHED``, ``RETAIN`` or ``SAFE``."""
    example: int
    """Position of its joint example in the batch."""
    tokens: TokenizedExample


@dataclass(frozen=True, kw_only=True)
class KeptPlaces:
    """Where the scores of the rows of one kind stand. All int64."""

    score_N: Tensor
    """Index among the U scores of the place before each target; rows that share the place share the score."""
    place_N: Tensor
    """That place in the packed row."""
    targets_N: Tensor
    """Token ids that follow."""
    row_N: Tensor
    """Which row of this kind, 0 to M-1, each belongs to."""
    example_M: Tensor
    """Which joint example, 0 to B-1, each row belongs to."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> KeptPlaces:
        """The same with each tensor moved or pinned."""
        return KeptPlaces(**{entry.name: change(getattr(self, entry.name)) for entry in fields(self)})


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows of a batch as one packed row."""

    input_ids: Tensor
    """``[1, T]``."""
    position_ids: Tensor
    """``[1, T]``, place of each token in its own row."""
    is_retain: Tensor
    """``[1, T]``, bool: tokens of normal rows, which share none with others."""
    paths: AttentionPaths
    score_places_U: Tensor
    """Places of the packed row whose scores are needed, rising, each once."""
    kept: dict[int, KeptPlaces]
    """Kind of rows -> theirs."""
    rows: tuple[SourceRow, ...]
    num_examples: int
    """B."""
    share: bool
    retain_tokens: RetainTokens

    def of_kind(self, kind: int) -> PackedRows:
        """The rows of one kind packed alone, on the same device, as a reference model is asked for them."""
        rows = [row for row in self.rows if row.kind == kind]
        packed = pack_rows(rows, self.num_examples, share=self.share, retain_tokens=self.retain_tokens)
        return packed.to(self.input_ids.device, non_blocking=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedRows:
        """The same with its tensors on another device."""
        if self.input_ids.device == torch.device(device):
            return self
        return self._changed(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            self.paths.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedRows:
        """The same with its tensors in memory that a GPU can read by itself; asked for by the data loader."""
        return self._changed(Tensor.pin_memory, self.paths.pin_memory())

    def _changed(self, change: Callable[[Tensor], Tensor], paths: AttentionPaths) -> PackedRows:
        return replace(
            self,
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            is_retain=change(self.is_retain),
            score_places_U=change(self.score_places_U),
            kept={kind: places.changed(change) for kind, places in self.kept.items()},
            paths=paths,
        )


class PackedCollator:
    """Puts all rows of a batch of joint examples into one packed row, in the data loader's workers."""

    def __init__(self, *, share: bool, retain_tokens: RetainTokens) -> None:
        """Says how rows are packed.

        Args:
            share: Rows behind the same prompt share its tokens (``tree``), else not (``flat``).
            retain_tokens: Of the ``RowPlan``.
        """
        self.share, self.retain_tokens = share, retain_tokens

    def __call__(self, examples: list[JointExample]) -> dict[str, Any]:
        """Packs the rows of B joint examples.

        Returns:
            ``input_ids`` ``[1, T]``; ``forget_index``, ``retain_index``, ``retain_rows`` and ``counts`` as of
            ``JointCollator``; and ``packed``: ``PackedRows``.

        Raises:
            DataError: No example has a row.
        """
        examples = [example for example in examples if example.counts] or examples[:1]
        rows = [
            SourceRow(kind=kind, example=position, tokens=row)
            for position, example in enumerate(examples)
            for kind, row in rows_of(example)
        ]
        packed = pack_rows(rows, len(examples), share=self.share, retain_tokens=self.retain_tokens)
        return {
            "input_ids": packed.input_ids,
            "forget_index": torch.tensor([example.forget_index for example in examples], dtype=torch.long),
            "retain_index": torch.tensor([example.retain_index for example in examples], dtype=torch.long),
            "retain_rows": torch.tensor(
                [place for example in examples for place in example.retain_rows], dtype=torch.long
            ),
            "counts": torch.tensor([example.counts for example in examples], dtype=torch.long),
            PACKED: packed,
        }


def pack_rows(
    rows: Sequence[SourceRow], num_examples: int, *, share: bool, retain_tokens: RetainTokens = "answer"
) -> PackedRows:
    """Packs rows and finds where their scores will stand.

    Args:
        rows: Those of one joint example follow each other.
        num_examples: B.
        share: Rows of one joint example, the normal one apart, share their longest common prefix.
        retain_tokens: Of the ``RowPlan``.

    Returns:
        The packed row, on the CPU.

    Raises:
        DataError: There is no row.
    """
    if not rows:
        raise DataError("a batch without any row can't be trained on: all modules are off or it has no examples")
    positions = [_kept_positions(row, retain_tokens) for row in rows]
    # What stands behind the last kept position is seen by none that counts.
    sequences = [
        row.tokens.input_ids[: int(kept[-1]) + 1 if len(kept) else 0]
        for row, kept in zip(rows, positions, strict=True)
    ]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        alone = row.kind == RETAIN or not share
        groups.setdefault((row.example, index if alone else -1), []).append(index)
    segments: list[Segment] = []
    ids: list[int] = []
    places: dict[int, Tensor] = {}
    for members in groups.values():
        _add_group(members, sequences, segments, ids, places)
    score_places, kept = _kept_places(rows, positions, places)
    paths = plan_paths(segments)
    is_retain_T = torch.zeros(len(ids), dtype=torch.bool)
    for index, row in enumerate(rows):
        if row.kind == RETAIN:
            is_retain_T[places[index]] = True
    return PackedRows(
        input_ids=torch.tensor([ids]),
        position_ids=paths.position_T[None],
        is_retain=is_retain_T[None],
        paths=paths,
        score_places_U=score_places,
        kept=kept,
        rows=tuple(rows),
        num_examples=num_examples,
        share=share,
        retain_tokens=retain_tokens,
    )


def _add_group(
    members: Sequence[int],
    sequences: Sequence[Sequence[int]],
    segments: list[Segment],
    ids: list[int],
    places: dict[int, Tensor],
) -> None:
    """Appends the rows of a group, behind what they share, and notes the place of each of their tokens."""
    shared = _common_prefix([sequences[index] for index in members]) if len(members) > 1 else 0
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


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    columns = zip(*sequences, strict=False)  # Ends with the shortest.
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _kept_places(
    rows: Sequence[SourceRow], positions: Sequence[Tensor], places: dict[int, Tensor]
) -> tuple[Tensor, dict[int, KeptPlaces]]:
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
            targets_N=torch.cat([_targets(rows[index].tokens, positions[index]) for index in own]),
            row_N=torch.arange(len(own)).repeat_interleave(counts),
            example_M=torch.tensor([rows[index].example for index in own]),
        )
    return score_places, kinds


def _kept_positions(row: SourceRow, retain_tokens: RetainTokens) -> Tensor:
    """Positions of a row whose next token is learned or compared."""
    if row.kind == RETAIN and retain_tokens != "answer":
        return torch.arange(len(row.tokens.labels) - 1)
    return (torch.tensor(row.tokens.labels[1:], dtype=torch.long) != IGNORE_INDEX).nonzero()[:, 0]


def _targets(tokens: TokenizedExample, positions: Tensor) -> Tensor:
    return torch.tensor(tokens.input_ids)[positions + 1]
