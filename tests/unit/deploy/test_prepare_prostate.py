"""Preparing prostate data: six sites become canonical, and unusable volumes are told."""

import nibabel as nib
import numpy as np
import pytest

from fedsgcg.clients.data.case_files import discover_sites, open_site
from fedsgcg.clients.data.store import open_store
from tests.support import downloads
from tests.support.prepared import manifest, prepare, report, saml

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


def test_a_mask_with_another_position_is_used_voxel_for_voxel_with_a_note(tmp_path, make_data):
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


def test_volumes_that_cannot_be_used_are_listed_one_by_one(tmp_path):
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
