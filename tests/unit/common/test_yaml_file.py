"""YAML files that people write: names stay as they are written, nothing wins silently."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.yaml_file import build_from, explained, read_tree
from fedsgcg.deploy.coordinator.project import read_project


@dataclass(frozen=True)
class Example:
    """An example.

    Attributes:
        names: Names.
        name: A name.
        count: A number.
        share: A number.
        on: A switch.
        version: A version.
    """

    names: tuple[str, ...] = ()
    name: str = ""
    count: int = 0
    share: float = 0.0
    on: bool = False
    version: Literal[1] = 1


def read(folder: Path, text: str) -> Example:
    path = folder / "x.yaml"
    path.write_text(text)
    return build_from(Example, read_tree(path, "DEP-602"), path, "DEP-602")


NAMES = (
    "010",
    "NO",
    "off",
    "y",
    "12:30",
    "1_000",
    "1e3",
    "1.10",
    "2021-01-01",
    "0x10",
    "+5",
    "1.",
    ".5",
    "-0",
    "12",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_as_it_is_written(name: str, tmp_path: Path) -> None:
    found = read(tmp_path, f"name: {name}\nnames: [{name}, A]\n")
    assert (found.name, found.names) == (name, (name, "A"))
    assert type(found.name) is str
    assert read(tmp_path, explained(found, ("head",))) == found


@pytest.mark.parametrize("name", ["true", "False", "null", "~", ""])
def test_a_name_that_yaml_has_another_meaning_for_is_refused_with_the_way_out(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(FedsgcgError) as caught:
        read(tmp_path, f"name: {name}\n")
    assert caught.value.problems[0].action == "write it in quotes"
    assert read(tmp_path, f'name: "{name}"\n').name == name


def test_numbers_and_switches_are_still_what_they_were(tmp_path: Path) -> None:
    found = read(tmp_path, "count: 12\nshare: 1e-4\non: true\nversion: 1\n")
    assert found == Example(count=12, share=1e-4, on=True)
    assert [type(value) for value in (found.count, found.share, found.version)] == [int, float, int]
    assert read(tmp_path, "share: 3\n").share == 3.0
    assert read(tmp_path, "share: -.5\n").share == -0.5


@pytest.mark.parametrize(
    "line", ["count: 010", "count: 1_000", "on: yes", "count: 1.0", "version: 2", "share: 1:30"]
)
def test_what_is_no_number_or_switch_is_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError, match="DEP-602"):
        read(tmp_path, line + "\n")


@pytest.mark.parametrize(
    "text", ["name: a\ncount: 1\nname: b\n", 'name: a\n"name": b\n', "names: [{a: 1, a: 2}]\n"]
)
def test_a_name_given_twice_is_refused_with_its_lines(text: str, tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError, match="occurs twice, first in line 1"):
        read(tmp_path, text)


def test_hospitals_of_a_project_keep_their_names(tmp_path: Path) -> None:
    head = "name: P\nserver: example.org:8443\n"
    path = tmp_path / "project.yaml"
    path.write_text(head + "sites:\n  010: {}\n  NO:\n  1.10: first\n")
    assert read_project(path).sites == ("010", "NO", "1.10")
    path.write_text(head + "sites: [010, NO, 1.10]\n")
    project = read_project(path)
    assert project.settings()["data"]["sites"] == ["010", "1.10", "NO"]
    path.write_text(head + "sites:\n  A: {}\n  A: {}\n")
    with pytest.raises(FedsgcgError, match="occurs twice"):
        read_project(path)


def test_row_10_repeated_parts_that_stand_for_billions_are_refused(tmp_path: Path) -> None:
    """Row 10: nine lines of ten references each are 10^9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for name, last in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join(['*' + last] * 10)}]")
    with pytest.raises(FedsgcgError, match="more than 100000 values"):
        read(tmp_path, "\n".join(lines))
    with pytest.raises(FedsgcgError, match="more than 100000 values"):
        read(tmp_path, "names: &n [*n]\n")
    assert read(tmp_path, "name: &n A\nnames: [*n, *n]\n").names == ("A", "A")


@pytest.mark.parametrize("text", ["names: " + "[" * 10**5, "name: " + "x" * 2**20])
def test_row_10_deep_nesting_and_large_files_are_refused(text: str, tmp_path: Path) -> None:
    """Row 10: one clear error instead of a full stack or memory."""
    with pytest.raises(FedsgcgError, match="DEP-602"):
        read(tmp_path, text)
