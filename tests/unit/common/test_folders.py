"""Folders of images: links, loops, other formats, hidden files, unreadable folders, odd names."""

import os
from pathlib import Path

import pytest

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.images.folders import look_through, stem_of, subfolders
from fedsgcg.common.images.formats import FOREIGN, conversion_advice, foreign_suffix
from fedsgcg.common.images.read import read_volume
from fedsgcg.common.names import alike, printable


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return paths


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_links_are_followed_and_a_folder_that_leads_back_is_entered_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    touch(data / "a.nii.gz", other / "P1/b.nii", other / "c.png")
    (data / "P1").symlink_to(other / "P1")
    (data / "one.png").symlink_to(other / "c.png")
    (other / "P1" / "up").symlink_to(data)
    (data / "self").symlink_to(data)
    found = look_through(data)
    assert names(found.images, data) == ["P1/b.nii", "a.nii.gz", "one.png"]
    assert names(found.loops, data) == ["P1/up", "self"]
    assert [folder.name for folder in subfolders(data)] == ["P1", "self"]


def test_every_kind_of_file_has_its_place(tmp_path):
    touch(
        *(
            tmp_path / name
            for name in (
                *("a.nii.gz", "b.MHA", "c.mgz", "d.svs", "._a.nii.gz", "note.txt"),
                *("__MACOSX/a.png", "e.hdr", "e.img", "f.IMG", "g.mhd", "g.raw"),
            )
        )
    )
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "1.2.840.113").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_bytes(b"text")
    found = look_through(tmp_path)
    assert names(found.images, tmp_path) == ["a.nii.gz", "b.MHA", "e.hdr", "f.IMG", "g.mhd"]
    assert names(found.foreign, tmp_path) == ["c.mgz", "d.svs"]
    assert {folder: names(files, tmp_path) for folder, files in found.series.items()} == {
        tmp_path: ["1.2.840.113", "IM0001"]
    }
    assert names(found.ghosts, tmp_path) == ["._a.nii.gz"]
    assert len(found.conversions()) == 2


@pytest.mark.parametrize("suffix", sorted(FOREIGN))
def test_a_file_of_another_format_is_refused_with_the_tool_that_converts_it(suffix):
    path = Path("scan" + suffix)
    with pytest.raises(FedsgcgError) as caught:
        read_volume(path)
    assert caught.value.problems[0].action == FOREIGN[suffix] == conversion_advice(path)
    assert foreign_suffix(path) == suffix


def test_other_formats_name_their_tools():
    assert "mri_convert" in conversion_advice(Path("x.mgz"))
    assert "SimpleITK" in conversion_advice(Path("x.vtk"))
    assert "NIfTI" in conversion_advice(Path("x.txt"))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a_image.nii.gz", "a"),
        ("a.png", "a"),
        ("_image.nii.gz", "_image"),
        (".nii.gz", ".nii.gz"),
        ("image.nii", "image"),
        ("a_image_image.nii", "a_image"),
    ],
)
def test_the_name_of_an_image_is_never_empty(name, stem):
    assert stem_of(Path("folder") / name) == stem


def test_names_that_are_no_utf8_can_be_shown_and_written():
    name = os.fsdecode(b"M\xfcller_\xe2\x82\xac.nii")
    assert printable(name) == "M%FCller_€.nii"
    problem = Problem("DAT-103", found=name, where=f"/data/{name}")
    assert str(problem).encode("utf-8").decode() == str(problem)


def test_names_that_look_the_same_are_found():
    composed, split = "Z\u00fcrich", "Zu\u0308rich"
    assert alike(["A", "a", composed, split, "B", "AB", "ZURICH"]) == [
        ("A", "a"),
        (split, composed),
    ]


@pytest.mark.parametrize(
    ("number", "start"),
    [
        (36, "Shorten the name"),
        (28, "Free space"),
        (122, "Free space"),
        (13, "Get write permission"),
        (5, "Choose another"),
    ],
)
def test_each_refusal_of_the_disk_has_its_own_advice(number, start):
    advice = disk_advice(OSError(number, "x"), "choose another DIR.")
    assert advice.startswith(start)
