"""Preparing fundus data: the released crops and the original releases become canonical."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import discover_sites, open_site, validation_patients
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.datasets import CATALOGUE
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.prepare.fundus import SIDE, cut, labels_of, window
from tests.support import downloads
from tests.support.prepared import manifest, prepare, report


def pixels(path):
    return np.asarray(Image.open(path))


SOME = {
    ("Domain1", "train"): ["gdrishtiGS_002"],
    ("Domain2", "test"): ["S-2-L"],
    ("Domain4", "train"): ["V0001"],
}


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
        training = [row for row in mine if row["published_split"] == "train"]
        chosen = validation_patients([row["patient_id"] for row in training], 0.2)
        for row in training:
            assert row["split"] == ("validation" if row["patient_id"] in chosen else "train")
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


def test_lists_next_to_the_domains_and_lists_within_them_mean_the_same(tmp_path):
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


def test_broken_files_are_reported_and_the_others_are_read(tmp_path, capsys):
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
