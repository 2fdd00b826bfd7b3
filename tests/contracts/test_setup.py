"""`make setup` refuses a Python that fedsgcg does not support, before it downloads anything."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("version", ["3, 10, 14", "3, 14, 0"])
def test_another_python_is_refused_with_the_call_that_works(version: str, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14", "the Makefile checks the same versions"
    python = tmp_path / "python"
    start = f"import sys; sys.version_info = ({version}); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{start}" "$2"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "fedsgcg needs 3.11, 3.12 or 3.13: make PYTHON=python3.11 setup" in done.stderr
    assert not (tmp_path / "venv").exists()
