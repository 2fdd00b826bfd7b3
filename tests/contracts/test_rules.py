"""Rules of the code base: allowed imports, and what product code must not contain."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = [
    path
    for room in ("server", "clients", "common", "deploy")
    for path in sorted((ROOT / room).rglob("*.py"))
]


def test_rooms_import_each_other_only_as_the_architecture_allows() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bimport pickle\b",
        r"torch\.load\(",
        r"yaml\.load\(",
        r"(?<![\w.])eval\(",
        r"allow_pickle=True",
    ],
)
@pytest.mark.row(11, 60)
def test_nothing_that_came_over_the_wire_or_from_disk_is_executed(pattern: str) -> None:
    hits = [str(path.relative_to(ROOT)) for path in PRODUCT if re.search(pattern, path.read_text())]
    assert hits == []


def test_one_file_is_not_called_one_files() -> None:
    """A number that may be 1 goes through `number_of` or `counted_names`."""
    nouns = "case|image|mask|file|label|folder|patient|line|hospital|picture|subject|segment"
    pattern = re.compile(rf"(?<!of )\{{len\([^{{}}]*\)\}} (more |further )?({nouns})s\b")
    rooms = ("deploy/prepare", "deploy/cli", "clients/data", "clients/predict")
    hits = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in PRODUCT
        if str(path.relative_to(ROOT)).startswith(rooms)
        for match in pattern.finditer(path.read_text())
    ]
    assert hits == []


def test_the_packages_that_run_are_the_ones_of_this_checkout() -> None:
    import fedsgcg.clients
    import fedsgcg.common
    import fedsgcg.server

    for package in (fedsgcg.clients, fedsgcg.common, fedsgcg.server):
        assert Path(package.__file__).resolve().is_relative_to(ROOT), package.__file__


def test_every_module_has_one_name() -> None:
    """The packages are at the repository's top level, but are imported below `fedsgcg` alone."""
    pattern = re.compile(
        r"^\s*(from|import) (server|clients|common|configs|deploy)\b", re.MULTILINE
    )
    files = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py"))]
    assert [str(path) for path in files if pattern.search(path.read_text())] == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bConsole\(",
        r"rich\.markup|from_markup",
        r"markup=True|emoji=True|highlight=True",
        r"import .*\bConsole\b|from rich\.progress import|from rich import print",
        r"console\.(print|status)\([^)]*\[/",
    ],
)
def test_data_is_printed_by_the_one_console_that_changes_nothing_of_it(pattern: str) -> None:
    """`:AB:` in a fingerprint is an emoji to another console, `[final]` in a path its markup."""
    others = [path for path in PRODUCT if path != ROOT / "common/console.py"]
    assert [
        str(path.relative_to(ROOT)) for path in others if re.search(pattern, path.read_text())
    ] == []


def test_no_comment_refers_to_a_page_that_does_not_exist() -> None:
    """A reader can follow every reference: to a page of the documentation, from its folder."""
    pattern = re.compile(r"(?<![\w{}$*])[\w./-]*[\w-]\.md\b")
    homes = (ROOT, ROOT / "docs", *(path for path in (ROOT / "docs").iterdir() if path.is_dir()))
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*PRODUCT, ROOT / "pyproject.toml", *sorted((ROOT / "configs").rglob("*.yaml"))]
        for name in pattern.findall(path.read_text())
        if not any((home / name).is_file() for home in homes)
    ]
    assert missing == []
