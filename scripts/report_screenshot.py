"""The picture of a report for the docs: its first screen, as a reader sees it on a light page.

    python scripts/report_screenshot.py runs/embedded-1/report.html docs/report.png

Needs a Chromium (the environment variable SKU_CHROMIUM names another than the system's) and the extra ``dev``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1200, 1060
"""Pixels: the headline with its tiles, and the first pictures."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """Path of a browser, or None."""
    return os.environ.get("SKU_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def shoot(report: Path, picture: Path, *, width: int, height: int, theme: str) -> None:
    """Opens a report and writes what the first screen shows.

    Args:
        report: HTML file of ``sku report``.
        picture: PNG to write; what is there is replaced.
        width: Of the window, pixels; 390 for a phone.
        height: Of the window, pixels.
        theme: ``light`` or ``dark``.
    """
    browser_path = chromium()
    if browser_path is None:
        sys.exit("error: no Chromium on this machine; install one, or set SKU_CHROMIUM to its path")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if theme == "dark" else "light"
        )
        page.goto(report.resolve().as_uri())
        page.screenshot(path=picture)
        browser.close()


def main() -> None:
    """Reads the arguments and takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    if not given.report.is_file():
        sys.exit(f"error: {given.report} is no file; write it with sku report")
    shoot(given.report, given.picture, width=given.width, height=given.height, theme=given.theme)


if __name__ == "__main__":
    main()
