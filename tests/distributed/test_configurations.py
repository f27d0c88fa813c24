"""What ships for ``accelerate launch``, sharding that is refused, and the order of an epoch for several processes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from conftest import TrainerMaker
from sku.data.joint import FILLER, WholeBatches
from sku.errors import RecipeError

FOLDER = Path(str(resources.files("sku"))) / "recipes" / "accelerate"
NAMES = ("ddp", "fsdp2", "zero3")


def content(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_every_key_is_one_of_accelerate_and_the_first_process_gathers_whole_weights() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)
    known = {option.dest for option in launch_command_parser()._actions}
    for name in NAMES:
        config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # Refuses unknown keys itself.
        assert isinstance(config, ClusterConfig)
        for key in ("fsdp_config", "deepspeed_config"):
            assert set(content(name).get(key, {})) <= known
    fsdp, deepspeed = content("fsdp2")["fsdp_config"], content("zero3")["deepspeed_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_cpu_ram_efficient_loading"] is False
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert (deepspeed["zero_stage"], deepspeed["zero3_init_flag"]) == (3, False)
    assert deepspeed["zero3_save_16bit_model"] is True


def test_sharding_that_leaves_no_whole_weights_is_refused_before_training(make_trainer: TrainerMaker) -> None:
    trainer = make_trainer()
    trainer._check_sharding()
    trainer.is_fsdp_enabled = True
    try:
        for version, kind, named in ((1, "FULL_STATE_DICT", "fsdp_version"), (2, "SHARDED_STATE_DICT", "FULL_STATE")):
            trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=version, state_dict_type=kind)
            with pytest.raises(RecipeError, match=named):
                trainer._check_sharding()
    finally:
        trainer.accelerator.state.fsdp_plugin = None


@pytest.mark.parametrize(("each", "processes"), [(1, 4), (2, 2), (4, 1), (2, 3)])
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
