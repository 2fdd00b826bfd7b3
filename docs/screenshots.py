"""Take the documentation's pictures from a demonstration run: `python docs/screenshots.py RUN`.

Needs Chromium on the path, or its name in CHROMIUM. Writes `report.jpg`, the top of the report, and
`overlays.jpg`, the cases of the hardest hospital. Look at both before you commit them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from PIL import Image

DOCS: Final = Path(__file__).resolve().parent
SIZE: Final = (880, 1600)
"""Width and height of the report's picture in pixels."""

OVERLAYS: Final = "figures/overlays-west.png"
QUALITY: Final = 88


def main(run: Path) -> None:
    """Write both pictures of a run folder."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "report.png"
        subprocess.run(  # noqa: S603
            [
                os.environ.get("CHROMIUM", "chromium"),
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                f"--window-size={SIZE[0]},{SIZE[1]}",
                f"--screenshot={shot}",
                (run / "report.html").resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        _save(shot, DOCS / "report.jpg")
    _save(run / OVERLAYS, DOCS / "overlays.jpg")


def _save(source: Path, target: Path) -> None:
    """Write a picture as JPEG, at most as wide as the report's."""
    with Image.open(source) as picture:
        picture.thumbnail((SIZE[0], 10 * SIZE[1]))
        picture.convert("RGB").save(target, quality=QUALITY)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/screenshots.py RUN")
    main(Path(sys.argv[1]))
