"""What libraries say and what of it a user hears."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from conftest import ModelMaker
from sku.cli.console import shown_messages
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


def test_a_message_is_shown_once_also_where_a_library_gave_the_root_logger_a_handler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        with shown_messages():
            logging.getLogger("sku.evaluate.judges").warning("a reply was cut")
        logging.getLogger("sku.evaluate.judges").warning("afterwards")
    finally:
        root.removeHandler(handler)
    printed = capsys.readouterr().err
    assert printed.count("a reply was cut") == 1
    assert printed.count("afterwards") == 1
