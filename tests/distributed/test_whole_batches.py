"""The order of an epoch for several processes."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from sku.data.joint import FILLER, WholeBatches


@pytest.mark.parametrize("size", [1, 6, 8, 13])
@pytest.mark.parametrize(("each", "processes"), [(1, 4), (2, 2), (4, 1), (2, 3)])
def test_every_step_of_all_processes_holds_the_places_of_one_process(size: int, each: int, processes: int) -> None:
    """As accelerate deals batches out: none is left for one process alone, and no place comes twice."""
    order = WholeBatches(size, each * processes)
    shards = [
        list(BatchSamplerShard(BatchSampler(order, each, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1
    steps = [[place for batch in step for place in batch if place != FILLER] for step in zip(*shards, strict=True)]
    alone = list(BatchSampler(range(size), each * processes, drop_last=False))
    assert steps == alone
    assert len(order) == len(list(order)) == len(shards[0]) * each * processes
