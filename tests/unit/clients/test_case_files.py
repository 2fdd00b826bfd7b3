"""Listing a hospital's cases: manifest, folders, patients, splits."""

import csv
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsgcg.clients.data.case_files import (
    CaseFile,
    data_warnings,
    discover_sites,
    ensure_data,
    open_site,
    resolve_cache,
    split_of,
    splits,
)
from fedsgcg.clients.data.store import data_fingerprint
from fedsgcg.clients.predict.files import jobs_of_images
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.federation import SiteSettings
from fedsgcg.deploy.prepare import own


def root_with(folder, header, *lines, files=()):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def problems_of(call, *arguments):
    with pytest.raises(FedsgcgError) as caught:
        call(*arguments)
    return caught.value.problems


def case(patient, split=None, name=None):
    return CaseFile("S", name or patient, Path("i"), Path("m"), patient, split)


# manifest


def test_manifest_with_extra_columns_blank_patient_and_missing_mask(tmp_path, make_data):
    root = root_with(
        tmp_path / "d",
        "site,field,image,mask,patient_id",
        "B,3T,B/two_image.nii.gz,,P2",
        "B,3T,B/one_image.nii.gz , B/one_mask.nii.gz,",
        "A,1T,A/x.png,A/y.png,P9",
        files=(
            "B/two_image.nii.gz",
            "B/one_image.nii.gz",
            "B/one_mask.nii.gz",
            "A/x.png",
            "A/y.png",
        ),
    )
    assert discover_sites(root) == ("A", "B")
    site = open_site(root, "B", make_data())
    assert site.quarantined == ()
    assert [(c.name, c.patient, c.mask and c.mask.name, c.split) for c in site.cases] == [
        ("one", "one", "one_mask.nii.gz", None),
        ("two", "P2", None, None),
    ]
    assert site.cases[0].image == root / "B/one_image.nii.gz"


def test_a_byte_order_mark_as_spreadsheets_write_it_is_no_trouble(tmp_path):
    root = root_with(tmp_path / "d", "\ufeffsite,image,mask", "A,a.png,b.png")
    assert discover_sites(root) == ("A",)


@pytest.mark.parametrize(
    "path",
    ["../x.nii.gz", "/etc/x.nii.gz", "A/../../x.nii.gz", "..\\x.nii.gz", "C:\\x.nii.gz", ".."],
)
def test_paths_that_leave_the_root_are_refused(tmp_path, path):
    root = root_with(tmp_path / "d", "site,image,mask", f"A,{path},A/m.nii.gz")
    (problem,) = problems_of(discover_sites, root)
    assert problem.code == "DAT-101"
    assert "line 2" in problem.where
    assert "inside the data folder" in problem.expected


def test_every_bad_line_of_a_manifest_is_reported_at_once(tmp_path):
    root = root_with(
        tmp_path / "d",
        "site,image,mask,split",
        "A,a.png,../m.png,train",
        "A,,m.png,",
        "../A,a.png,m.png,",
        "A,b.png,m.png,dev",
    )
    problems = problems_of(discover_sites, root)
    assert [problem.where.rpartition(" ")[2] for problem in problems] == ["2", "3", "4", "5"]
    assert {problem.code for problem in problems} == {"DAT-101"}
    assert "'dev'" in problems[3].found


def test_a_manifest_without_its_columns_names_them(tmp_path):
    (problem,) = problems_of(discover_sites, root_with(tmp_path / "d", "who,image", "A,a.png"))
    assert problem.code == "DAT-101"
    assert problem.action == "Add site, mask."


def test_unreadable_manifests_and_roots(tmp_path):
    root = root_with(tmp_path / "d", "site,image,mask")
    (root / "manifest.csv").write_bytes(b"site,image,mask\nA,\xff\xfe.png,b.png\n")
    assert problems_of(discover_sites, root)[0].code == "DAT-101"
    assert problems_of(discover_sites, tmp_path / "nowhere")[0].code == "DAT-101"
    (tmp_path / "void").mkdir()
    assert problems_of(discover_sites, tmp_path / "void")[0].code == "DAT-101"


def test_an_image_listed_twice_counts_once(tmp_path, make_data):
    root = root_with(
        tmp_path / "d",
        "site,image,mask",
        "A,a.png,m.png",
        "A,a.png,m.png",
        files=("a.png", "m.png"),
    )
    site = open_site(root, "A", make_data())
    assert len(site.cases) == 1
    assert [(p.code, p.found) for p in site.quarantined] == [
        ("SITE-511", "the image of line 2 again")
    ]


def test_missing_files_are_left_out_and_the_rest_goes_on(tmp_path, make_data):
    root = root_with(
        tmp_path / "d",
        "site,image,mask",
        "A,a.png,m.png",
        "A,gone.png,m.png",
        "A,b.png,gone_mask.png",
        files=("a.png", "b.png", "m.png"),
    )
    site = open_site(root, "A", make_data())
    assert [c.name for c in site.cases] == ["a"]
    assert [(p.code, p.where) for p in site.quarantined] == [("DAT-103", "gone"), ("DAT-103", "b")]


def test_cases_that_share_a_file_name_keep_different_names(tmp_path, make_data):
    files = ("s1/anat/image.nii.gz", "s2/anat/image.nii.gz", "s1/m.nii.gz", "x_image.nii.gz")
    root = root_with(
        tmp_path / "d",
        "site,image,mask",
        *(f"A,{name},s1/m.nii.gz" for name in (files[0], files[1], files[3])),
        files=files,
    )
    assert [c.name for c in open_site(root, "A", make_data()).cases] == [
        "s1_anat_image",
        "s2_anat_image",
        "x",
    ]


