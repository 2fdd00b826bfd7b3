"""What folders hold besides cases, odd names, and the fingerprint of several sites."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from fedsgcg.clients.data.case_files import (
    data_warnings,
    discover_sites,
    ensure_data,
    open_site,
    splits,
)
from fedsgcg.clients.data.store import data_fingerprint
from fedsgcg.clients.predict.files import jobs_of_images
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.prepare import own
from tests.support.case_lists import problems_of, root_with

# the fingerprint of several sites


def test_the_fingerprint_follows_content_and_manifest_not_place_nor_order(tmp_path, make_data):
    def made(name, split="train"):
        root = root_with(
            tmp_path / name, "site,image,mask,split", f"A,a.png,m.png,{split}", "B,b.png,m.png,"
        )
        for file in ("a.png", "b.png", "m.png"):
            (root / file).write_bytes(file.encode())
        return root

    def taken(root, *names):
        return data_fingerprint(root, names, make_data(), tmp_path / "cache")

    one, other = made("one"), made("other")
    assert taken(one, "A", "B") == taken(other, "B", "A")
    assert taken(one, "A") != taken(one, "A", "B")
    assert not (tmp_path / "cache/slices").exists()
    (other / "b.png").write_bytes(b"new content")
    assert taken(other, "A", "B") != taken(one, "A", "B")
    assert taken(other, "A") == taken(one, "A")
    assert taken(made("third", split="test"), "A", "B") != taken(one, "A", "B")
    (other / "a.png").unlink()
    assert taken(other, "A") != taken(one, "A")


# what folders hold besides cases


def folder_root(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_a_linked_hospital_is_one_for_everybody(tmp_path, make_data):
    root = folder_root(tmp_path / "data", "B/c_image.png", "B/c_mask.png")
    folder_root(tmp_path / "other", "A/c_image.png", "A/c_mask.png", "A/d_image.png")
    (root / "A").symlink_to(tmp_path / "other/A")
    (root / "B" / "back").symlink_to(root)
    assert discover_sites(root) == ("A", "B")
    assert len(open_site(root, "A", make_data()).cases) == 2
    found, _ = own.find("manifest", root, link=False)
    assert sorted({work.site for work in found.work}) == ["A", "B"]
    jobs, _ = jobs_of_images([root])
    assert [job.image.relative_to(root).as_posix() for job in jobs] == [
        "A/c_image.png",
        "A/d_image.png",
        "B/c_image.png",
    ]


def test_files_that_are_no_case_are_counted_and_named_once(tmp_path, make_data):
    root = folder_root(
        tmp_path,
        *(
            f"A/{name}"
            for name in (
                "c_image.png",
                "c_mask.png",
                "d_image.mgz",
                "d_mask.mgz",
                "e.vtk",
                "f_mask.png",
                "g.png",
                "deep/h_image.png",
                "._c_image.png",
                "note.txt",
            )
        ),
        "B/i_image.png",
        "previews/A1.png",
        "loose_image.png",
    )
    site = open_site(root, "A", make_data())
    assert [case.name for case in site.cases] == ["c"]
    assert site.quarantined == ()
    (note,) = site.notes
    assert note.code == "DAT-119"
    assert note.found.split("; ") == [
        "3 files in unsupported formats (.mgz 2, .vtk 1): d_image.mgz, d_mask.mgz, e.vtk",
        "1 mask without an image: f_mask.png",
        "2 images not named <site>/<case>_image: h_image.png, g.png",
        "1 hidden file named like images: ._c_image.png",
    ]
    assert "SimpleITK" in note.action
    assert open_site(root, "B", make_data()).notes == ()
    said = data_warnings(root, ["A", "B"])
    assert [Path(problem.where).name for problem in said] == ["A", "previews", root.name]
    assert [Path(problem.where).name for problem in data_warnings(root, ["B"])] == [
        "previews",
        root.name,
    ]
    folder_root(tmp_path / "only", "A/x.dcm")
    (problem,) = problems_of(discover_sites, tmp_path / "only")
    assert "1 folder of DICOM files not named <case>_image: A" in problem.found
    assert "folder of each series <case>_image" in problem.action


def test_one_path_in_two_spellings_is_one_case(tmp_path, make_data):
    root = root_with(
        tmp_path / "d",
        "site,image,mask",
        "A,A/a.png,m.png",
        "A,./A/a.png,m.png",
        "A,B/../A/a.png,m.png",
        "A,b.png,m.png",
        files=("A/a.png", "B/x.png", "b.png", "m.png"),
    )
    site = open_site(root, "A", make_data())
    assert [case.name for case in site.cases] == ["a", "b"]
    assert [(p.code, p.found) for p in site.quarantined] == [
        ("SITE-511", "the image of line 2 again")
    ] * 2


def test_names_that_are_no_utf8_become_cases_with_names_that_can_be_written(tmp_path, make_data):
    for site, case in ((b"A", b"M\xfcller"), (b"K\xf6ln", b"c")):
        folder = os.fsencode(tmp_path) + b"/" + site
        os.mkdir(folder)
        for kind in (b"image", b"mask"):
            with open(folder + b"/" + case + b"_" + kind + b".png", "wb"):
                pass
    assert discover_sites(tmp_path) == ("A", "K%F6ln")
    (case,) = open_site(tmp_path, "A", make_data()).cases
    assert (case.name, case.patient) == ("M%FCller", "M%FCller")
    assert case.image.is_file()
    assert case.mask is not None
    assert case.mask.is_file()
    assert splits([case], 0.2, heldout=False) == ("train",)
    found, _ = own.find("manifest", tmp_path, link=False)
    assert [work.image for work in found.work] == ["A/M%FCller_image.png", "K%F6ln/c_image.png"]


def test_hospitals_that_look_the_same_are_a_warning_that_shows_the_difference(tmp_path):
    composed, split = "Z\u00fcrich", "Zu\u0308rich"
    root = folder_root(
        tmp_path,
        f"{composed}/a_image.png",
        f"{split}/a_image.png",
        "B/a_image.png",
        "b/a_image.png",
    )
    assert len(discover_sites(root)) == 4
    said = data_warnings(root, discover_sites(root))
    assert [(problem.code, problem.found) for problem in said] == [
        ("DAT-118", "B and b"),
        ("DAT-118", "Zu\\u0308rich and Z\\u00fcrich"),
    ]
    found, _ = own.find("manifest", root, link=False)
    assert any("Zu\\u0308rich and Z\\u00fcrich" in note for note in found.notes)


def test_a_name_that_no_file_can_have_leaves_its_case_out(tmp_path, make_data):
    root = root_with(
        tmp_path / "d", "site,image,mask", f"A,{'x' * 300}.png,", "A,a.png,", files=("a.png",)
    )
    site = open_site(root, "A", make_data())
    assert [case.name for case in site.cases] == ["a"]
    assert "File name too long" in site.quarantined[0].found


@contextmanager
def as_nobody():
    """Drop root's rights for a while; in containers tests run as root, which can read all."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def told(call, *arguments):
    """What a call returns, or the problems that it raises, as a user without rights sees them."""
    with as_nobody():
        try:
            return call(*arguments)
        except FedsgcgError as error:
            return [
                (problem.code, problem.found.split(":")[0], Path(problem.where).name)
                for problem in error.problems
            ]


