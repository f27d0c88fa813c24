"""What mkdocs can't do by itself for this site. mkdocs calls these functions (``hooks`` in ``mkdocs.yml``).

- A page may link to a file beside ``docs/``: ``[SECURITY.md](../SECURITY.md)`` works where the repository is read. On
  the site such a file is nowhere. With ``repo_url`` set, the link goes there; without it the text stays and the link
  goes. A file that does not exist is a warning, which ``--strict`` makes an error.
- The page of all commands, and the one of all experiments, are made when the site is built, where ``nav`` has them.
- A page that takes a script, a style or a picture from another server is an error: the site has to work without one.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

COMMANDS = "reference/cli.md"
TRIED = "tried.md"
TRIED_HEAD = """\
# What was tried

One line for each experiment and each screen of `results/experiments.jsonl`, oldest first, failures too. A screen is
a quick look at few prompts that chose settings. None of this is a result: [results](results.md) says what is claimed,
and why the runs of real models were [withdrawn](results.md#real-models). The file also has settings and seeds.

| date | what | what came of it |
|---|---|---|
"""
NO_FIGURE = {
    "date",
    "what",
    "note",
    "command",
    "settings",
    "seed",
    "seconds",
    "threads",
    "held_out",
    "record",
    "outcomes",
}
log = logging.getLogger("mkdocs.hooks.site")
_FROM_ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|@import\s+(?:url\()?["']?(?:https?:)?//[^"'\s)]*"""
)

_current = {"page": ""}
"""Where the page that is being read lies in ``docs/``: mkdocs makes a Markdown reader for each and doesn't tell it."""


class _LinksOut(Treeprocessor):  # type: ignore[misc]
    """Changes links that leave ``docs/``. It works on the parsed page: a link inside code is no link."""

    def __init__(self, md: Markdown, repository: Path, repo_url: str | None) -> None:
        super().__init__(md)
        self.repository = repository
        self.repo_url = repo_url

    def run(self, root: ElementTree.Element) -> None:
        page = _current["page"]
        for element in root.iter("a"):
            link = urlsplit(element.get("href", ""))
            if link.scheme or link.netloc or not link.path:
                continue
            target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link.path))
            if target.split("/")[0] == "docs":
                continue
            if target.startswith("../") or not (self.repository / target).exists():
                log.warning("%s links to %s, which is not in the repository", page, link.path)
            elif self.repo_url:
                kind = "tree" if (self.repository / target).is_dir() else "blob"
                element.set("href", f"{self.repo_url.rstrip('/')}/{kind}/HEAD/{target}")
            else:
                element.tag = "span"
                del element.attrib["href"]
                element.set("title", f"{target} in the repository")


class _LinksOutExtension(Extension):  # type: ignore[misc]
    def __init__(self, repository: Path, repo_url: str | None) -> None:
        super().__init__()
        self.repository = repository
        self.repo_url = repo_url

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name that Markdown calls
        # Above 0, where mkdocs checks relative links, and below 20, where links become elements.
        md.treeprocessors.register(_LinksOut(md, self.repository, self.repo_url), "links_out", 10)


def on_config(config: Any) -> Any:
    """Adds the extension."""
    repository = Path(config.config_file_path).parent
    config.markdown_extensions.append(_LinksOutExtension(repository, config.repo_url))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here."""
    if COMMANDS in str(config.nav):
        sys.path.insert(0, str(Path(__file__).parent))  # mkdocs takes it away after it has read this file.
        from cli_reference import page

        files.append(File.generated(config, COMMANDS, content=page()))
    if TRIED in str(config.nav):
        lines = (Path(config.config_file_path).parent / "results" / "experiments.jsonl").read_text(encoding="utf-8")
        rows = (_row(json.loads(line)) for line in lines.splitlines())
        files.append(File.generated(config, TRIED, content=TRIED_HEAD + "\n".join(rows)))
    return files


def _row(record: dict[str, Any]) -> str:
    """An experiment as a row of a table."""
    what = ". ".join(record[key] for key in ("what", "note") if key in record)
    figures = (f"{key}: {_text(value)}" for key, value in record.items() if key not in NO_FIGURE)
    cells = (record["date"], what, "; ".join(figures))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return " / ".join(map(_text, value)) if isinstance(value, list) else str(value)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Tells the extension which page comes."""
    _current["page"] = page.file.src_uri
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Looks at a page as it is written."""
    return _without_other_servers(output, page.file.src_uri)


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """Looks at what the theme writes besides, such as the page for dead links."""
    return _without_other_servers(output, template_name)


def _without_other_servers(output: str, name: str) -> str:
    found = _FROM_ELSEWHERE.search(output)
    if found:
        raise PluginError(f"{name} needs another server: {found.group(0)}")
    return output
