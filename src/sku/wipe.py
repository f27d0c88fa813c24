"""Finding and removing hazardous weights that interrupted, failed or kept runs left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sku.errors import OutputError
from sku.storage import is_marked_hazardous, remove_hazardous, write_json


def hazardous_folders(root: Path) -> list[Path]:
    """Folders that are marked as hazardous, at a place and below it; links are not followed.

    Args:
        root: A run, a folder of runs, or a bad model itself.

    Returns:
        The outermost ones, in order, as absolute paths.

    Raises:
        OutputError: There is no such folder.
    """
    if not root.is_dir():
        raise OutputError(f"there is no folder {root}; give a run, a folder of runs, or a bad model")
    root = root.resolve()  # So that "." has a name, and a run's manifest beside it.
    if is_marked_hazardous(root):
        return [root]
    found = []
    for place, names, _ in os.walk(root):
        marked = {
            name for name in names if is_marked_hazardous(Path(place, name)) and not Path(place, name).is_symlink()
        }
        found += [Path(place, name) for name in marked]
        names[:] = [name for name in names if name not in marked]
    return sorted(found)


def wipe(folders: Sequence[Path]) -> None:
    """Removes marked folders, and notes in the manifests of their runs that the bad model is gone.

    Args:
        folders: From ``hazardous_folders``.

    Raises:
        OutputError: A folder is not marked, or something of it is left.
    """
    for folder in [folder.resolve() for folder in folders]:  # Before any is gone: this process may stand in it.
        if not is_marked_hazardous(folder):
            raise OutputError(f"{folder} is not marked as hazardous: nothing of it was removed")
        remove_hazardous(folder)
        manifest = folder.parent / "manifest.json"
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # No run's folder, or one whose manifest a resume will complain about.
        if isinstance(content, dict) and "bad_model" in content:
            write_json(manifest, {**content, "bad_model": {"kept": False}})
