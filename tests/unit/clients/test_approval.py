"""Which code may run at a hospital."""

import io
import zipfile
from pathlib import Path

import pytest

from fedsgcg.clients.guard.approval import (
    MOST_REFUSED,
    Bundle,
    approve,
    bundle_of_folder,
    difference,
    is_approved,
    keep,
    last_approved,
    read_bundle,
    read_unpacked,
    refused_bundles,
    remove_old_refused,
    require_approved,
    unpack,
)
from fedsgcg.common.errors import FedsgcgError
from tests.conftest import REPOSITORY

PROJECT = """
[project]
name = "x"
version = "1"
[tool.flwr.app.components]
clientapp = "fedsgcg.clients.app:app"
"""


def fab(files: dict[str, str | bytes], project: str = PROJECT) -> bytes:
    """A bundle as Flower makes it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in {"pyproject.toml": project, ".info/CONTENT": "x", **files}.items():
            archive.writestr(name, text)
    return content.getvalue()


def test_a_bundle_is_its_code_not_its_words():
    first = read_bundle(fab({"clients/app.py": "a", "README.md": "one"}))
    assert first.code == {"clients/app.py": b"a"}
    assert read_bundle(fab({"clients/app.py": "a", "README.md": "two"})).digest == first.digest
    assert read_bundle(fab({"clients/app.py": "b"})).digest != first.digest
    assert read_bundle(fab({"clients/app.py": "a", "clients/more.py": ""})).digest != first.digest
    assert read_bundle(fab({"clients/app.py": "a", "numpy.py": ""})).digest != first.digest
    other = PROJECT.replace("fedsgcg.clients.app:app", "clients.other:app")
    assert read_bundle(fab({"clients/app.py": "a"}, other)).digest != first.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip",
        fab({"../outside.py": "x"}),
        fab({"/etc/x.py": "x"}),
        fab({"a\\b.py": "x"}),
        fab({"big.py": b"\0" * (51 * 2**20)}),
        fab({"clients/__pycache__/app.cpython-311.pyc": b"x"}),
        fab({"clients/__pycache__/app.py": b"x"}),
        fab({"clients/app.pyc": b"x"}),
        fab({"clients/app.so": b"x"}),
        fab({"evil.pth": b"import x"}),
        fab({"clients/app.py": "x"}, PROJECT.replace("app:app", "app:app\\u0022")),
        fab({}, "not toml ["),
        fab({}, "[tool]\n"),
    ],
)
def test_what_is_no_bundle_is_refused(content):
    with pytest.raises(FedsgcgError, match="POL-705"):
        read_bundle(content)


def test_only_approved_code_passes(tmp_path):
    path, one, two = tmp_path / "home/approved.json", Bundle({"a.py": b"1"}), Bundle({"a.py": b"2"})
    with pytest.raises(FedsgcgError, match="POL-705"):
        require_approved(one, path)
    approve(one, path, "anna")
    require_approved(one, path)
    assert not is_approved(two, path)
    assert not is_approved(Bundle(one.code, "clients.other:app"), path)
    assert path.stat().st_mode & 0o077 == 0
    approve(two, path, "anna")
    require_approved(one, path)
    require_approved(two, path)


def test_a_damaged_approvals_file_approves_nothing(tmp_path):
    path = tmp_path / "approved.json"
    approve(Bundle({"a.py": b"1"}), path, "anna")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(FedsgcgError, match="repair or remove"):
        require_approved(Bundle({"a.py": b"1"}), path)


def test_the_difference_names_files_and_lines(tmp_path):
    path = tmp_path / "approved.json"
    approve(Bundle({"a.py": b"one\ntwo\n", "gone.py": b"x\n", "same.py": b"s"}), path, "anna")
    changes = dict(
        difference(
            last_approved(path),
            Bundle({"a.py": b"one\nthree\n", "new.py": b"n\n", "same.py": b"s"}),
        )
    )
    assert [line.split() for line in changes] == [
        ["changed", "a.py", "(+1", "-1", "lines)"],
        ["removed", "gone.py", "(+0", "-1", "lines)"],
        ["new", "new.py", "(+1", "-0", "lines)"],
    ]
    assert "-two\n+three\n" in next(iter(changes.values()))


def test_unpacked_code_that_was_changed_on_disk_is_written_again(tmp_path):
    bundle = Bundle({"clients/app.py": b"one", "clients/__init__.py": b""}, "clients.other:app")
    place = unpack(bundle, tmp_path)
    assert read_unpacked(place) == bundle.code
    assert place.name == bundle.digest
    (place / "clients/app.py").write_bytes(b"changed")
    (place / "clients/extra.py").write_bytes(b"")
    assert read_unpacked(unpack(bundle, tmp_path)) == bundle.code


@pytest.mark.attack("planted-bytecode")
def test_bytecode_planted_in_unpacked_code_is_removed(tmp_path):
    """Attack: a `.pyc` in `__pycache__` of the unpacked bundle, which the hash does not cover."""
    bundle = Bundle({"clients/app.py": b"one"})
    place = unpack(bundle, tmp_path)
    (place / "clients/__pycache__").mkdir()
    (place / "clients/__pycache__/app.cpython-311.pyc").write_bytes(b"evil")
    assert read_unpacked(unpack(bundle, tmp_path)) == {"clients/app.py": b"one"}


def test_a_kept_bundle_that_was_exchanged_is_not_taken_for_the_refused_one(tmp_path):
    path = tmp_path / "approved.json"
    one, two = Bundle({"a.py": b"1"}), Bundle({"a.py": b"2"})
    approve(one, path, "anna")
    keep(one, path).write_bytes(keep(two, path).read_bytes())
    with pytest.raises(FedsgcgError, match="POL-705"):
        last_approved(path)


def test_refused_bundles_do_not_pile_up(tmp_path):
    path = tmp_path / "approved.json"
    approve(Bundle({"a.py": b"good"}), path, "anna")
    for number in range(MOST_REFUSED + 3):
        keep(Bundle({"a.py": str(number).encode()}), path)
    remove_old_refused(path)
    assert len(refused_bundles(path)) == MOST_REFUSED
    assert last_approved(path) == Bundle({"a.py": b"good"})


def test_the_installed_code_is_what_flower_bundles(tmp_path: Path):
    """`approve --installed` must approve the bundle that `flwr run` sends from the same tree."""
    from flwr.cli.build import build_fab_from_disk

    sent = read_bundle(build_fab_from_disk(REPOSITORY))
    here = bundle_of_folder(REPOSITORY)
    assert sorted(sent.code) == sorted(here.code)
    assert sent.digest == here.digest


def packed(name: str, text: bytes, method: int) -> bytes:
    """A bundle with one file packed by another method."""
    content = io.BytesIO(fab({"clients/app.py": "a"}))
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(name, text, compress_type=method)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (packed("clients/b.py", b"0" * 10**6, zipfile.ZIP_BZIP2), "compression method"),
        (packed("clients/b.py", b"0" * 10**6, zipfile.ZIP_LZMA), "compression method"),
        (packed("clients/" + "n" * 300 + ".py", b"", zipfile.ZIP_STORED), "a name of 303 bytes"),
        (packed("clients/" + "é" * 150 + ".py", b"", zipfile.ZIP_STORED), "a name of 303 bytes"),
        (packed("d/" * 600 + "b.py", b"", zipfile.ZIP_STORED), "a name of"),
        (fab({f"clients/{k}.py": "" for k in range(6000)}), "more than 5000 files"),
        (packed("clients/b.py", b"0" * 10**6, zipfile.ZIP_DEFLATED)[:-900], "POL-705"),
        (fab({}, "x = " + "[" * 10**5), "POL-705"),
    ],
)
@pytest.mark.attack("huge-bundle")
def test_row_10_a_bundle_that_cannot_be_unpacked_within_limits_is_refused(content, found):
    """Row 10: bombs, names that no file system takes, damaged and deeply nested bundles."""
    with pytest.raises(FedsgcgError, match=found) as caught:
        read_bundle(content)
    assert caught.value.code == "POL-705"
