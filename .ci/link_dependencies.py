"""Gives a new venv what a wheel asks for, and no more: links to the venv that runs this, not a second install.

    .venv/bin/python .ci/link_dependencies.py dist/NAME.whl OTHER_VENV

What the wheel's metadata leaves out is missing there, as it would be after ``pip install`` elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed(wheel: Path) -> dict[str, Distribution]:
    """Every distribution that a wheel needs without extras, those that they need included, by its name."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(archive.read(name).decode("utf-8"))
    found: dict[str, Distribution] = {}
    met: set[str] = set()
    todo = [(Requirement(text), "") for text in about.get_all("Requires-Dist") or []]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if f"{requirement}{extra}" in met:
            continue
        met.add(f"{requirement}{extra}")
        one = found[requirement.name.lower().replace("_", "-")] = distribution(requirement.name)
        todo += [(Requirement(text), name) for text in one.requires or [] for name in ("", *requirement.extras)]
    return found


def link(found: dict[str, Distribution], packages: Path) -> None:
    """Puts the folders and files of distributions into a ``site-packages``; scripts stay where they are."""
    for one in found.values():
        for name in {file.parts[0] for file in one.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(one.locate_file(name))).resolve())


def main() -> None:
    """Links what the wheel needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("venv", type=Path)
    given = parser.parse_args()
    version = "python{}.{}".format(*sys.version_info)
    link(needed(given.wheel), given.venv / "lib" / version / "site-packages")


if __name__ == "__main__":
    main()
