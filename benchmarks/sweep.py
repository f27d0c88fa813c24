"""The choice of alpha on the embedded world: wall and processor time of ``sku sweep`` with a bad model that is there.

    python benchmarks/sweep.py [--bad FOLDER] [--set sweep.alphas=[1.0]] [--repeat 3]

The bad model is trained first where none is given, and is not timed. Each repetition is a process of its own, from the
start of Python to its end, in a new folder, so that no point is taken over.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALWAYS = ("--set", "sweep.if_none=nearest")  # Times, not picks.
ROOT = Path(__file__).resolve().parents[1]


def sku(*arguments: str) -> tuple[float, float]:
    """Runs a command; wall and processor seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "sku", *arguments], check=True, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, used


def main() -> None:
    """Prints the machine and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bad", type=Path, help="folder of a bad model of the embedded recipe")
    parser.add_argument("--set", action="append", default=[], help="a recipe key, as of sku sweep")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    changes = [word for change in options.set for word in ("--set", change)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        bad = options.bad or Path(folder) / "bad"
        if options.bad is None:
            sku("acquire", "--out", str(bad))
        for number in range(options.repeat):
            out = Path(folder) / f"sweep-{number}"
            wall, used = sku("sweep", str(bad), "--recipe", "embedded", "--out", str(out), *changes, *ALWAYS)
            print(f"sweep {number + 1}: {wall:.1f} s, processor {used:.1f} s", flush=True)


if __name__ == "__main__":
    main()
