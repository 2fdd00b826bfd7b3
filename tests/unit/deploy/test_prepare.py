"""Preparing data sets: what to fetch, a table of your own, and what is said of other files."""

import numpy as np
import pytest
import yaml

from fedsgcg.clients.data.case_files import discover_sites, open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.datasets import CATALOGUE, fetch_advice
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.prepare.fundus import PUBLISHED
from tests.support import downloads
from tests.support.prepared import manifest, prepare, report

# the catalogue


@pytest.mark.parametrize("name", CATALOGUE)
def test_advice_names_a_source_the_terms_and_the_next_command(name):
    text = fetch_advice(name)
    assert f"fedsgcg data prepare {name}" in text
    assert "data.root=FOLDER" in text
    assert "Terms:" in text
    assert any(place in text for place in ("github.com", "github.io", "zenodo"))


def test_advice_for_own_and_synthetic_data():
    assert "site, image, mask" in fetch_advice("our-hospital")
    assert "no download" in fetch_advice("synthetic")


def test_the_published_names_have_the_published_counts_and_no_case_is_in_both_parts():
    counts = {key: len(names) for key, names in PUBLISHED.items()}
    fundus = {
        hospital.name: (hospital.train, hospital.test) for hospital in CATALOGUE["fundus"].hospitals
    }
    assert fundus == {
        "Domain1": (50, 51),
        "Domain2": (99, 60),
        "Domain3": (320, 80),
        "Domain4": (320, 80),
    }
    assert counts == {
        (name, part): n
        for name, both in fundus.items()
        for part, n in zip(("train", "test"), both, strict=True)
    }
    for domain in fundus:
        assert not PUBLISHED[domain, "train"] & PUBLISHED[domain, "test"]


