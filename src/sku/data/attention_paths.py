"""Which tokens of a packed row see which: segments, and the path of each back to its first token.

A segment is a run of tokens. One with a prefix goes on where its prefix ends: its tokens see the prefix and each
other, never a sibling. Shapes: T = tokens of the packed row, S = segments, K = keys of all paths (those of a prefix
once for each segment that has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Part of a packed row; segments follow each other without a gap."""

    length: int
    """Tokens, 1 or more."""
    prefix: int | None = None
    """Index of the segment before it on its path; that one has none itself."""


@dataclass(frozen=True, kw_only=True)
class AttentionPaths:
    """The plan that attention layers follow. Numbers of the host and tensors of the device, so that no layer waits."""

    segments: tuple[Segment, ...]
    segment_T: Tensor
    """int64: index of each token's segment."""
    prefix_T: Tensor
    """int64: index of its prefix, or of its own segment where it has none."""
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
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """T."""
        return len(self.segment_T)

    @property
    def shares(self) -> bool:
        """Whether any segment has a prefix."""
        return any(segment.prefix is not None for segment in self.segments)

    def path_length(self, index: int) -> int:
        """Tokens of a segment and of its prefix."""
        length, prefix = self.segments[index]
        return length if prefix is None else length + self.segments[prefix].length

    def segment_mask(self, index: int, window: int | None) -> Tensor | None:
        """What the tokens of a segment see of their path.

        Args:
            index: Of the segment.
            window: Most tokens that one sees, itself included; all before it if None.

        Returns:
            ``[segment, path]`` bool on the plan's device, made once; None where that is a plain causal square.
        """
        length, prefix = self.segments[index]
        path = self.path_length(index)
        if prefix is None and (window is None or path <= window):
            return None
        key = (index, None if window is None or path <= window else window)
        if key not in self._masks:
            positions = torch.arange(path, device=self.segment_T.device)
            self._masks[key] = _in_reach(positions[path - length :, None], positions[None, :], key[1])
        return self._masks[key]

    def dense_mask(self, window: int | None) -> Tensor:
        """What each token sees of the whole packed row.

        Args:
            window: As of ``segment_mask``; distances are those along the path.

        Returns:
            ``[T, T]`` bool, made once.
        """
        key = (-1, window)
        if key not in self._masks:
            same_path = self.segment_T[:, None] == self.segment_T[None, :]
            same_path |= self.prefix_T[:, None] == self.segment_T[None, :]
            self._masks[key] = same_path & _in_reach(self.position_T[:, None], self.position_T[None, :], window)
        mask = self._masks[key]
        assert mask is not None
        return mask

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AttentionPaths:
        """The plan with its tensors on another device; the same plan where they are there."""
        if self.segment_T.device == torch.device(device):
            return self
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionPaths:
        """The plan with its tensors in memory that a GPU can read by itself."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Any) -> AttentionPaths:
        moved = {
            entry.name: change(value)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }
        # The list is the same one: where a model is spread over devices, each gets a copy of the plan.
        return replace(self, **moved, _masks={})


def plan_paths(segments: Sequence[Segment]) -> AttentionPaths:
    """Makes the plan of a packed row.

    Args:
        segments: In the order of their tokens; a prefix stands before those that go on from it.

    Returns:
        The plan, on the CPU.

    Raises:
        ValueError: There is no segment, one is empty, or a prefix comes later or has a prefix of its own.
    """
    if not segments:
        raise ValueError("a packed row without segments holds nothing")
    for index, (length, prefix) in enumerate(segments):
        if length < 1:
            raise ValueError(f"segment {index} has {length} tokens; it must have 1 or more")
        if prefix is not None and not (0 <= prefix < index and segments[prefix].prefix is None):
            raise ValueError(
                f"segment {index} has the prefix {prefix}, which must stand before it and have none itself"
            )
    lengths = [segment.length for segment in segments]
    starts = [0, *accumulate(lengths)]
    tokens = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    own = range(len(segments))
    prefixes = [index if (prefix := segments[index].prefix) is None else prefix for index in own]
    before = [0 if prefix == index else lengths[prefix] for index, prefix in zip(own, prefixes, strict=True)]
    paths = [length + shared for length, shared in zip(lengths, before, strict=True)]
    repeats = torch.tensor(lengths)
    return AttentionPaths(
        segments=tuple(segments),
        segment_T=torch.arange(len(segments)).repeat_interleave(repeats),
        prefix_T=torch.tensor(prefixes).repeat_interleave(repeats),
        position_T=torch.cat([torch.arange(shared, path) for shared, path in zip(before, paths, strict=True)]),
        key_index_K=torch.cat(
            [
                part
                for index, prefix in zip(own, prefixes, strict=True)
                for part in ((tokens[index],) if prefix == index else (tokens[prefix], tokens[index]))
            ]
        ),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        key_starts=torch.tensor([0, *accumulate(paths)], dtype=torch.int32),
        longest_segment=max(lengths),
        longest_path=max(paths),
    )


def _in_reach(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    reach = key <= query
    return reach if window is None else reach & (query - key < window)
