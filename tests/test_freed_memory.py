"""Blocks that are freed are taken again without the system's help."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from sku.freed_memory import keep_freed_memory

done = "keep" in sys.argv and keep_freed_memory()
block = bytearray(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    block = None
    block = bytearray(b"1") * (64 * 2**20)
begun = faults()
for _ in range(8):
    block = None
    block = bytearray(b"1") * (64 * 2**20)
print(int(done), faults() - begun)
"""
PAGES = 64 * 2**20 // 4096
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")


def faults(*words: str, **environment: str) -> tuple[int, int]:
    """Whether it was done, and page faults of eight blocks of 64 MiB, one after the other."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True, env=plain | environment
    )
    done, count = found.stdout.split()
    return int(done), int(count)


@glibc
def test_a_freed_block_is_taken_again_without_a_page_fault() -> None:
    done, kept = faults("keep")
    assert done
    assert kept < PAGES // 4
    # Huge pages fault less often, so that few faults alone would prove nothing.
    assert kept < faults()[1] / 4


@glibc
def test_settings_of_the_user_stay() -> None:
    assert faults("keep", MALLOC_TOP_PAD_="4096")[0] == 0
