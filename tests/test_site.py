"""The hooks of the documentation site: links out of ``docs/``, and nothing from another server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

HOOKS = Path(__file__).resolve().parent.parent / "scripts" / "site_hooks.py"


def build(folder: Path, text: str, *settings: str) -> tuple[str, str]:
    """The page that a site of one page has, and what the build said; the page is empty where the build failed."""
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "index.md").write_text(text, encoding="utf-8")
    (folder / "SECURITY.md").touch()
    (folder / "results").mkdir(exist_ok=True)
    theme = "theme: {name: material, font: false}"
    lines = ["site_name: site", theme, f"hooks: ['{HOOKS}']", "validation: {links: {not_found: warn}}", *settings]
    (folder / "mkdocs.yml").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False
    )
    page = folder / "site" / "index.html"
    return (page.read_text(encoding="utf-8") if done.returncode == 0 else "", done.stderr)


def test_a_link_out_of_the_docs_becomes_text_or_goes_to_the_repository(tmp_path: Path) -> None:
    text = "See [what is safe](../SECURITY.md), [records](../results), and `[code](../stays.md)`."
    page, said = build(tmp_path, text)
    assert '<span title="SECURITY.md in the repository">what is safe</span>' in page, said
    assert "../SECURITY.md" not in page
    assert "[code](../stays.md)" in page
    page, said = build(tmp_path, text, "repo_url: https://example.org/sku")
    assert 'href="https://example.org/sku/blob/HEAD/SECURITY.md"' in page, said
    assert 'href="https://example.org/sku/tree/HEAD/results"' in page


def test_a_dead_link_and_what_another_server_has_to_give_fail_the_build(tmp_path: Path) -> None:
    targets = ("../nothing.md", "../../outside.md", "missing.md")
    page, said = build(tmp_path, "\n".join(f"[dead]({target})" for target in targets))
    assert not page
    assert all(target in said for target in targets)
    for text in ("![a](https://example.org/a.png)", '<script src="//example.org/a.js"></script>'):
        page, said = build(tmp_path, text)
        assert not page
        assert "another server" in said
