"""Prints the page as PDF with a browser of this machine, so that the PDF is the page."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import fail

BROWSERS: Final = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    *("microsoft-edge", "msedge", "brave-browser"),
)
"""Browsers that print without a window; all are built on Chromium."""

WAIT_S: Final = 120.0


def print_pdf(page: Path, target: Path) -> Path:
    """Print a page as PDF, on A4.

    The browser of the environment variable `BROWSER_PATH`, else the first installed one of
    `BROWSERS`, runs with an own profile and without a network.

    Returns:
        The PDF.

    Raises:
        FedsgcgError: MON-911 without such a browser, or if it does not print.
    """
    browser = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), "")
    if not browser:
        raise _refused("no Chromium, Chrome or Edge")
    options = ["--headless", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer"]
    # No address is reachable through this proxy; the page needs none.
    options.append("--proxy-server=127.0.0.1:9")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses to start as root with its sandbox
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "report.pdf"
        options += [f"--user-data-dir={folder}/profile", f"--print-to-pdf={printed}"]
        try:
            done = subprocess.run(  # noqa: S603 - the user's own browser
                [browser, *options, page.resolve().as_uri()],
                capture_output=True,
                check=False,
                timeout=WAIT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _refused(f"{browser}: {error}") from error
        if not printed.is_file():
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise _refused(f"{browser} ended with {done.returncode} {''.join(last)}".strip())
        try:
            shutil.copyfile(printed, target)
        except OSError as error:
            raise _refused(f"{target}: {error.strerror or error}") from error
    return target


def _refused(found: str) -> Exception:
    return fail(
        "MON-911",
        found=found,
        expected="a browser built on Chromium, and a folder that can be written",
        action="Install Chromium, or set BROWSER_PATH to the browser; or print the page from any "
        "browser, its print style is the same.",
    )
