"""Writes the lists of files with hashes for `pip install --require-hashes`: `python .ci/hashes.py`.

`constraints-hashes.txt` is an installation from pypi.org, whose torch brings CUDA;
`constraints-hashes-cpu.txt` has the build of torch for CPUs. pip resolves both under
`constraints.txt`, without installing anything, and reports the files that it would take: those for
this platform and Python (Linux on x86-64, 3.11). The machine's own settings of pip must lead to the
CPU build, for example PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Files of an installation on Linux (x86-64) with Python 3.11{build}: pip install --require-hashes
# (docs/how-to/install-a-site.md). Written by .ci/hashes.py from constraints.txt.
"""
PLAIN = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
"""Variables that keep the machine's own settings of pip out."""


def files(*arguments: str, **environment: str) -> dict[str, tuple[str, str]]:
    """Return name -> (version, SHA-256) of what `pip install` would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        subprocess.run(  # noqa: S603 - pip with fixed arguments
            [*command, "--quiet", "--report", str(report), "-c", "constraints.txt", *arguments],
            check=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        entries: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    found = {}
    for entry in entries:
        archive = entry["download_info"].get("archive_info")
        if archive:  # the project itself is a folder
            name = entry["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
            found[name] = (entry["metadata"]["version"], archive["hashes"]["sha256"])
    return found


def write(name: str, build: str, *arguments: str, **environment: str) -> None:
    """Write one list; `hatchling` builds the project itself."""
    found = files(".[formats]", "hatchling", *arguments, **environment)
    lines = [
        f"{package}=={version} \\\n    --hash=sha256:{sha256}"
        for package, (version, sha256) in sorted(found.items())
    ]
    (ROOT / name).write_text(HEAD.format(build=build) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    write("constraints-hashes.txt", " and CUDA", **PLAIN)
    write("constraints-hashes-cpu.txt", ", without CUDA", "torch==2.13.0+cpu")
