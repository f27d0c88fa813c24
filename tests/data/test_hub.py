"""The hub, with its two thin calls replaced: there is no network in tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from sku.config import SourceConfig
from sku.data.sources.hub import load_hub_dataset, resolve_commit
from sku.data.sources.tables import read_table
from sku.errors import DataError

COMMIT, OTHER = "a" * 40, "b" * 40
ID = "someone/things"


def hub_error(kind: type[hub_errors.HfHubHTTPError], message: str = "no") -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> list[dict[str, Any]]:
    """Replaces ``HfApi.dataset_info``; the list gets the arguments of each call."""
    asked: list[dict[str, Any]] = []

    def dataset_info(self: HfApi, repo_id: str, *, revision: str | None = None) -> SimpleNamespace:
        asked.append({"repo_id": repo_id, "revision": revision})
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(sha=answer)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    return asked


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path, commit: str | None) -> list[dict[str, Any]]:
    """Replaces ``datasets.load_dataset`` by a dataset in the cache folder of this commit."""
    asked: list[dict[str, Any]] = []
    rows = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    if commit is not None:
        place = folder / "someone___things" / "default" / "0.0.0" / commit
        rows.save_to_disk(place)
        rows = datasets.Dataset.from_file(str(next(place.glob("*.arrow"))))

    def load_dataset(path: str, name: str | None = None, **settings: Any) -> datasets.Dataset:
        asked.append({"path": path, "name": name, **settings})
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_branch_is_pinned_to_the_commit_it_resolved_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    infos, loads = answer_with(monkeypatch, COMMIT), serve(monkeypatch, tmp_path, COMMIT)
    source = SourceConfig(path=ID, revision="main", config_name="generation", split="validation")
    table = read_table(source)
    assert table.revision == COMMIT
    assert table.columns == ("question", "answer")
    assert infos == [{"repo_id": ID, "revision": "main"}]
    assert loads == [{"path": ID, "name": "generation", "revision": COMMIT, "split": "validation"}]


OFFLINE = hub_errors.OfflineModeIsEnabled("offline mode is enabled")


def test_offline_takes_the_copy_and_records_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer_with(monkeypatch, OFFLINE)
    loads = serve(monkeypatch, tmp_path, COMMIT)
    assert load_hub_dataset(SourceConfig(path=ID))[1] == COMMIT
    assert load_hub_dataset(SourceConfig(path=ID, revision=COMMIT))[1] == COMMIT
    assert [load["revision"] for load in loads] == [None, COMMIT]


def test_a_copy_of_another_commit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a hub, ``datasets`` takes the newest copy on the machine, whatever revision was asked for."""
    answer_with(monkeypatch, OFFLINE)
    serve(monkeypatch, tmp_path, OTHER)
    with pytest.raises(DataError, match=f"asked for at commit {COMMIT}, but this machine holds {OTHER}"):
        load_hub_dataset(SourceConfig(path=ID, revision=COMMIT))


def test_offline_without_a_known_commit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer_with(monkeypatch, OFFLINE)
    serve(monkeypatch, tmp_path, None)
    with pytest.raises(DataError, match="the commit of someone/things can't be found out"):
        load_hub_dataset(SourceConfig(path=ID))
    with pytest.raises(
        DataError, match="revision v1 of someone/things can't be resolved: set revision to a full commit"
    ):
        load_hub_dataset(SourceConfig(path=ID, revision="v1"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            hub_error(hub_errors.RepositoryNotFoundError),
            "no file or folder someone/things, and no hub dataset of that name",
        ),
        (hub_error(hub_errors.GatedRepoError), "someone/things is gated: ask for access"),
        (hub_error(hub_errors.RevisionNotFoundError), "has no revision v9"),
        (hub_error(hub_errors.HfHubHTTPError, "500 Server\nError"), "does not give someone/things: 500 Server Error"),
        (hub_errors.HFValidationError("bad name"), "no hub dataset of that name"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    answer_with(monkeypatch, error)
    with pytest.raises(DataError, match=message):
        resolve_commit(ID, "v9")


def test_a_network_failure_means_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    transport_error = hub_errors.HfHubHTTPError.__mro__[1]
    answer_with(monkeypatch, transport_error("no route"))
    assert resolve_commit(ID, None) is None
