"""From a folder as a new user has it to slices: `data prepare`, `data check`, reading."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image

from fedsgcg.clients.data.case_files import discover_sites, open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.images.read import read_volume
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.prepare import pairs
from tests.support import walks
from tests.support.dicoms import write_series
from tests.support.prepared import manifest, report

TINY = ("data.image_size=32", "network.base_width=4", "device=cpu", "method.batch_size=2")


def prepared(out: Path, *arguments: object) -> int:
    return main(["data", "prepare", *map(str, arguments), "-o", str(out)])


def checked(out: Path) -> int:
    return main(["data", "check", str(out), *TINY])


def stores(out: Path, cache: Path):
    """Yield the store and the files of each hospital, with the settings that were written."""
    tree = compose([f"data={out / 'data.yaml'}", *TINY, "output=."])
    data = Plan.from_tree(tree).data
    for name in discover_sites(out):
        site = open_site(out, name, data)
        store = open_store(site, data, cache, heldout=True)
        assert store.problems == (), name
        yield store, {case.name: case for case in site.cases}


def masks_by_content(scratch: Path) -> dict[bytes, np.ndarray]:
    """Return canonical pixels of each phantom's image -> its canonical mask."""
    found = {}
    for path in scratch.glob("*/*_image.nii.gz"):
        mask = read_volume(path.with_name(path.name.replace("_image", "_mask")), mask=True)
        found[read_volume(path).array.tobytes()] = mask.array
    return found


def assert_in_place(out: Path, scratch: Path, cache: Path, cases: int) -> None:
    """Every prepared case has the mask that was drawn on its image."""
    drawn = masks_by_content(scratch)
    seen = 0
    for store, files in stores(out, cache):
        for case in store.cases:
            image = read_volume(files[case.name].image)
            np.testing.assert_array_equal(store.truth(case), drawn[image.array.tobytes()])
            seen += 1
    assert seen == cases


def test_photographs_with_two_structures_as_two_binary_files(tmp_path, capsys):
    source, out = walks.photographs(tmp_path / "photos"), tmp_path / "out"
    assert prepared(out, source) == 0, capsys.readouterr()
    assert checked(out) == 0, capsys.readouterr()
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert list(settings["classes"]) == [
        *("background", "lesion_only", "vessel_only", "lesion_and_vessel"),
    ]
    assert settings["structures"] == {
        "lesion": ["lesion_only", "lesion_and_vessel"],
        "vessel": ["vessel_only", "lesion_and_vessel"],
    }
    assert settings["spacing_unit"] == "pixel"
    assert set(manifest(out)[0]) >= {"site", "image", "mask_lesion", "mask_vessel"}
    for (store, _), pattern in zip(
        stores(out, tmp_path / "cache"),
        ("Anna/{}_{}.png", "Berta/{1}/{0}.png", "Clara/{1}/IMG_{0}_{1}.png"),
        strict=True,
    ):
        assert len(store.cases) == 4
        for case in store.cases:
            number = case.name.removeprefix("IMG_")
            lesion, vessel = (
                np.asarray(Image.open(source / pattern.format(number, one))) > 0
                for one in ("lesion", "vessel")
            )
            np.testing.assert_array_equal(store.truth(case)[0], lesion + 2 * vessel)
    before = (out / "data.yaml").read_bytes()
    assert prepared(out, source) == 0
    assert "0 converted, 12 unchanged" in capsys.readouterr().out
    assert (out / "data.yaml").read_bytes() == before


