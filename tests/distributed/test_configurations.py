"""The configurations for ``accelerate launch`` hold keys that accelerate knows, and those that this package needs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from conftest import TrainerMaker
from sku.errors import RecipeError

FOLDER = Path(str(resources.files("sku"))) / "recipes" / "accelerate"
NAMES = ("ddp", "fsdp2", "zero3")


def content(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_of_accelerate(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # Refuses unknown keys itself.
    assert isinstance(config, ClusterConfig)
    known = {option.dest for option in launch_command_parser()._actions}
    for key in ("fsdp_config", "deepspeed_config"):
        assert set(content(name).get(key, {})) <= known


def test_all_processes_read_weights_and_the_first_gathers_them() -> None:
    fsdp, deepspeed = content("fsdp2")["fsdp_config"], content("zero3")["deepspeed_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_cpu_ram_efficient_loading"] is False
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert (deepspeed["zero_stage"], deepspeed["zero3_init_flag"]) == (3, False)
    assert deepspeed["zero3_save_16bit_model"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1, "state_dict_type": "FULL_STATE_DICT"}, "FSDP1 is not supported: set fsdp_version: 2"),
        ({"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}, "set it to FULL_STATE_DICT"),
    ],
)
def test_sharding_that_leaves_no_whole_weights_is_refused_before_training(
    settings: dict[str, Any], message: str, make_trainer: TrainerMaker
) -> None:
    trainer = make_trainer()
    trainer._check_sharding()
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(**settings)
    try:
        with pytest.raises(RecipeError, match=message):
            trainer._check_sharding()
    finally:
        trainer.accelerator.state.fsdp_plugin = None