def test_a_site_without_cases_names_those_that_exist(tmp_path, make_data):
    root = root_with(tmp_path / "d", "site,image,mask", "A,a.png,m.png")
    (problem,) = problems_of(open_site, root, "B", make_data())
    assert (problem.code, problem.where) == ("DAT-102", "B")
    assert "A" in problem.expected


# folders


def test_folders_without_a_manifest(tmp_path, make_data):
    names = (
        "North/p1_image.nii.gz",
        "North/p1_mask.nii.gz",
        "North/p2_image.nii",
        "North/p2_mask.nii.gz",
        "North/note.txt",
        "South/f_image.jpg",
        "South/f_mask.png",
        "South/g_image.png",
        ".hidden/h_image.png",
        "empty/readme.md",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert discover_sites(tmp_path) == ("North", "South")
    north, south = (open_site(tmp_path, name, make_data()) for name in ("North", "South"))
    assert [(c.name, c.image.name, c.mask.name, c.patient) for c in north.cases] == [
        ("p1", "p1_image.nii.gz", "p1_mask.nii.gz", "p1"),
        ("p2", "p2_image.nii", "p2_mask.nii.gz", "p2"),
    ]
    assert [(c.name, c.mask and c.mask.name) for c in south.cases] == [
        ("f", "f_mask.png"),
        ("g", None),
    ]


# splits


def test_the_split_of_a_patient_never_changes_between_versions():
    """Frozen values: a change would move patients between the splits of running studies."""
    assert [split_of(f"East-{number:03d}", 0.2) for number in range(1, 9)].count("validation") == 1
    assert [n for n in range(40) if split_of(f"p{n}", 0.2) == "validation"] == [
        3,
        4,
        6,
        11,
        15,
        16,
        17,
        19,
        29,
        32,
        36,
    ]


def test_roles_and_manifest_splits():
    cases = [case("a", "test"), case("b", "validation"), case("c")]
    assert splits(cases, 0.0, heldout=False) == ("test", "validation", "train")
    assert splits(cases, 0.0, heldout=True) == ("test", "validation", "test")


def test_a_site_whose_patients_all_fall_into_validation_still_trains():
    cases = [case("a"), case("a", name="a2"), case("b")]
    chosen = splits(cases, 0.999999, heldout=False)
    assert chosen.count("train") in (1, 2)
    assert chosen[0] == chosen[1], "both cases of a patient move together"
    assert splits([case("only")], 0.999999, heldout=False) == ("train",)
    assert splits([case("only", "validation")], 0.5, heldout=False) == ("validation",), (
        "the manifest's word stands"
    )


def test_a_patient_in_two_splits_is_left_out_whole(tmp_path, make_data):
    root = root_with(
        tmp_path / "d",
        "site,image,mask,patient_id,split",
        "A,a.png,m.png,P1,train",
        "A,b.png,m.png,P1,test",
        "A,c.png,m.png,P1,",
        "A,d.png,m.png,P2,validation",
        "A,e.png,m.png,P2,",
        files=("a.png", "b.png", "c.png", "d.png", "e.png", "m.png"),
    )
    site = open_site(root, "A", make_data())
    assert [(p.code, p.where) for p in site.quarantined] == [("DAT-111", name) for name in "abc"]
    assert [(c.name, c.split) for c in site.cases] == [("d", "validation"), ("e", "validation")]


# places


def test_cache_folder_setting_environment_and_default(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDSGCG_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_cache(SiteSettings(home="", cache="/x/y")) == Path("/x/y")
    assert resolve_cache(SiteSettings(home="", cache="")) == tmp_path / ".cache" / "fedsgcg"
    monkeypatch.setenv("FEDSGCG_CACHE", "/e")
    assert resolve_cache(SiteSettings(home="", cache="")) == Path("/e")


def test_synthetic_hospitals_are_made_once(tmp_path, make_data):
    root = ensure_data(make_data(), str(tmp_path))
    stamp = (root / "manifest.csv").stat().st_mtime_ns
    assert ensure_data(make_data(), str(tmp_path)) == root
    assert (root / "manifest.csv").stat().st_mtime_ns == stamp
    assert discover_sites(root) == ("East", "North", "South", "West")
    assert len(list(csv.DictReader((root / "manifest.csv").open()))) == 32
    assert sorted(os.listdir(tmp_path)) == [root.name, "synthetic.lock"], (
        "no half-written folder stays"
    )


def test_data_without_a_root(tmp_path, make_data):
    (problem,) = problems_of(ensure_data, make_data("fundus"), str(tmp_path))
    assert problem.code == "DAT-101"
    assert "github.com/emma-sjwang/Dofe" in problem.action, "it says what to fetch"
    assert (
        problems_of(ensure_data, make_data(root=str(tmp_path / "no")), str(tmp_path))[0].code
        == "DAT-101"
    )
    assert ensure_data(make_data("promise12", root=str(tmp_path)), "") == tmp_path


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
                "d_image.mha",
                "d_mask.mha",
                "e.nrrd",
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
        "3 files in unsupported formats (.mha 2, .nrrd 1): d_image.mha, d_mask.mha, e.nrrd",
        "1 masks without an image: f_mask.png",
        "2 images that are not named <site>/<case>_image: h_image.png, g.png",
        "1 hidden files named like images: ._c_image.png",
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
    assert "1 files in unsupported formats (.dcm 1): x.dcm" in problem.found
    assert "dcm2niix" in problem.action


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
