"""A judge's calibration on disk: JSON with counts and hashes, no text, so it may be shared.

Keys: ``schema_version``; ``judge``, the name, version, revision and key of the judge that was measured;
``calibration``, the fields of ``Calibration``; ``groups``, a list of the same for each source of the labelled replies,
where there are several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.judges.base import Calibration, JudgeCard
from sku.evaluate.record_files import read_json_object
from sku.storage import write_json

CALIBRATION_SCHEMA = 1
_MEND = "run sku judge calibrate again"


def beside(folder: Path) -> Path:
    """Where the calibration of a judge that is a folder lies, so that it is found without being named.

    Not inside: the hash of the folder's files is the judge's revision.
    """
    named = folder if folder.name else folder.absolute()
    return named.with_name(f"{named.name}.calibration.json")


def write_calibration(
    path: Path, card: JudgeCard, calibration: Calibration, groups: Sequence[Calibration] = ()
) -> None:
    """Writes what was measured on a judge; a file that is there is replaced.

    Raises:
        OutputError: The file can't be written.
    """
    judge = {"name": card.name, "version": card.version, "revision": card.revision, "key": card.key}
    content = {"schema_version": CALIBRATION_SCHEMA, "judge": judge, "calibration": dataclasses.asdict(calibration)}
    write_json(path, {**content, "groups": [dataclasses.asdict(group) for group in groups]})


def read_calibration(path: Path, card: JudgeCard) -> tuple[Calibration, tuple[Calibration, ...]]:
    """Reads a calibration back.

    Args:
        path: File that ``write_calibration`` wrote.
        card: Of the judge that it is wanted for.

    Returns:
        On all labelled replies, and on each of their sources.

    Raises:
        EvaluationError: The file is missing or broken, or was measured on another judge.
    """
    content = read_json_object(path, _MEND)
    judge, calibration, groups = _checked(content, path)
    if judge.get("key") != card.key:
        raise EvaluationError(
            f"calibration {path} was measured on judge {judge.get('name')}, version {judge.get('version')}, revision "
            f"{judge.get('revision')}; the judge here is {card.name}, version {card.version}, revision "
            f"{card.revision}: run sku judge calibrate on it"
        )
    return calibration, groups


def _checked(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], Calibration, tuple[Calibration, ...]]:
    if content.get("schema_version") != CALIBRATION_SCHEMA:
        raise EvaluationError(f"calibration {path} is not of schema version {CALIBRATION_SCHEMA}: {_MEND}")
    try:
        calibration = Calibration(**content["calibration"])
        groups = tuple(Calibration(**group) for group in content.get("groups", ()))
        counts = [
            pair
            for one in (calibration, *groups)
            for pair in ((one.harmful_found, one.harmful), (one.safe_found, one.safe))
        ]
        fits = all(0 <= found <= total and total > 0 for found, total in counts)
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"calibration {path} doesn't fit its schema ({error}): {_MEND}") from None
    if not fits or not isinstance(content.get("judge"), dict):
        raise EvaluationError(f"calibration {path} holds counts that can't be, or no judge: {_MEND}")
    return content["judge"], calibration, groups
