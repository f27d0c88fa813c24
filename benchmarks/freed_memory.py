"""What does it save that ``sku`` keeps freed memory (``sku.freed_memory``)? One command, both ways in turns.

    python benchmarks/freed_memory.py --repeat 2 -- acquire results/smollm2-135m-twins.yaml --out {out} \
        --set acquire.training.max_steps=10

``{out}`` becomes a new folder each time. The side without it gets glibc's own ``MALLOC_TOP_PAD_`` from the
environment, which ``sku`` leaves to the user. Nothing of the command's output is shown unless it fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from machine import processor_name

GLIBC = {"MALLOC_TOP_PAD_": str(128 * 1024)}
"""Its default."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call."""

    wall: float
    """Seconds."""
    peak: float
    """GiB of memory, the most that was held."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="Calls of each side.")
    parser.add_argument("words", nargs="+", help="The command, without sku, behind --.")
    options = parser.parse_args()
    print(f"machine   {processor_name()}, {torch.get_num_threads()} threads")
    print(f"versions  torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"command   sku {' '.join(options.words)}")
    costs: dict[str, list[Cost]] = {"kept": [], "given back": []}
    for number in range(2 * options.repeat):
        side = ("kept", "given back")[number % 2]
        costs[side].append(_call(options.words, {} if side == "kept" else GLIBC))
        print(f"{side:10} {costs[side][-1].wall:.1f} s, {costs[side][-1].peak:.2f} GiB", flush=True)
    wall, peak = (
        [statistics.median(getattr(cost, name) for cost in costs[side]) for side in ("given back", "kept")]
        for name in ("wall", "peak")
    )
    print(f"medians   {wall[0]:.1f} s given back, {wall[1]:.1f} s kept: {wall[0] / wall[1]:.2f} x")
    print(f"memory    {peak[0]:.2f} GiB given back, {peak[1]:.2f} GiB kept: {peak[1] / peak[0]:.2f} x")


def _call(words: list[str], environment: dict[str, str]) -> Cost:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sku", *(word.replace("{out}", str(Path(folder) / "out")) for word in words)]
        with tempfile.TemporaryFile("w+") as output:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=output, stderr=output, env=plain | environment)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                sys.exit(f"the command failed with exit code {process.returncode}:\n{output.read()[-2000:]}")
    return Cost(wall=wall, peak=usage.ru_maxrss / 2**20)


if __name__ == "__main__":
    main()
