"""What a release promises: one version, tested Pythons, extras that hold what is imported, and clean archives."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sku

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(sku.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
METADATA: dict[str, Any] = PROJECT["project"]
DISTRIBUTIONS = {
    "sklearn": "scikit-learn", "yaml": "pyyaml", "ruamel": "ruamel.yaml", "lazy_loader": "lazy-loader",
    "rouge_score": "rouge-score",
    "lm_eval": "lm-eval", "PIL": "matplotlib", "markupsafe": "jinja2", "click": "typer",
}  # fmt: skip
"""Import -> the dependency or extra that brings it, where they are named differently."""
WITHOUT_EXTRA = {
    "vllm": "pins a torch of its own: docs/evaluation.md says how to install it apart",
    "torchao": "only for two of transformers' optimizers, and not tested here",
}


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found is not None
    return found.group().lower().replace("_", "-")


DEPENDENCIES = {name_of(requirement) for requirement in METADATA["dependencies"]}


def extra_packages(extra: str) -> set[str]:
    """Packages of an extra, with those of the extras that it names."""
    packages: set[str] = set()
    for requirement in METADATA["optional-dependencies"][extra]:
        if name_of(requirement) == METADATA["name"]:
            inside = requirement.partition("[")[2].rstrip("]")
            packages |= {package for other in inside.split(",") for package in extra_packages(other)}
        else:
            packages.add(name_of(requirement))
    return packages


EXTRAS = {extra: extra_packages(extra) for extra in METADATA["optional-dependencies"]}
FOR_USERS = set(EXTRAS) - {"dev"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages that a file imports, also by name: ``import_module`` and ``find_spec``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "find_spec"):
                yield str(node.args[0].value).partition(".")[0]


def packages_in_use() -> dict[str, set[Path]]:
    """Distribution -> files that import it, without the standard library and our own."""
    found: dict[str, set[Path]] = {}
    for path in SOURCE.rglob("*.py"):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name != "sku" and name not in sys.stdlib_module_names:
                distribution = DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
                found.setdefault(distribution, set()).add(path)
    return found


OPTIONAL = {name: files for name, files in packages_in_use().items() if name not in DEPENDENCIES}


def test_the_version_stands_in_one_place() -> None:
    assert METADATA["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/sku/_version.py"
    literal = f'"{sku.__version__}"'
    places = [path for path in SOURCE.rglob("*.py") if literal in path.read_text(encoding="utf-8")]
    assert places == [SOURCE / "_version.py"]


def test_the_changelog_has_a_section_for_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == sku.__version__
    section = text.partition(f"## [{sku.__version__}]")[2].partition("\n## ")[0]
    assert "### Added" in section
    assert section.count("\n- ") > 5


def classified_pythons() -> list[str]:
    prefix = "Programming Language :: Python :: "
    named = [entry.removeprefix(prefix) for entry in METADATA["classifiers"] if entry.startswith(prefix)]
    return [version for version in named if re.fullmatch(r"3\.\d+", version)]


def test_pythons_that_are_promised_are_those_that_ci_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (tested,) = re.findall(r'^tested="([\d. ]+)"', script, flags=re.MULTILINE)
    assert classified_pythons() == tested.split()
    assert METADATA["requires-python"] == f">={classified_pythons()[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == classified_pythons()[0]


def test_every_requirement_is_pinned_for_tests() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in lines if "==" in line}
    wanted = DEPENDENCIES | set().union(*EXTRAS.values())
    assert wanted - pinned == set()


def test_every_optional_import_belongs_to_an_extra() -> None:
    assert {"bitsandbytes", "gguf", "openai", "lm-eval"} <= set(OPTIONAL)
    known = set().union(*(EXTRAS[extra] for extra in FOR_USERS)) | set(WITHOUT_EXTRA)
    assert {name: sorted(map(str, files)) for name, files in OPTIONAL.items() if name not in known} == {}


def test_every_extra_but_docs_holds_what_is_imported() -> None:
    """An extra for a package that nothing uses would be a promise without content."""
    for extra in FOR_USERS - {"docs"}:
        assert EXTRAS[extra] <= set(OPTIONAL), extra
    assert EXTRAS["eval"] == EXTRAS["chat"] | EXTRAS["lm-eval"]
    assert EXTRAS["dev"] >= set().union(*EXTRAS.values())


@pytest.mark.parametrize("package", sorted(set(OPTIONAL) - set(WITHOUT_EXTRA)))
def test_an_error_names_the_extra_that_brings_a_missing_package(package: str) -> None:
    """Somewhere among the files that import it, or that look for it."""
    advice = {
        extra
        for path in OPTIONAL[package]
        for extra in re.findall(r"sku-unlearning\[([a-z-]+)\]", path.read_text(encoding="utf-8"))
    }
    assert any(package in EXTRAS[extra] for extra in advice), f"{package}: no file names its extra"


def test_every_extra_is_explained() -> None:
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE))
    assert rows == set(EXTRAS)
    for extra in FOR_USERS:
        (row,) = re.findall(rf"^\| `{extra}` \|.*$", page, flags=re.MULTILINE)
        assert all(package in row.lower().replace("_", "-") for package in EXTRAS[extra]), extra


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sku.config import ModelConfig
    from sku.errors import ModelError
    from sku.model_files import locate_model
    from sku.models import check_four_bit

    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr("sku.model_files.find_spec", lambda name: None)
    monkeypatch.setattr("sku.models.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'pip install "sku-unlearning\[gguf\]"'):
        locate_model(ModelConfig(path=str(tmp_path), gguf_file="a.gguf"))
    with pytest.raises(ModelError, match=r'pip install "sku-unlearning\[gpu\]"'):
        check_four_bit()


@pytest.fixture(scope="module")
def check_dist() -> ModuleType:
    """The script behind ``make dist``."""
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / "scripts" / "check_dist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_files() -> set[str]:
    """Of the package, as git would list them."""
    return {
        f"src/sku/{path.relative_to(SOURCE)}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def wheel_of(files: set[str]) -> set[str]:
    info = f"sku_unlearning-{sku.__version__}.dist-info/"
    about = {f"{info}{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    return {name.removeprefix("src/") for name in files} | about


def test_good_archives_pass(check_dist: ModuleType, tmp_path: Path) -> None:
    files = {*package_files(), "README.md"}
    assert list(check_dist.faults_of_wheel(wheel_of(package_files()), files, sku.__version__)) == []
    assert list(check_dist.faults_of_sdist({*files, "PKG-INFO"}, files)) == []
    assert check_dist.own_version() == sku.__version__

    base = f"sku_unlearning-{sku.__version__}"
    with zipfile.ZipFile(tmp_path / f"{base}-py3-none-any.whl", "w") as wheel:
        for name in wheel_of(package_files()):
            wheel.writestr(name, "")
    with tarfile.open(tmp_path / f"{base}.tar.gz", "w:gz") as archive:
        for name in files:
            archive.addfile(tarfile.TarInfo(f"{base}/{name}"))
    assert list(check_dist.faults(tmp_path, files, sku.__version__)) == []
    assert len(list(check_dist.faults(tmp_path, files, "9.9.9"))) == 2
    (tmp_path / f"{base}.tar.gz").unlink()
    assert [fault for fault in check_dist.faults(tmp_path, files, sku.__version__) if "holds none" in fault]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("models/smollm2/model.safetensors", "must not be shared"),
        ("shared/harmful.csv", "must not be shared"),
        ("tests/answers.jsonl", "must not be shared"),
        ("runs/one/bad/note.txt", "is not tracked by git"),
    ],
)
def test_an_archive_with_something_more_is_refused(check_dist: ModuleType, extra: str, words: str) -> None:
    files = package_files()
    assert any(words in fault for fault in check_dist.faults_of_sdist({*files, extra}, files))
    assert list(check_dist.faults_of_wheel({*wheel_of(files), extra}, files, sku.__version__))


@pytest.mark.parametrize("lost", ["py.typed", "recipes/embedded.yaml", "_version.py", "report/templates/page.js"])
def test_an_archive_with_something_less_is_refused(check_dist: ModuleType, lost: str) -> None:
    files = package_files()
    assert f"src/sku/{lost}" in files
    assert list(check_dist.faults_of_wheel(wheel_of(files - {f"src/sku/{lost}"}), files, sku.__version__))
    assert list(check_dist.faults_of_sdist(files - {f"src/sku/{lost}"}, files))


def test_the_checkout_itself_would_pass(check_dist: ModuleType) -> None:
    """What git tracks holds no weights or tables but the invented world's."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: git says what is tracked")
    try:
        known = check_dist.tracked()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git can't be asked here")
    assert "src/sku/py.typed" in known
    assert list(check_dist.shared_content(known)) == []
