"""Preparing data sets: original layouts and names become canonical folders, with full reports."""

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import discover_sites, open_site, split_of
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.datasets import CATALOGUE, fetch_advice
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.prepare.fundus import PUBLISHED, SIDE, cut, labels_of, window
from tests.support import downloads


def prepare(*arguments):
    return main(["data", "prepare", *map(str, arguments)])


def manifest(folder):
    with (folder / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def report(folder):
    return (folder / "prepared.txt").read_text()


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def pixels(path):
    return np.asarray(Image.open(path))


SOME = {
    ("Domain1", "train"): ["gdrishtiGS_002"],
    ("Domain2", "test"): ["S-2-L"],
    ("Domain4", "train"): ["V0001"],
}


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
    assert "data.root=FOLDER" in told
    assert not (tmp_path / "out").exists()
    assert prepare(name) == 2


# fundus, released crops


def test_the_whole_release_becomes_four_hospitals_with_the_published_counts(tmp_path, capsys):
    downloads.released(tmp_path / "down/fundus", 8)
    out = tmp_path / "out"
    assert prepare("fundus", tmp_path / "down", "-o", out) == 0
    rows = manifest(out)
    assert len(rows) == 101 + 159 + 400 + 400
    for hospital in CATALOGUE["fundus"].hospitals:
        mine = [row for row in rows if row["site"] == hospital.name]
        parts = [row["published_split"] for row in mine]
        assert (parts.count("train"), parts.count("test")) == (hospital.train, hospital.test)
        assert {row["split"] for row in mine if row["published_split"] == "test"} == {"test"}
        for row in mine:
            if row["published_split"] == "train":
                assert row["split"] == split_of(row["patient_id"], 0.2)
    assert "no problems" in report(out)
    assert "320/80" in capsys.readouterr().out


def test_released_pixels_are_kept_and_grey_values_become_classes(tmp_path, make_data):
    made = downloads.released(tmp_path / "down", 800, SOME)
    # every grey value, and the borders of the rule that upstream's reader has
    grey = np.full((800, 800), 255, np.uint8)
    grey[0] = np.arange(800) % 256
    downloads.picture(tmp_path / "down/Domain2/test/ROIs/mask/S-2-L.png", grey)
    made["S-2-L"] = (made["S-2-L"][0], grey)
    out = tmp_path / "out"
    assert prepare("fundus", tmp_path / "down", "-o", out, "--validation", "0") == 3
    assert discover_sites(out) == ("Domain1", "Domain2", "Domain4")
    for site, case in (("Domain1", "gdrishtiGS_002"), ("Domain2", "S-2-L"), ("Domain4", "V0001")):
        image, mask = made[case]
        np.testing.assert_array_equal(pixels(out / site / f"{case}_image.png"), image)
        expected = [[2 if v <= 50 else 1 if v <= 200 else 0 for v in row] for row in mask.tolist()]
        np.testing.assert_array_equal(pixels(out / site / f"{case}_mask.png"), expected)
        np.testing.assert_array_equal(labels_of(mask), expected)
    data = make_data("fundus", image_size=64)
    store = open_store(open_site(out, "Domain2", data), data, tmp_path / "cache", heldout=True)
    assert store.problems == ()
    assert store.cases[0].is_picture
    np.testing.assert_array_equal(
        store.truth(store.cases[0])[0], pixels(out / "Domain2/S-2-L_mask.png")
    )
    train = open_store(open_site(out, "Domain1", data), data, tmp_path / "cache", heldout=False)
    assert [case.split for case in train.cases] == ["train"]


def test_lists_beside_the_domains_and_lists_within_them_mean_the_same(tmp_path):
    names = {("Domain1", "train"): ["a1", "a2"], ("Domain1", "test"): ["b1"]}
    downloads.released(tmp_path / "one", 8, names)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for part, cases in (("train", ["a1", "a2"]), ("test", ["b1"])):
        inner = [f"{part}/ROIs/image/{case}.png {part}/ROIs/mask/{case}.png" for case in cases]
        outer = [" ".join(f"Domain1/{path}" for path in line.split()) for line in inner]
        (tmp_path / f"one/Domain1_{part}.list").write_text("\n".join(outer) + "\n")
        (tmp_path / f"two/Domain1/{part}.list").write_text("\r\n".join(inner) + "\r\n")
    for name in ("one", "two"):
        assert prepare("fundus", tmp_path / name, "-o", tmp_path / f"{name}-out") == 3
    rows = manifest(tmp_path / "one-out")
    assert [(row["image"], row["published_split"]) for row in rows] == [
        ("Domain1/a1_image.png", "train"),
        ("Domain1/a2_image.png", "train"),
        ("Domain1/b1_image.png", "test"),
    ]
    assert rows == manifest(tmp_path / "two-out")


def test_every_missing_and_every_extra_file_is_listed_and_the_rest_goes_on(tmp_path):
    down, out = tmp_path / "down", tmp_path / "out"
    downloads.released(down, 8)
    gone = [
        down / "Domain1/test/ROIs/mask/gdrishtiGS_039.png",
        down / "Domain3/train/ROIs/image/g0003.png",
    ]
    for path in gone:
        path.unlink()
    stray = [down / "Domain2/train/ROIs/image/N-99-L.png", down / "Domain4/overview.jpg"]
    for path in stray:
        downloads.picture(path, downloads.colours((8, 8)))
    (down / "__MACOSX").mkdir()
    downloads.picture(down / "__MACOSX/V0001.png", downloads.colours((8, 8)))
    assert prepare("fundus", down, "-o", out) == 3
    text = report(out)
    for path in gone:
        assert f"[DAT-122] A file of the data set is missing. ({path})" in text
    for path in stray:
        assert f"[DAT-123] A file does not belong to the data set. ({path})" in text
    assert "MACOSX" not in text
    assert (text.count("[DAT-122]"), text.count("[DAT-123]")) == (2, 2), (
        "what is left of a torn pair is no extra file"
    )
    assert "(Domain1 (Drishti-GS), test)\n  found: 50 cases\n  expected: 51 cases" in text
    assert text.count("[DAT-124]") == 2
    assert len(manifest(out)) == 1060 - 2


def test_broken_files_are_told_and_the_rest_goes_on(tmp_path, capsys):
    down, out = tmp_path / "down", tmp_path / "out"
    downloads.released(down, 8, {("Domain1", "train"): ["a", "b", "c", "d", "e"]})
    folder = down / "Domain1/train/ROIs"
    (down / "Domain1_train.list").write_text(
        "".join(
            f"Domain1/train/ROIs/image/{name}.png Domain1/train/ROIs/mask/{name}.png\n"
            for name in "abcde"
        )
    )
    (folder / "image/a.png").write_bytes(b"no picture")
    (folder / "mask/b.png").write_bytes((folder / "mask/b.png").read_bytes()[:40])
    downloads.picture(folder / "mask/c.png", np.zeros((9, 8), np.uint8))
    downloads.picture(folder / "mask/d.png", np.full((8, 8), 255, np.uint8))
    assert prepare("fundus", down, "-o", out) == 3
    text = report(out)
    for code, name in (
        ("DAT-103", "image/a.png"),
        ("DAT-103", "mask/b.png"),
        ("DAT-104", "c.png"),
        ("DAT-125", "d.png"),
    ):
        assert any(line.startswith(f"[{code}]") and name in line for line in text.splitlines()), (
            code,
            name,
        )
    assert [row["image"] for row in manifest(out)] == ["Domain1/e_image.png"]
    assert not [path for path in (out / "Domain1").iterdir() if not path.name.startswith("e_")]
    assert "incomplete" in capsys.readouterr().out


def test_a_damaged_list_file_is_refused_with_its_line(tmp_path, capsys):
    downloads.released(tmp_path / "d", 8, {("Domain1", "train"): ["a"]})
    (tmp_path / "d/Domain1_train.list").write_text("one.png two.png\nonly-one.png\n")
    assert prepare("fundus", tmp_path / "d", "-o", tmp_path / "out") == 2
    assert "line 2" in capsys.readouterr().err


# fundus, original releases


def test_the_window_is_centred_on_the_disc_and_stays_in_the_picture():
    mask = np.zeros((30, 40), bool)
    mask[10:15, 20:27] = True  # centre row 12, column 23
    assert window(mask, 8) == (8, 19)
    mask[:] = False
    mask[0:3, 37:40] = True
    assert window(mask, 8) == (0, 32)
    assert window(mask, 34) == (-2, 6)
    array = np.arange(1200, dtype=np.int32).reshape(30, 40)
    np.testing.assert_array_equal(cut(array, (8, 19), 8), array[8:16, 19:27])
    padded = cut(array, (-2, 6), 34)
    np.testing.assert_array_equal(padded[2:32], array[:, 6:40])
    assert not padded[:2].any()
    assert not padded[32:].any()
    for wrong in (np.zeros((9, 9), bool), np.ones((9, 9), bool)):
        with pytest.raises(FedsgcgError, match="DAT-125"):
            window(wrong, 8)


def test_original_releases_are_cropped_about_the_disc(tmp_path, make_data):
    down = tmp_path / "down"
    # Drishti-GS: soft maps of four experts
    training = down / "Drishti-GS1_files/Training"
    image = downloads.picture(
        training / "Images/GLAUCOMA/drishtiGS_002.png", downloads.colours((900, 1000), 1)
    )
    maps = training / "GT/drishtiGS_002/SoftMap"
    disc = np.zeros((900, 1000), np.uint8)
    disc[300:500, 400:600] = 255
    disc[300:320, 400:600] = 128  # two of four experts
    disc[320:330, 400:600] = 191  # three of four: not all of them
    cup = np.zeros_like(disc)
    cup[380:420, 450:550] = 191
    cup[380:410, 450:550] = 255
    downloads.picture(maps / "drishtiGS_002_ODsegSoftmap.png", disc)
    downloads.picture(maps / "drishtiGS_002_cupsegSoftmap.png", cup)
    # RIM-ONE r3: stereo pairs, the map as wide as the pair
    rim = down / "RIM-ONE r3/Healthy"
    stereo = downloads.picture(rim / "Stereo Images/N-1-L.jpg", downloads.colours((820, 1640), 2))
    wide = np.zeros((820, 1640), np.uint8)
    wide[390:430, 700:760] = 255
    downloads.picture(rim / "Average_masks/N-1-L-Disc-Avg.png", wide)
    small = np.zeros_like(wide)
    small[400:410, 720:740] = 255
    downloads.picture(rim / "Average_masks/N-1-L-Cup-Avg.png", small)
    downloads.picture(rim / "Expert1_masks/N-1-L-1-Disc-exp1.png", wide)
    # REFUGE: grey masks as BMP
    refuge = down / "REFUGE"
    for name, folder, gold in (
        ("g0001", "Training400/Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Glaucoma"),
        ("V0158", "REFUGE-Validation400", "REFUGE-Validation400-GT/Disc_Cup_Masks"),
    ):
        downloads.picture(refuge / folder / f"{name}.jpg", downloads.colours((850, 900), 3))
        downloads.picture(
            refuge / gold / f"{name}.bmp", downloads.grey_mask((850, 900), (100.0, 450.0), 60.0)
        )
    downloads.picture(refuge / "Test400/T0001.jpg", downloads.colours((20, 20)))
    out = tmp_path / "out"
    assert prepare("fundus", down, "-o", out) == 3
    assert {
        (row["site"], Path(row["image"]).name, row["published_split"]) for row in manifest(out)
    } == {
        ("Domain1", "gdrishtiGS_002_image.png", "train"),
        ("Domain2", "N-1-L_image.png", "test"),
        ("Domain3", "g0001_image.png", "test"),
        ("Domain4", "V0158_image.png", "test"),
    }
    text = report(out)
    assert "[DAT-123]" not in text
    assert text.count("[DAT-122]") == 3 * 100 + 3 * 158 + 2 * 399 + 2 * 399
    # Drishti: rows 330..499, columns 400..599 are the disc; the square starts at 415 - 400 and
    # 500 - 400
    np.testing.assert_array_equal(
        pixels(out / "Domain1/gdrishtiGS_002_image.png"), image[15:815, 100:900]
    )
    expected = np.zeros((SIDE, SIDE), np.uint8)
    expected[315:485, 300:500] = 1
    expected[365:395, 350:450] = 2
    np.testing.assert_array_equal(pixels(out / "Domain1/gdrishtiGS_002_mask.png"), expected)
    # RIM-ONE: the square ends where the left half of the pair ends
    left = pixels(rim / "Stereo Images/N-1-L.jpg")[:, :820]
    assert left.shape == (820, stereo.shape[1] // 2, 3)
    np.testing.assert_array_equal(pixels(out / "Domain2/N-1-L_image.png"), left[10:810, 20:820])
    eye = pixels(out / "Domain2/N-1-L_mask.png")
    assert [int((eye == value).sum()) for value in (1, 2)] == [40 * 60 - 200, 200]
    assert (eye[390, 700], eye[380, 680]) == (2, 1)
    # REFUGE: the disc lies near the upper edge
    mask = labels_of(downloads.grey_mask((850, 900), (100.0, 450.0), 60.0))
    for domain, name in (("Domain3", "g0001"), ("Domain4", "V0158")):
        np.testing.assert_array_equal(
            pixels(out / domain / f"{name}_mask.png"), mask[0:800, 50:850]
        )
    data = make_data("fundus", image_size=64)
    store = open_store(open_site(out, "Domain4", data), data, tmp_path / "cache", heldout=True)
    assert (store.problems, store.cases[0].native_shape) == ((), (1, SIDE, SIDE))


# prostate


def saml(root, sites, *, case="Case{:02d}", mask="_segmentation"):
    made = {}
    for site, numbers in sites.items():
        for number in numbers:
            image, labels = downloads.scan(number)
            stem = case.format(number)
            made[site, number] = (
                downloads.volume(root / site / f"{stem}.nii.gz", image),
                downloads.volume(root / site / f"{stem}{mask}.nii.gz", labels),
            )
    return made


WHOLE = {
    "ISBI": range(30),
    "ISBI_1.5": range(30),
    "I2CVB": range(19),
    "UCL": [1, *range(26, 38)],
    "BIDMC": [0, 1, *range(3, 13)],
    "HK": range(38, 50),
}


def test_the_six_sites_become_canonical_with_the_published_counts(tmp_path, make_data, capsys):
    made = saml(tmp_path / "down/Prostate", WHOLE)
    out = tmp_path / "out"
    assert prepare("prostate", tmp_path / "down", "-o", out) == 0
    rows = manifest(out)
    counts = {site: sum(row["site"] == site for row in rows) for site in discover_sites(out)}
    assert counts == {"RUNMC": 30, "BMC": 30, "I2CVB": 19, "UCL": 13, "BIDMC": 12, "HK": 12}
    assert len({row["patient_id"] for row in rows}) == 116, "cases 00 of two sites are two patients"
    assert "recalled" in capsys.readouterr().out
    image, labels = made["ISBI_1.5", 7]
    written = nib.load(out / "BMC/Case07_mask.nii.gz")
    np.testing.assert_array_equal(
        np.asarray(nib.load(out / "BMC/Case07_image.nii.gz").dataobj), image
    )
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels > 0)
    np.testing.assert_array_equal(
        written.affine, nib.load(tmp_path / "down/Prostate/ISBI_1.5/Case07.nii.gz").affine
    )
    data = make_data("prostate", image_size=32)
    store = open_store(open_site(out, "HK", data), data, tmp_path / "cache", heldout=False)
    assert (len(store.cases), store.problems) == (12, ())
    table = store.slices("train")
    assert len(table) == 3 * sum(case.split == "train" for case in store.cases), (
        "only the three gland slices train"
    )


@pytest.mark.parametrize(
    ("names", "case", "mask"),
    [
        (("RUNMC", "BMC", "HCRUDB"), "case{:02d}", "_Segmentation"),
        (("runmc", "bmc", "i2cvb"), "CASE{:02d}", "_SEGMENTATION"),
        (("ISBI", "ISBI_15", "I2CVB"), "Case_{:d}", " segmentation"),
    ],
)
def test_other_ways_to_write_the_names(tmp_path, names, case, mask):
    saml(tmp_path / "down", {name: [3] for name in names}, case=case, mask=mask)
    assert prepare("prostate", tmp_path / "down", "-o", tmp_path / "out") == 3
    assert [row["image"] for row in manifest(tmp_path / "out")] == [
        f"{site}/Case03_image.nii.gz" for site in ("BMC", "I2CVB", "RUNMC")
    ]
    text = report(tmp_path / "out")
    assert all(f"folder of {site}" in text for site in ("UCL", "BIDMC", "HK"))
    assert text.count("which is in SAML's list of I2CVB") == 18, (
        "each of the other cases by its name"
    )
    assert "I2CVB/Case03.nii.gz" not in text


def test_a_mask_whose_header_lies_elsewhere_is_taken_voxel_for_voxel_and_noted(tmp_path, make_data):
    image, labels = downloads.scan(1)
    downloads.volume(tmp_path / "down/UCL/Case01.nii.gz", image)
    turned = np.diag([0.5, 0.5, 3.0, 1.0])
    turned[:3, 3] = 40.0
    downloads.volume(tmp_path / "down/UCL/Case01_segmentation.nii.gz", labels, turned)
    out = tmp_path / "out"
    assert prepare("prostate", tmp_path / "down", "-o", out) == 3
    np.testing.assert_array_equal(
        np.asarray(nib.load(out / "UCL/Case01_mask.nii.gz").dataobj), labels > 0
    )
    assert "UCL Case01: the headers of image and mask differ" in report(out)
    data = make_data("prostate", image_size=32)
    assert (
        open_store(open_site(out, "UCL", data), data, tmp_path / "cache", heldout=True).problems
        == ()
    )


def test_volumes_that_cannot_be_used_are_told_one_by_one(tmp_path):
    down, out = tmp_path / "down", tmp_path / "out"
    made = saml(down, {"HK": range(38, 45)})
    labels = made["HK", 38][1]
    (down / "HK/Case38.nii.gz").write_bytes(b"\x1f\x8bno gzip")
    downloads.volume(down / "HK/Case39_segmentation.nii.gz", labels[:, :-1])
    downloads.volume(down / "HK/Case40_segmentation.nii.gz", labels * 3)
    downloads.volume(down / "HK/Case41_segmentation.nii.gz", labels * 0)
    (down / "HK/Case42_segmentation.nii.gz").unlink()
    (down / "HK/Case43.nii.gz").unlink()
    downloads.volume(down / "HK/localizer.nii.gz", labels)
    assert prepare("prostate", down, "-o", out) == 3
    assert [row["image"] for row in manifest(out)] == ["HK/Case44_image.nii.gz"]
    heads = [line for line in report(out).splitlines() if line.startswith("[")]
    for code, name in (
        ("DAT-103", "Case38.nii.gz"),
        ("DAT-104", "Case39_seg"),
        ("DAT-109", "Case40_seg"),
        ("DAT-125", "Case41_seg"),
        ("DAT-122", "Case42.nii.gz"),
        ("DAT-122", "Case43_seg"),
        ("DAT-123", "localizer"),
        ("DAT-124", "HK"),
    ):
        assert any(head.startswith(f"[{code}]") and name in head for head in heads), (code, name)


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
        ["South", "South/t2_image.nii.gz", "South/t2_mask.nii", "South-t2", ""],
    ]
    assert "classes: {background: [0], class_1: [1], class_2: [2]}" in capsys.readouterr().out
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
    assert [row["patient_id"] for row in manifest(out)] == ["North-p1", "North-p2", "South-p1"]
    assert (out / "North/p1_image.nii.gz").is_symlink()
    assert (out / "North/p1_image.nii.gz").read_bytes() == (
        down / "North/p1_image.nii.gz"
    ).read_bytes()


