"""The app bundle contains every module and YAML file, nothing else, within Flower's limit."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedsgcg.clients.guard.approval import NOT_BUNDLED

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 10 * 2**20


@pytest.mark.row(54)
def test_bundle_holds_the_code_and_the_settings_and_stays_small(tmp_path: Path) -> None:
    flwr = Path(sys.executable).parent / "flwr"
    done = subprocess.run(
        [flwr, "build", "--app", str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = [*tmp_path.glob("*.fab"), *tmp_path.glob("**/*.fab")][:1]
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
    wanted_by_all = {"fedsgcg/__init__.py", "pyproject.toml", "LICENSE"}
    assert wanted_by_all <= names
    for folder, pattern in (
        ("server", "*.py"),
        ("clients", "*.py"),
        ("common", "*.py"),
        ("configs", "*.yaml"),
    ):
        wanted = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}
        wanted = {name for name in wanted if not name.startswith(NOT_BUNDLED)}
        assert wanted <= names, wanted - names
    assert not {name for name in names if name.startswith(("tests/", "deploy/", "runs/"))}
    assert bundle.stat().st_size < LIMIT
