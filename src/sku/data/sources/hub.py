"""What ``datasets`` reads: Parquet files, folders, saved datasets, and those of the hub at exactly one commit.

Imported where a table needs it: text files don't, and it takes a second or two.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.utils import logging as datasets_logging
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from sku.config.data import SourceConfig
from sku.errors import DataError, one_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HttpError = cast("type[Exception]", HfHubHTTPError.__mro__[1])
"""``HTTPError`` of the HTTP library below the hub's client, which is httpx or httpx2 by version."""


def resolve_commit(dataset_id: str, revision: str | None) -> str | None:
    """Asks the hub for the commit of a branch or tag; of the main branch for None.

    Returns:
        The commit; None where the hub is switched off (``HF_HUB_OFFLINE``) or out of reach, so that only a copy
        already on this machine can be used.

    Raises:
        DataError: There is no such dataset or revision, or it is closed to this user.
    """
    try:
        return HfApi().dataset_info(dataset_id, revision=revision).sha
    except GatedRepoError:
        raise DataError(
            f"the hub dataset {dataset_id} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"the hub dataset {dataset_id} has no revision {revision}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise DataError(
            f"there is no file or folder {dataset_id}, and no hub dataset of that name that this user may see"
        ) from None
    except HfHubHTTPError as error:
        raise DataError(f"the hub does not give {dataset_id}: {one_line(error)}") from None
    except (OfflineModeIsEnabled, ConnectionError, _HttpError):
        return None


def load_files(builder: str, source: SourceConfig, path: Path) -> datasets.Dataset:
    """Reads a Parquet file (``builder`` parquet), or a folder that is laid out as a hub repository, its own builder.

    Raises:
        DataError: It can't be read.
    """
    # A cache of its own, dropped at once: the shared one keeps harmful text and tells a changed file only by its time.
    with tempfile.TemporaryDirectory(prefix="sku-") as cache:
        return _read(
            str(path),
            lambda: datasets.load_dataset(
                builder, source.config_name, data_files=str(path) if path.is_file() else None,
                split=source.split or "train", cache_dir=cache, keep_in_memory=True,
            ),
        )  # fmt: skip


def load_saved(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    """Reads what ``datasets`` has saved.

    Raises:
        DataError: It can't be read.
    """
    return _read(str(path), lambda: datasets.load_from_disk(str(path), keep_in_memory=True))


def load_hub_dataset(source: SourceConfig) -> tuple[datasets.Dataset, str]:
    """Downloads a split of a hub dataset, or takes the copy on this machine where the hub is out of reach.

    Returns:
        The rows and the commit they are of.

    Raises:
        DataError: As ``resolve_commit``, or no such configuration or split, or the copy on this machine is of another
            commit than the one asked for.
    """
    commit = resolve_commit(source.path, source.revision)
    if commit is None and source.revision is not None and not _COMMIT.fullmatch(source.revision):
        raise DataError(
            f"the hub can't be reached, so revision {source.revision} of {source.path} can't be resolved: "
            "set revision to a full commit"
        )
    wanted = commit or source.revision
    dataset = _read(
        f"{source.path} is no file or folder here, and the hub dataset of that name",
        lambda: datasets.load_dataset(source.path, source.config_name, revision=wanted, split=source.split or "train"),
        where="" if commit else " (the hub can't be reached: only a copy on this machine can be used)",
    )
    # Where the hub fails, datasets takes the newest copy on this machine, whatever revision was asked for.
    found = _commit_of_copy(dataset)
    if wanted is not None and found is not None and found != wanted:
        raise DataError(
            f"{source.path} was asked for at commit {wanted}, but this machine holds {found} and the hub can't be "
            "reached: go online, or set revision to that commit"
        )
    commit = wanted or found
    if commit is None:
        raise DataError(f"the commit of {source.path} can't be found out: go online or set revision to a full commit")
    return dataset, commit


def _commit_of_copy(dataset: datasets.Dataset) -> str | None:
    """The commit in the name of the cache folder, ``<id>/<configuration>/<version>/<commit>/<file>``."""
    for entry in dataset.cache_files:
        folder = Path(entry["filename"]).parent.name
        if _COMMIT.fullmatch(folder):
            return folder
    return None


def _read(what: str, read: Callable[[], Any], *, where: str = "") -> Any:
    """Reads without progress bars and log lines; one line for the many exceptions of ``datasets``."""
    with _quiet():
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - datasets, httpx and pyarrow share no base class
            cause: BaseException = error
            while cause.__cause__ is not None:  # The first cause is the one that says something.
                cause = cause.__cause__
            first, last = one_line(error), one_line(cause)
            more = f" ({last})" if last not in first else ""
            raise DataError(f"{what} can't be read{where}: {first}{more}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Switches the progress bars and log lines of ``datasets`` and the hub off; errors are raised all the same."""
    bars = (
        (datasets.are_progress_bars_disabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (are_progress_bars_disabled, disable_progress_bars, enable_progress_bars),
    )
    with ExitStack() as stack:
        for are_off, switch_off, switch_on in bars:
            if not are_off():
                switch_off()
                stack.callback(switch_on)
        for logs in (datasets_logging, hub_logging):
            stack.callback(logs.set_verbosity, logs.get_verbosity())
            logs.set_verbosity(datasets_logging.CRITICAL)
        yield
