"""What libraries say and what of it a user hears."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from conftest import ModelMaker
from sku.quiet import quiet_libraries


@pytest.mark.parametrize("quiet", [False, True])
def test_an_adapter_of_a_model_without_a_configuration_is_saved_without_a_word(
    quiet: bool, make_model: ModelMaker, tmp_path: Path
) -> None:
    """A folder with a GGUF file has no config.json, and PEFT warns of it twice for each checkpoint."""
    model = make_model()
    model.name_or_path = str(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if quiet:
            quiet_libraries()
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        adapted.save_pretrained(str(tmp_path / "adapter"))
    said = [str(warning.message) for warning in heard]
    assert any(message.startswith("Could not find a config file in") for message in said) is not quiet