def test_dicom_series_among_others_with_a_segmentation_each(tmp_path, capsys):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    source = walks.dicom_export(tmp_path / "export", scratch)
    assert prepared(out, source) == 0, capsys.readouterr()
    assert "9 series without a segmentation, not used" in capsys.readouterr().out
    assert checked(out) == 0, capsys.readouterr()
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert settings["classes"] == {"background": [0], "Prostate_gland": [1]}
    assert settings["spacing_unit"] == "mm"
    assert_in_place(out, scratch, tmp_path / "cache", 9)
    assert {row["patient_id"] for row in manifest(out) if row["site"] == "East"} == {
        f"East_PAT{number:03d}" for number in range(3)
    }
    assert {path.name for path in (out / "East" / "PAT000_image").iterdir()} == {
        f"{number:05d}.dcm" for number in range(1, 7)
    }


def test_one_folder_of_nnunet_with_the_hospital_in_the_names(tmp_path, capsys):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    source = walks.nnunet(tmp_path / "Dataset001_Prostate", scratch)
    assert prepared(tmp_path / "one", source) == 0
    assert "--hospitals '{site}_*' would give East 3, North 3, South 3" in capsys.readouterr().out
    assert prepared(out, source, "--hospitals", "{site}_*") == 0, capsys.readouterr()
    assert checked(out) == 0, capsys.readouterr()
    assert discover_sites(out) == ("East", "North", "South")
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert settings["structures"] == {"gland": ["gland"]}
    assert_in_place(out, scratch, tmp_path / "cache", 9)


def test_the_files_of_the_promise12_challenge_with_a_table_of_hospitals(tmp_path, capsys):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    source = walks.challenge(tmp_path / "promise", scratch)
    table = source / "hospitals.csv"
    assert prepared(out, source, "--hospitals", table) == 0, capsys.readouterr()
    assert "test_data: 1 image and no mask, not used: Case00.mhd" in report(out)
    assert checked(out) == 0, capsys.readouterr()
    assert_in_place(out, scratch, tmp_path / "cache", 9)
    # Its own finder knows the hospital of every case, and what is missing.
    known = tmp_path / "known"
    assert main(["data", "prepare", "promise12", str(source), "-o", str(known)]) == 3
    assert {row["site"]: row["patient_id"] for row in manifest(known)} == {
        "BIDMC": "PROMISE12-Case08",
        "UCL": "PROMISE12-Case01",
    }
    assert "13 cases of RUNMC missing here: Case13, Case14, Case15, ..." in report(known)
    capsys.readouterr()
    assert main(["data", "list", "promise12", str(known)]) == 3
    assert "9 cases; 4 problems" in capsys.readouterr().out


def test_a_table_of_hospitals_with_mistakes_names_each(tmp_path, capsys):
    source = walks.challenge(tmp_path / "promise", tmp_path / "scratch", cases=1)
    table = tmp_path / "who.csv"
    table.write_text(
        "Case;Hospital;patient\ncase00;A;p1\nCase01.mhd;B;p2\nCase01;C;\nCase09;A;\nCase02;x/y;\n"
    )
    assert prepared(tmp_path / "out", source, "--hospitals", table) == 3
    rows = [(row["site"], row["patient_id"]) for row in manifest(tmp_path / "out")]
    assert rows == [("A", "p1"), ("B", "p2")]
    text = report(tmp_path / "out")
    for found in (
        "line 4",
        "line 6",
        "1 case without a hospital: Case02",
        "in the folder: case09",
    ):
        assert found in text, found
    assert prepared(tmp_path / "other", source, "--hospitals", tmp_path / "gone.csv") == 2
    assert "[DAT-129]" in capsys.readouterr().err


def test_segmentations_without_their_series_contours_and_second_drawings_are_named(
    tmp_path, capsys
):
    source = walks.dicom_export(tmp_path / "export", tmp_path / "scratch", cases=1)
    first, second, third = sorted(source.glob("*/*/STUDY1"))
    for path in first.glob("IM000*.dcm"):
        path.unlink()
    (second / "again.dcm").write_bytes((second / "IM0099.dcm").read_bytes())
    contours = pydicom.dcmread(third / "IM0000.dcm")
    contours.SOPClassUID = contours.file_meta.MediaStorageSOPClassUID = (
        "1.2.840.10008.5.1.4.1.1.481.3"
    )
    contours.save_as(third / "RS.dcm")
    (third / "torn.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\1" * 40)
    assert prepared(tmp_path / "out", source) == 3, capsys.readouterr()
    text = report(tmp_path / "out")
    for code in ("DAT-164", "DAT-198", "DAT-128"):
        assert f"[{code}]" in text, text
    assert len(manifest(tmp_path / "out")) == 1