@pytest.mark.parametrize("name", [*CATALOGUE, "manifest"])
def test_without_the_folder_it_says_what_to_fetch(name, tmp_path, capsys):
    assert prepare(name, tmp_path / "nowhere", "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "[DAT-120]" in told
    assert "nowhere" in told
    assert ("FOLDER/data.yaml" if name == "manifest" else "data.root=FOLDER") in told
    assert not (tmp_path / "out").exists()
    assert prepare(name) == 2


# own data


def test_a_table_with_its_own_columns_order_and_separator(tmp_path, make_data, capsys):
    down, out = tmp_path / "down", tmp_path / "out"
    for number, folder in enumerate(("a", "b", "c")):
        image, labels = downloads.scan(number)
        downloads.volume(down / folder / "t2.nii.gz", image)
        downloads.volume(down / folder / "t2 gland.nii", labels)
    (down / "cases.csv").write_text(
        "\ufeffPatient;comment;Segmentation;Hospital;Set;Image\n"
        "P1;x;a/t2 gland.nii;North;;a/t2.nii.gz\n"
        "P2;;b/t2 gland.nii;North;test;b/t2.nii.gz\n"
        ";;c/t2 gland.nii;South;;c/t2.nii.gz\n"
    )
    assert prepare("manifest", down / "cases.csv", "-o", out) == 0
    rows = [
        [row[name] for name in ("site", "image", "mask", "patient_id", "split")]
        for row in manifest(out)
    ]
    assert rows == [
        ["North", "North/a_t2_image.nii.gz", "North/a_t2_mask.nii", "P1", ""],
        ["North", "North/b_t2_image.nii.gz", "North/b_t2_mask.nii", "P2", "test"],
        ["South", "South/t2_image.nii.gz", "South/t2_mask.nii", "", ""],
    ]
    assert "values, and the masks that have them: 0 in" in capsys.readouterr().out
    classes = {"background": [0], "class_1": [1], "class_2": [2]}
    assert yaml.safe_load((out / "data.yaml").read_text())["classes"] == classes
    assert (out / "North/b_t2_image.nii.gz").read_bytes() == (down / "b/t2.nii.gz").read_bytes()
    data = make_data("prostate", image_size=32, classes={"background": [0], "prostate": [1, 2]})
    assert (
        open_store(open_site(out, "South", data), data, tmp_path / "cache", heldout=True).problems
        == ()
    )


def test_a_table_with_bad_lines_and_files_says_each(tmp_path):
    down, out = tmp_path / "down", tmp_path / "out"
    image, labels = downloads.scan(1)
    for name, array in (("i", image), ("m", labels), ("odd", labels * 0.5)):
        downloads.volume(down / f"{name}.nii.gz", array)
    downloads.volume(down / "far.nii.gz", labels, np.diag([1.0, 1.0, 9.0, 1.0]))
    (down / "manifest.csv").write_text(
        "site,image,mask,split\nA,i.nii.gz,m.nii.gz,train\nA,i.nii.gz,m.nii.gz,\n../B,i.nii.gz,m.nii.gz,\nA,,m.nii.gz,\n"
        "A,gone.nii.gz,m.nii.gz,\nB,i.nii.gz,odd.nii.gz,\nC,i.nii.gz,far.nii.gz,\nD,i.nii.gz,m.nii.gz,dev\nE,i.nii.gz,,\n"
    )
    assert prepare("manifest", down, "-o", out) == 3
    assert [row["site"] for row in manifest(out)] == ["A", "E"]
    heads = [line for line in report(out).splitlines() if line.startswith("[")]
    for code, place in (
        ("DAT-123", "line 3"),
        ("DAT-125", "line 4"),
        ("DAT-125", "line 5"),
        ("DAT-122", "gone"),
        ("DAT-109", "odd"),
        ("DAT-105", "i.nii.gz"),
        ("DAT-125", "line 9"),
    ):
        assert any(head.startswith(f"[{code}]") and place in head for head in heads), (
            code,
            place,
            heads,
        )
    assert "E i: no mask" in report(out)


def test_one_folder_a_hospital_without_a_table(tmp_path):
    down, out = tmp_path / "down", tmp_path / "out"
    for site, case in (("North", "p1"), ("North", "p2"), ("South", "p1")):
        image, labels = downloads.scan(1)
        downloads.volume(down / site / f"{case}_image.nii.gz", image)
        downloads.volume(down / site / f"{case}_mask.nii.gz", labels)
    assert prepare("manifest", down, "-o", out, "--link") == 0
    assert {row["patient_id"] for row in manifest(out)} == {""}, "nobody said whose they are"
    assert (out / "North/p1_image.nii.gz").is_symlink()
    assert (out / "North/p1_image.nii.gz").read_bytes() == (
        down / "North/p1_image.nii.gz"
    ).read_bytes()


def test_a_table_without_its_columns_is_refused(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("who,what\na,b\n")
    assert prepare("manifest", tmp_path / "t.csv", "-o", tmp_path / "out") == 2
    assert "none for site, image, mask" in capsys.readouterr().err


def test_the_list_names_every_data_set_with_counts(capsys):
    assert main(["data", "list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in CATALOGUE)
    assert "50/51" in told


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "cases"), [("promise12", 50), ("spinegm", 8)])
def test_the_shared_copies_are_taken_whole(name, cases, real_data, tmp_path, make_data):
    source, out = real_data(name), tmp_path / "out"
    assert prepare(name, source, "-o", out, "--link") == 0
    assert discover_sites(out) == discover_sites(source)
    data = make_data(name)
    seen = 0
    for site in discover_sites(out):
        copied, original = open_site(out, site, data), open_site(source, site, data)
        assert [(c.name, c.patient, c.split) for c in copied.cases] == [
            (c.name, c.patient, c.split) for c in original.cases
        ]
        for one, two in zip(copied.cases, original.cases, strict=True):
            assert one.image.read_bytes() == two.image.read_bytes()
            seen += 1
    assert seen == cases


def test_other_formats_and_hidden_files_are_reported_once(tmp_path, capsys):
    down, out = tmp_path / "down", tmp_path / "out"
    image, labels = downloads.scan(1)
    downloads.volume(down / "North/p1_image.nii.gz", image)
    downloads.volume(down / "North/p1_mask.nii.gz", labels)
    for name in ("p2_image.mgz", "p2_mask.mgz", "._p1_image.nii.gz", "note.txt"):
        (down / "North" / name).write_bytes(b"")
    (down / "South").mkdir()
    (down / "South/x.vtk").write_bytes(b"")
    assert prepare("manifest", down, "-o", out) == 3
    assert [line for line in report(out).splitlines() if line.startswith("[")] == [
        f"[DAT-119] Files in the folder are not used. ({down})"
    ]
    assert "3 files of formats that are not read (.mgz 2, .vtk 1)" in report(out)
    assert "FreeSurfer" in capsys.readouterr().out
    assert "1 hidden file named like images, skipped: ._p1_image.nii.gz" in report(out)
    (down / "North/scan").mkdir()
    (down / "North/scan/IM1.dcm").write_bytes(b"")
    assert prepare("manifest", down, "-o", tmp_path / "again") == 3
    assert "1 folder of DICOM files: scan" in report(tmp_path / "again")
    capsys.readouterr()
    assert prepare("manifest", down / "South", "-o", tmp_path / "other") == 2
    assert "1 file of formats that are not read (.vtk 1): x.vtk" in capsys.readouterr().err