def test_a_table_without_its_columns_is_refused(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("who,what\na,b\n")
    assert prepare("manifest", tmp_path / "t.csv", "-o", tmp_path / "out") == 2
    assert "none for site, image, mask" in capsys.readouterr().err


# the folder


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


def test_other_formats_and_hidden_files_are_told_once(tmp_path, capsys):
    down, out = tmp_path / "down", tmp_path / "out"
    image, labels = downloads.scan(1)
    downloads.volume(down / "North/p1_image.nii.gz", image)
    downloads.volume(down / "North/p1_mask.nii.gz", labels)
    for name in ("p2_image.mha", "p2_mask.mha", "._p1_image.nii.gz", "note.txt"):
        (down / "North" / name).write_bytes(b"")
    (down / "South").mkdir()
    (down / "South/x.nrrd").write_bytes(b"")
    assert prepare("manifest", down, "-o", out) == 3
    assert [line for line in report(out).splitlines() if line.startswith("[")] == [
        f"[DAT-119] Files in the folder are not used. ({down})"
    ]
    assert "3 files of formats that are not read (.mha 2, .nrrd 1)" in report(out)
    assert "SimpleITK" in capsys.readouterr().out
    assert "1 hidden files named like images, skipped: ._p1_image.nii.gz" in report(out)
    assert prepare("manifest", down / "South", "-o", tmp_path / "other") == 2
    assert "1 files of formats that are not read (.nrrd 1): x.nrrd" in capsys.readouterr().err