def test_names_that_do_not_pair_are_named_and_numbers_are_no_structures(tmp_path):
    for name in (
        *("A/p1.png", "A/p1_2.png", "A/p1_disc.png", "A/p1_2_disc.png"),
        *("A/q.png", "B/img_3.png", "B/mask_3.png", "B/label_9.png"),
        *("C/pat/image.png", "C/pat/mask.png", "C/other/scan.png", "C/other/cup.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    layout = pairs.recognise(tmp_path, sorted(tmp_path.rglob("*.png")))
    found = {
        (line.site, line.name): [
            (name, path.relative_to(tmp_path).as_posix()) for name, path in line.structures
        ]
        or line.mask.relative_to(tmp_path).as_posix()
        for line in layout.lines
    }
    assert found == {
        ("A", "p1"): [("disc", "A/p1_disc.png")],
        ("A", "p1_2"): [("disc", "A/p1_2_disc.png")],
        ("B", "3"): "B/mask_3.png",
        ("C", "pat"): "C/pat/mask.png",
        ("C", "other"): [("cup", "C/other/cup.png")],
    }
    assert [(one.code, one.found) for one in layout.problems] == [
        ("DAT-127", "1 image without a mask: q.png"),
        ("DAT-127", "1 mask without an image: label_9.png"),
    ]


def test_a_structure_without_a_file_is_no_empty_structure(tmp_path, capsys):
    source = walks.photographs(tmp_path / "photos", cases=2)
    (source / "Anna/1_vessel.png").unlink()
    assert prepared(tmp_path / "out", source) == 3
    text = report(tmp_path / "out")
    assert "[DAT-165]" in text
    assert "found: masks of lesion" in text
    assert len(manifest(tmp_path / "out")) == 5


@pytest.mark.parametrize("dicom", [False, True])
def test_cases_in_the_documented_form_are_prepared_with_their_structures(tmp_path, dicom, capsys):
    rng = np.random.default_rng(0)
    for site in ("A", "B"):
        voxels = rng.integers(0, 900, (20, 18, 4)).astype(np.uint16)
        affine = np.diag([-1.0, -1.0, 3.0, 1.0])
        folder = tmp_path / "raw" / site
        folder.mkdir(parents=True)
        if dicom:
            write_series(folder / "a_image", voxels, affine)
        else:
            nib.save(nib.Nifti1Image(voxels, affine), folder / "a_image.nii.gz")
        disc = np.zeros(voxels.shape, np.uint8)
        disc[4:14, 4:14, 1:3] = 1
        cup = np.zeros_like(disc)
        cup[6:9, 6:9, 1] = 1
        for name, mask in (("disc", disc), ("cup", cup)):
            nib.save(nib.Nifti1Image(mask, affine), folder / f"a_mask_{name}.nii.gz")
    out = tmp_path / "out"
    assert prepared(out, tmp_path / "raw", "--link") == 0, capsys.readouterr()
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert settings["classes"] == {"background": [0], "disc_only": [1], "cup": [2]}
    assert settings["structures"] == {"cup": ["cup"], "disc": ["disc_only", "cup"]}
    for store, _ in stores(out, tmp_path / "cache"):
        (case,) = store.cases
        wanted = read_volume(tmp_path / "raw/A/a_mask_disc.nii.gz", mask=True).array
        wanted = wanted + read_volume(tmp_path / "raw/A/a_mask_cup.nii.gz", mask=True).array
        np.testing.assert_array_equal(store.truth(case), wanted)
