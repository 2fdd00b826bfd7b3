"""The lists of files with hashes belong to the versions of constraints.txt."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}$", re.MULTILINE)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {plain(package): version for package, version in pairs}


@pytest.mark.parametrize("name", ["constraints-hashes.txt", "constraints-hashes-cpu.txt"])
def test_every_dependency_has_a_hash_at_the_version_that_is_tested(name: str) -> None:
    text = (ROOT / name).read_text()
    listed = {plain(package): version.partition("+")[0] for package, version in LINE.findall(text)}
    assert text.count("==") == len(listed), "a line without a hash"
    tested = versions("constraints.txt")
    differing = {
        package: (version, tested[package])
        for package, version in listed.items()
        if package in tested and tested[package] != version
    }
    assert differing == {}, "run `make hashes`"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {plain(re.split(r"[\[<>=;]", text)[0]) for text in project["dependencies"]}
    assert wanted <= set(listed), "run `make hashes`"
