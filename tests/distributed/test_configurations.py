"""What ships for ``accelerate launch``, sharding that is refused, and the order of an epoch for several processes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from conftest import TrainerMaker
from sku.data.joint import FILLER, WholeBatches
from sku.errors import RecipeError

FOLDER = Path(str(resources.files("sku"))) / "recipes" / "accelerate"


def test_every_key_is_one_of_accelerate_and_the_first_process_gathers_whole_weights() -> None:
    known = {option.dest for option in launch_command_parser()._actions}
    for path in FOLDER.iterdir():
        config = load_config_from_file(str(path))  # Refuses unknown keys itself.
        assert isinstance(config, ClusterConfig)
        assert set(config.fsdp_config) <= known
    fsdp = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_cpu_ram_efficient_loading"] is False
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_sharding_that_leaves_no_whole_weights_is_refused_before_training(make_trainer: TrainerMaker) -> None:
    trainer = make_trainer()
    trainer._check_sharding()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(RecipeError, match="fsdp2"):
        trainer._check_sharding()
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = False, True
    try:
        for version, kind, named in ((1, "FULL_STATE_DICT", "fsdp_version"), (2, "SHARDED_STATE_DICT", "FULL_STATE")):
            trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=version, state_dict_type=kind)
            with pytest.raises(RecipeError, match=named):
                trainer._check_sharding()
    finally:
        trainer.accelerator.state.fsdp_plugin = None


@pytest.mark.parametrize(("each", "processes"), [(1, 4), (2, 3)])
def test_every_step_of_all_processes_holds_the_places_of_one_process(each: int, processes: int) -> None:
    """As accelerate deals batches out: none is left for one process alone, and no place comes twice."""
    for size in (1, 6, 8, 13):
        order = WholeBatches(size, each * processes)
        batches = BatchSampler(order, each, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        assert len({len(shard) for shard in shards}) == 1
        steps = [[place for batch in step for place in batch if place != FILLER] for step in zip(*shards, strict=True)]
        assert steps == list(BatchSampler(range(size), each * processes, drop_last=False))
        assert len(order) == len(list(order)) == len(shards[0]) * each * processes
