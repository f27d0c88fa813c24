"""Checks what is in a built wheel and sdist before anybody gets them (``make dist``).

    python scripts/check_dist.py dist

Both hold what git tracks and nothing else: no model, no data, no run that lies about in the checkout. The wheel holds
the whole package, types and recipes included; neither holds weights or tables beyond those of the invented
world and two tables of our own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/sku/"
WORLD = PACKAGE + "world/model/"
"""The only weights that are shared: those of the invented world."""
OUR_TABLES = (
    PACKAGE + "prompts/borderline.csv", PACKAGE + "prompts/normal.csv",
    "results/experiments.jsonl", "results/hand_labels.jsonl",
)  # fmt: skip
"""Tables of our own words and figures, without a line of anybody's data."""
WEIGHTS_AND_DATA = {
    ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".parquet", ".arrow", ".csv",
    ".tsv", ".jsonl", ".gz", ".xz", ".zst", ".zip",
}  # fmt: skip
NEEDED = (
    "py.typed",
    "_version.py",
    "recipes/embedded.yaml",
    "recipes/accelerate/fsdp2.yaml",
    "prompts/normal.csv",
    "world/model/config.json",
)
"""Of the package."""
MOST_BYTES = 20 * 2**20
"""Of one archive."""
MADE = {"PKG-INFO", ".gitignore"}
"""What the build puts into an sdist itself."""


def tracked(root: Path = ROOT) -> set[str]:
    """All files of the checkout that git tracks."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name}


def sdist_names(archive: Path) -> set[str]:
    """Files of an sdist, without the folder around them."""
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if not member.isdir()}


def wheel_names(archive: Path) -> set[str]:
    """Files of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        return {name for name in wheel.namelist() if not name.endswith("/")}


def faults_of_sdist(names: set[str], known: set[str]) -> Iterator[str]:
    """What is wrong with an sdist.

    Args:
        names: Its files.
        known: Files of the checkout that git tracks.
    """
    yield from (f"{name} is not tracked by git" for name in sorted(names - known - MADE))
    missing = {name for name in known if name.startswith(PACKAGE)} - names
    yield from (f"{name} is missing" for name in sorted(missing))
    yield from shared_content(names)


def faults_of_wheel(names: set[str], known: set[str], version: str) -> Iterator[str]:
    """What is wrong with a wheel.

    Args:
        names: Its files.
        known: Files of the checkout that git tracks.
        version: Of the package.
    """
    described = f"sku_unlearning-{version}.dist-info/"
    own = {name for name in names if not name.startswith(described)}
    expected = {name.removeprefix("src/") for name in known if name.startswith(PACKAGE)}
    yield from (f"{name} is no file of the package" for name in sorted(own - expected))
    yield from (f"{name} is missing" for name in sorted(expected - own))
    yield from (f"sku/{name} is missing" for name in NEEDED if f"sku/{name}" not in own)
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if described + name not in names:
            yield f"{described}{name} is missing"
    yield from shared_content({f"src/{name}" for name in own})


def shared_content(names: set[str]) -> Iterator[str]:
    """Weights and tables outside the invented world."""
    for name in sorted(names):
        if name in OUR_TABLES or name.startswith(WORLD):
            continue
        if PurePosixPath(name).suffix.lower() in WEIGHTS_AND_DATA:
            yield f"{name} holds weights or data: it must not be shared"


def own_version() -> str:
    """The version as its one place has it."""
    found: dict[str, str] = {}
    exec((ROOT / "src" / "sku" / "_version.py").read_text(encoding="utf-8"), found)
    return found["__version__"]


def faults(folder: Path, known: set[str], version: str) -> Iterator[str]:
    """What is wrong with a folder of archives."""
    archives = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".tar.gz", ".whl")}
    for suffix, found in archives.items():
        wanted = f"sku_unlearning-{version}"
        if len(found) != 1 or not found[0].name.startswith(wanted):
            yield f"{folder} must hold one {wanted}*{suffix}, and holds {', '.join(map(str, found)) or 'none'}"
            continue
        if found[0].stat().st_size > MOST_BYTES:
            yield f"{found[0]} is larger than {MOST_BYTES / 2**20:.0f} MiB: what is in it?"
        if suffix == ".whl":
            yield from (
                f"{found[0].name}: {fault}" for fault in faults_of_wheel(wheel_names(found[0]), known, version)
            )
        else:
            yield from (f"{found[0].name}: {fault}" for fault in faults_of_sdist(sdist_names(found[0]), known))


def main() -> int:
    """Checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `python -m build` wrote")
    found = list(faults(parser.parse_args().folder, tracked(), own_version()))
    for fault in found:
        print(fault, file=sys.stderr)
    if not found:
        print("wheel and sdist hold the package, and nothing that must not be shared")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
