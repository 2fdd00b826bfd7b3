"""Listing a hospital's cases: manifest, patients, splits and places."""

import csv
import os
from pathlib import Path

import pytest

from fedsgcg.clients.data.case_files import (
    discover_sites,
    ensure_data,
    open_site,
    resolve_cache,
    splits,
    validation_patients,
)
from fedsgcg.common.settings.federation import SiteSettings
from tests.support.case_lists import case, problems_of, root_with

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
    ids = [f"p{number}" for number in range(40)]
    assert sorted(validation_patients(ids, 0.2), key=lambda one: int(one[1:])) == [
        *("p3", "p4", "p11", "p15", "p16", "p17", "p29", "p36"),
    ]


def test_the_rule_of_earlier_studies_is_kept_by_name():
    cases = [case(f"p{number}") for number in range(40)]
    found = splits(cases, 0.2, heldout=False, rule="hash")
    validating = [number for number, split in enumerate(found) if split == "validation"]
    assert validating == [3, 4, 6, 11, 15, 16, 17, 19, 29, 32, 36]


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


@pytest.mark.row(46)
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
