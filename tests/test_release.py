"""What a release promises: one version, tested Pythons, extras that hold what is imported, and clean archives."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sku
from sku.config import ModelConfig
from sku.errors import ModelError
from sku.model_files import locate_model
from sku.models import check_four_bit

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(sku.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
METADATA: dict[str, Any] = PROJECT["project"]
DISTRIBUTIONS = {
    "sklearn": "scikit-learn", "yaml": "pyyaml", "ruamel": "ruamel.yaml", "PIL": "matplotlib", "markupsafe": "jinja2",
    "click": "typer",
}  # fmt: skip
"""Import -> the dependency or extra that brings it, where they are named differently."""
WITHOUT_EXTRA = {"torchao"}
"""Only for two of transformers' optimizers."""


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


def test_version_pythons_and_pins_stand_in_one_place() -> None:
    literal = f'"{sku.__version__}"'
    assert [path for path in SOURCE.rglob("*.py") if literal in path.read_text(encoding="utf-8")] == [
        SOURCE / "_version.py"
    ]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", sku.__version__]

    named = [entry.rpartition(" :: ")[2] for entry in METADATA["classifiers"] if ":: Python :: 3." in entry]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r'^tested="([\d. ]+)"', script, flags=re.MULTILINE) == [" ".join(named)]
    assert METADATA["requires-python"] == f">={named[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == named[0]

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in lines if "==" in line}
    assert DEPENDENCIES.union(*EXTRAS.values()) - pinned == set()


def test_every_extra_holds_what_is_imported_and_files_that_miss_a_package_name_its_extra() -> None:
    """An extra for a package that nothing uses would be a promise without content."""
    optional: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in set(imported(ast.parse(text))) - {"sku", *sys.stdlib_module_names}:
            package = DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
            if package not in DEPENDENCIES | WITHOUT_EXTRA:
                optional.setdefault(package, set()).update(re.findall(r"sku-unlearning\[([a-z-]+)\]", text))
    for package, advised in optional.items():
        assert any(package in EXTRAS[extra] for extra in advised), package
    for extra in set(EXTRAS) - {"dev", "docs"}:
        assert EXTRAS[extra] <= set(optional), extra
    assert EXTRAS["dev"] >= set().union(*EXTRAS.values())
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|(.*)$", page, flags=re.MULTILINE))
    assert rows.keys() == EXTRAS.keys()
    for extra in set(EXTRAS) - {"dev"}:
        assert all(package in rows[extra].lower().replace("_", "-") for package in EXTRAS[extra]), extra


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr("sku.model_files.find_spec", lambda name: None)
    monkeypatch.setattr("sku.models.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"sku-unlearning\[gguf\]"):
        locate_model(ModelConfig(path=str(tmp_path), gguf_file="a.gguf"))
    with pytest.raises(ModelError, match=r"sku-unlearning\[gpu\]"):
        check_four_bit()


@pytest.fixture(scope="module")
def check_dist() -> SimpleNamespace:
    """The script behind ``make dist``."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "check_dist.py"), run_name="check_dist"))


@pytest.fixture(scope="module")
def files() -> set[str]:
    """Of the package, as git would list them."""
    found = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"src/sku/{path.relative_to(SOURCE)}" for path in found}


def wheel_of(files: set[str]) -> set[str]:
    info = f"sku_unlearning-{sku.__version__}.dist-info/"
    about = {f"{info}{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    return {name.removeprefix("src/") for name in files} | about


def test_good_archives_pass(check_dist: SimpleNamespace, files: set[str], tmp_path: Path) -> None:
    known = {*files, "README.md"}
    base = f"sku_unlearning-{sku.__version__}"
    with zipfile.ZipFile(tmp_path / f"{base}-py3-none-any.whl", "w") as wheel:
        for name in wheel_of(files):
            wheel.writestr(name, "")
    with tarfile.open(tmp_path / f"{base}.tar.gz", "w:gz") as archive:
        for name in known:
            archive.addfile(tarfile.TarInfo(f"{base}/{name}"))
    assert list(check_dist.faults(tmp_path, known, sku.__version__)) == []
    assert len(list(check_dist.faults(tmp_path, known, "9.9.9"))) == 2
    (tmp_path / f"{base}.tar.gz").unlink()
    assert len(list(check_dist.faults(tmp_path, known, sku.__version__))) == 1


def test_archives_with_something_more_or_less_are_refused(check_dist: SimpleNamespace, files: set[str]) -> None:
    def refused(files_there: set[str]) -> bool:
        wheel = list(check_dist.faults_of_wheel(wheel_of(files_there), files, sku.__version__))
        return bool(wheel and list(check_dist.faults_of_sdist(files_there, files)))

    for extra in ("models/m/model.safetensors", "shared/harmful.csv", "tests/answers.jsonl", "runs/one/bad/note.txt"):
        assert refused({*files, extra}), extra
        assert extra.endswith("note.txt") or list(check_dist.shared_content({extra})), "whether tracked or not"
    for lost in ("py.typed", "recipes/embedded.yaml", "_version.py", "report/templates/page.js"):
        assert f"src/sku/{lost}" in files
        assert refused(files - {f"src/sku/{lost}"}), lost


def test_the_checkout_itself_would_pass(check_dist: SimpleNamespace) -> None:
    """What git tracks holds no weights or tables but the invented world's."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: git says what is tracked")
    try:
        known = check_dist.tracked()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git can't be asked here")
    assert "src/sku/py.typed" in known
    assert list(check_dist.shared_content(known)) == []
