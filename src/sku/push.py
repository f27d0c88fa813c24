"""The upload of an unlearned model or adapter: what may leave the machine, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, cast

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # Loaded lazily.
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors import SafetensorError, safe_open

from sku.errors import OutputError, one_line
from sku.progress import without_secrets
from sku.report.card import CARD_FILE, TAG, check_adapter
from sku.report.read_run import Part, RecordedRun, read_run
from sku.storage import HAZARD_KEY, is_marked_hazardous

SHARED = (
    "README.md", "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "tokenizer*.json", "tokenizer*.model", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.*", "additional_chat_templates/*.jinja", "*processor_config.json", "configuration_*.py",
    "modeling_*.py", "tokenization_*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""All that an unlearned model consists of; anything else in the folder, pickles above all, stops the upload."""
_HttpError = cast("type[Exception]", HfHubHTTPError.__mro__[1])
"""``HTTPError`` of the HTTP library below the hub's client, which is httpx or httpx2 by version."""
_LOGIN = "log in with `hf auth login` and a token that may write there"


class PushPlan(NamedTuple):
    """What will be uploaded, checked."""

    folder: Path
    repo_id: str
    part: Part
    files: Mapping[str, int]
    """Path inside the repository -> bytes."""


def plan_push(run_folder: Path, repo_id: str, part: Part = "model", *, acknowledged: bool = False) -> PushPlan:
    """Checks everything that can be checked without the hub.

    Args:
        run_folder: Of a finished run.
        repo_id: ``NAMESPACE/NAME``.
        part: The whole model or the adapter.
        acknowledged: Whether somebody says that an adapter is known to be the bad model's.

    Raises:
        OutputError: The run is hazardous, unfinished or not evaluated, or its folder holds no card, pickled weights,
            links or files that are no part of a model; or ``repo_id`` is no name of a repository; or an adapter is the
            bad model's and nobody says so.
        EvaluationError: Its results are broken.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OutputError(f"{repo_id} is no name of a hub repository: {one_line(error)}") from None
    if "/" not in repo_id:
        raise OutputError(f"{repo_id} has no namespace; give USER_OR_ORGANISATION/{repo_id}")
    run = read_run(run_folder, replies=False)
    folder = run.parts().get(part)
    if folder is None:
        why = run.manifest.get("negated_adapter") or "runs with tuning lora or qlora leave one"
        raise OutputError(f"{run_folder} holds no {part}: {why if part == 'adapter' else 'run it again'}")
    _check_not_hazardous(run, folder)
    files = dict(_files(folder))
    _check_weights(folder, files)
    if part == "adapter":
        check_adapter(run, acknowledged=acknowledged)
    if CARD_FILE not in files or not _has_own_card(folder):
        raise OutputError(f"{folder} has no model card of SKU: --license NAME or --base-model ID writes it")
    return PushPlan(folder, repo_id, part, files)


def upload(plan: PushPlan, *, public: bool = False, revision: str | None = None) -> str:
    """Makes the repository where there is none and commits the files.

    Weights go first; nothing is seen in the repository before the commit that ends it. An upload that broke off is
    done again with the same call: what the hub has already is not sent twice. Gives the address of the commit.

    Raises:
        OutputError: The hub is switched off, refuses, fails, or has a repository of that name that everybody sees
            while ``public`` was not asked for.
    """
    if constants.HF_HUB_OFFLINE:
        raise OutputError("HF_HUB_OFFLINE is set: nothing was uploaded; unset it, or use --dry-run")
    if get_token() is None:
        raise OutputError(f"there is no token for the hub: {_LOGIN}")
    disable_progress_bars()
    api = HfApi(library_name="sku-unlearning")
    with _named_hub_errors(plan.repo_id):
        api.create_repo(plan.repo_id, private=not public, exist_ok=True)
        # A repository that was there already keeps its visibility.
        if not api.model_info(plan.repo_id).private and not public:
            raise OutputError(
                f"{plan.repo_id} exists and is public: nothing was uploaded; add --public, choose another name, or "
                "make it private in its settings"
            )
        if revision is not None and revision != constants.DEFAULT_REVISION:
            api.create_branch(plan.repo_id, branch=revision, exist_ok=True)
        # Not upload_folder: with Xet that one commits in batches, and a broken-off upload would show weights
        # without their card.
        done = api.create_commit(
            plan.repo_id,
            [CommitOperationAdd(name, plan.folder / name) for name in plan.files],
            commit_message=f"Unlearned {plan.part} with its card (sku push)",
            revision=revision,
        )
    return str(done.commit_url)


def _has_own_card(folder: Path) -> bool:
    try:
        return TAG in (ModelCard.load(folder / CARD_FILE).data.tags or ())
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _check_not_hazardous(run: RecordedRun, folder: Path) -> None:
    if is_marked_hazardous(folder):
        raise OutputError(f"{folder} is marked as hazardous ({HAZARD_KEY}): it is never uploaded")
    if run.negates and run.strength < 0:
        raise OutputError(
            f"alpha is {run.strength:g}: a negative one adds what the bad model learned; such a model is never shared"
        )


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size of everything in a folder, where all of it may be shared."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise OutputError(f"{path} is a link, which may lead to anything: put the file itself there, or remove it")
        if path.is_dir():
            continue
        if not any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in SHARED):
            raise OutputError(
                f"{path} is no part of a model that sku push knows: nothing is uploaded; remove the file"
            )
        yield name, path.stat().st_size


def _check_weights(folder: Path, files: Iterable[str]) -> None:
    """Weights are there and whole: a header that fits the size of its file."""
    weights = [folder / name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise OutputError(f"{folder} holds no weights in safetensors: nothing is uploaded")
    for path in weights:
        try:
            with safe_open(path, framework="numpy"):
                pass  # It compares the header with the file's size.
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} is damaged or cut off: nothing is uploaded; run again") from error


@contextmanager
def _named_hub_errors(repo_id: str) -> Iterator[None]:
    """What the hub's client raises, in one line each; tokens are in no message."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, _HttpError) as error:
        raise OutputError(_message(repo_id, error)) from error


def _message(repo_id: str, error: BaseException) -> str:
    of_hub, found = (ConnectionError, TimeoutError, _HttpError), error
    # The client wraps what happened to a weight file in an error of its own.
    while not isinstance(found, of_hub) and found.__cause__ is not None:
        found = found.__cause__
    if not isinstance(found, of_hub):
        return f"the upload to {repo_id} failed: {without_secrets(one_line(error))}"
    told, again = without_secrets(one_line(found)), "nothing was committed; the same command goes on"
    if not isinstance(found, HfHubHTTPError):
        return f"the hub is out of reach ({told}): {again}"
    status = found.response.status_code
    if status in (401, 403, 404):
        return f"the hub refuses {repo_id} (HTTP {status}), or has none that you may write to: {_LOGIN}"
    if status in (409, 429) or status >= 500:
        return f"the hub fails (HTTP {status}: {told}): {again}, after a while"
    return f"the hub refuses {repo_id} (HTTP {status}: {told})"
