"""Two small runs of the embedded model: one with whole weights, one with an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import MadeOnce
from sku.chat import Pair
from test_pipeline import LORA, once


@pytest.fixture(scope="module")
def adapter_run(made_once: MadeOnce) -> Path:
    return once(made_once, "lora_run", *LORA, "keep_bad_model=true").folder


@pytest.fixture(scope="module")
def whole_run(made_once: MadeOnce) -> Path:
    return once(made_once, "full_run").folder


@pytest.fixture(scope="module")
def adapter_pair(adapter_run: Path) -> Pair:
    return Pair(adapter_run, max_new_tokens=12)


@pytest.fixture(scope="module")
def whole_pair(whole_run: Path) -> Pair:
    return Pair(whole_run, max_new_tokens=12)
