"""An install adds one name, `fedsgcg`: own modules of a notebook do not clash with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedsgcg.deploy.coordinator.bundle import build_bundle

ROOT = Path(__file__).resolve().parents[2]
USE = """
common = __import__("common")  # a module of the notebook
import fedsgcg
from fedsgcg.common.settings.compose import compose
from fedsgcg.deploy.coordinator.bundle import build_bundle

assert common.MINE
assert fedsgcg.sgcg_loss.__module__ == "fedsgcg.common.sgcg.loss"
assert compose(["experiment=demo"])["method"]["name"]
print(fedsgcg.__file__)
print(build_bundle().digest)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    pytest.importorskip("hatchling", reason="hatchling is part of the extra dev")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*build, "-w", folder, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_installs_one_name(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"fedsgcg"}


def test_own_modules_of_a_notebook_are_not_in_the_way(installed: Path, tmp_path: Path) -> None:
    for name in ("common", "server", "clients", "configs", "deploy"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, digest = done.stdout.split()
    assert Path(where).is_relative_to(installed)
    assert digest == build_bundle().digest, (
        "hospitals approve the same code, however it is installed"
    )
