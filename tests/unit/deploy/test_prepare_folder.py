"""The prepared folder: repeated, interrupted and refused calls leave it whole."""

import json
import os

import nibabel as nib
import numpy as np

from tests.support import downloads
from tests.support.prepared import prepare, saml


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_second_call_converts_only_what_changed_and_forgets_what_went(tmp_path, capsys):
    down, out = tmp_path / "down", tmp_path / "out"
    saml(down, {"HK": [38, 39, 40]})
    assert prepare("prostate", down, "-o", out) == 3
    before = content(out)
    assert prepare("prostate", down, "-o", out) == 3
    assert "0 converted, 3 unchanged" in capsys.readouterr().out
    assert content(out) == before
    image, labels = downloads.scan(99)
    downloads.volume(down / "HK/Case39.nii.gz", image)
    os.utime(down / "HK/Case39.nii.gz", (1, 1))
    for path in (down / "HK").glob("Case40*"):
        path.unlink()
    assert prepare("prostate", down, "-o", out) == 3
    assert "1 converted, 1 unchanged" in capsys.readouterr().out
    assert {path.name for path in (out / "HK").iterdir()} == {
        f"Case{number}_{kind}.nii.gz" for number in (38, 39) for kind in ("image", "mask")
    }
    np.testing.assert_array_equal(
        np.asarray(nib.load(out / "HK/Case39_image.nii.gz").dataobj), image
    )
    (out / "HK/Case38_mask.nii.gz").unlink()
    assert prepare("prostate", down, "-o", out) == 3
    assert (out / "HK/Case38_mask.nii.gz").is_file(), "what was lost in the folder is made again"


def test_a_folder_with_something_else_is_never_written_to(tmp_path, capsys):
    down = tmp_path / "down"
    saml(down, {"HK": [38]})
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    downloads.released(tmp_path / "eyes", 8, {("Domain1", "train"): ["gdrishtiGS_002"]})
    assert prepare("fundus", tmp_path / "eyes", "-o", tmp_path / "other") == 3
    before = content(tmp_path)
    for folder, words in (
        ("letters", "did not prepare"),
        ("file", "a file"),
        ("other", "data set fundus"),
        ("down", "overlaps"),
        ("down/new", "overlaps"),
        (".", "overlaps"),
    ):
        assert prepare("prostate", down, "-o", tmp_path / folder) == 2
        told = capsys.readouterr().err
        assert "[DAT-121]" in told
        assert words in told
    assert content(tmp_path) == before
    assert prepare("prostate", down) == 2
    assert "-o FOLDER" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path, capsys):
    import fcntl

    saml(tmp_path / "down", {"HK": [38]})
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.prepare.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert prepare("prostate", tmp_path / "down", "-o", tmp_path / "out") == 2
        assert "another call" in capsys.readouterr().err
    assert prepare("prostate", tmp_path / "down", "-o", tmp_path / "out") == 3


def test_an_interrupted_call_is_continued(tmp_path, monkeypatch, capsys):
    from fedsgcg.deploy.prepare import prostate

    down, out = tmp_path / "down", tmp_path / "out"
    saml(down, {"HK": [38, 39, 40]})
    real, calls = prostate.write_native, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(prostate, "write_native", interrupted)
    assert prepare("prostate", down, "-o", out) == 130
    assert not (out / "manifest.csv").exists()
    assert len(json.loads((out / "prepared.json").read_text())["files"]) == 1
    assert {path.name for path in (out / "HK").iterdir()} == {
        "Case38_image.nii.gz",
        "Case38_mask.nii.gz",
    }
    capsys.readouterr()
    assert prepare("prostate", down, "-o", out) == 3
    assert "2 converted, 1 unchanged" in capsys.readouterr().out


def test_a_disk_that_refuses_is_one_clear_error(tmp_path, monkeypatch, capsys):
    from fedsgcg.deploy.prepare import prostate

    saml(tmp_path / "down", {"HK": [38, 39]})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prostate, "write_native", full)
    assert prepare("prostate", tmp_path / "down", "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "[DAT-126]" in told
    assert "No space left" in told


def test_nothing_usable_is_an_error_with_every_reason(tmp_path, capsys):
    saml(tmp_path / "down", {"HK": [38, 39]})
    for path in (tmp_path / "down/HK").glob("Case*[0-9].nii.gz"):
        path.write_bytes(b"")
    assert prepare("prostate", tmp_path / "down", "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.count("[DAT-103]") == 2
    assert "no usable case" in told