def test_a_closed_folder_stops_only_those_who_need_it_and_says_which(make_data):
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to other users
        root, data = (
            folder_root(Path(outside) / "data", "A/a_image.png", "B/b_image.png"),
            make_data(),
        )
        for folder in (Path(outside), root):
            folder.chmod(0o755)
        (root / "B").chmod(0o000)
        closed = [("DAT-101", "Permission denied", "B")]
        assert told(discover_sites, root) == closed
        assert told(discover_sites, root, ("A",)) == ("A",)
        assert len(told(open_site, root, "A", data).cases) == 1
        assert told(open_site, root, "B", data) == closed
        (root / "manifest.csv").write_text("site,image,mask\nA,A/a_image.png,\nB,B/b_image.png,\n")
        assert told(discover_sites, root) == ("A", "B")
        (problem,) = told(open_site, root, "B", data).quarantined
        assert (problem.code, problem.found.split(":")[0]) == ("DAT-103", "Permission denied")
        root.chmod(0o000)
        closed = [("DAT-101", "Permission denied", "data")]
        assert told(discover_sites, root) == closed
        assert told(ensure_data, make_data(root=str(root / "inner")), "") == [
            ("DAT-101", "Permission denied", "inner")
        ]
        root.chmod(0o755)
        (root / "B").chmod(0o755)
