"""Cases in every format and layout give the same slices; doubtful cases are refused by name."""

import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import data_warnings, discover_sites, open_site
from fedsgcg.clients.data.store import data_fingerprint, open_store
from fedsgcg.clients.guard.policy import only_inside_data_root
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images import segmentation
from fedsgcg.common.images.read import read_volume, slices_in
from tests.support.formats import write_analyze, write_dicom, write_itk, write_nifti

AFFINE = np.diag([-0.7, -0.8, 3.0, 1.0])


def voxels(seed):
    native = np.random.default_rng(seed).integers(0, 2000, (16, 18, 4)).astype(np.uint16)
    labels = np.zeros(native.shape, np.uint16)
    labels[4:12, 5:13, 1:3], labels[7:10, 8:10, 2] = 1, 2
    return native, labels


def data_of(make_data, **changes):
    return make_data(
        "synthetic",
        classes={"background": [0], "rim": [1], "cup": [2]},
        structures={"disc": ["rim", "cup"], "cup": ["cup"]},
        image_size=32,
        **changes,
    )


def policy_of(root):
    folder = root.parent / "kit"
    facts = {
        **{name: str(folder / name) for name in ("home", "cache", "ca", "key", "approved")},
        "site": "A",
        "project": "test",
        "server": "127.0.0.1:1",
        "data_root": str(root),
    }
    return SiteFile(**facts)


def write_layouts(root):
    """Write the same case in one hospital for each layout."""
    native, labels = voxels(0)
    disc, cup = (labels > 0).astype(np.uint16), (labels == 2).astype(np.uint16)
    for name in ("nifti", "itk", "dicom", "dicom_folder", "files", "folder"):
        (root / name).mkdir(parents=True)
    write_nifti(root / "nifti/a_image.nii.gz", native, AFFINE)
    write_nifti(root / "nifti/a_mask.nii.gz", labels, AFFINE)
    write_itk(root / "itk/a_image.mhd", native, AFFINE)
    write_itk(root / "itk/a_mask.nrrd", labels, AFFINE)
    for site, mask in (("dicom", "a_mask.dcm"), ("dicom_folder", "a_mask/export.dcm")):
        write_dicom(root / site / "a_image", native, AFFINE)
        image = read_volume(root / site / "a_image")
        (root / site / mask).parent.mkdir(exist_ok=True)
        classes = labels.transpose(2, 1, 0).astype(np.uint8)
        names = ["background", "rim", "cup"]
        segmentation.write(root / site / mask, classes, names, image, model="hand")
    write_nifti(root / "files/a_image.nii.gz", native, AFFINE)
    write_nifti(root / "files/a_mask_disc.nii.gz", disc, AFFINE)
    write_itk(root / "files/a_mask_Cup.mha", cup, AFFINE)
    write_nifti(root / "folder/a_image.nii.gz", native, AFFINE)
    (root / "folder/a_mask").mkdir()
    write_nifti(root / "folder/a_mask/a_disc.nii.gz", disc, AFFINE)
    write_nifti(root / "folder/a_mask/cup.nii.gz", cup * 255, AFFINE)
    return native, labels


def test_one_case_in_every_layout_gives_the_same_slices(tmp_path, make_data):
    _, labels = write_layouts(tmp_path / "data")
    data = data_of(make_data)
    stores = []
    for name in discover_sites(tmp_path / "data"):
        site = open_site(tmp_path / "data", name, data)
        assert (site.quarantined, site.notes) == ((), ()), name
        assert slices_in(site.cases[0].image) == 4
        stores.append(open_store(site, data, tmp_path / "cache", heldout=True))
    assert len(stores) == 6
    first = stores[0]
    for store in stores:
        assert store.problems == ()
        case = store.cases[0]
        assert (case.name, case.content) == ("a", first.cases[0].content)
        np.testing.assert_allclose(case.spacing, (3.0, 0.8, 0.7), rtol=1e-5)
        np.testing.assert_array_equal(store.truth(case), labels.transpose(2, 1, 0))
        np.testing.assert_array_equal(store.stored[0].image, first.stored[0].image)
        np.testing.assert_array_equal(store.stored[0].label, first.stored[0].label)


def test_a_table_can_name_folders_and_files_of_every_layout(tmp_path, make_data):
    _, labels = write_layouts(tmp_path)
    lines = ["site,image,mask"]
    for site, image, mask in (
        ("itk", "a_image.mhd", "a_mask.nrrd"),
        ("dicom", "a_image", "a_mask.dcm"),
        ("dicom_folder", "a_image", "a_mask"),
        ("folder", "a_image.nii.gz", "a_mask"),
    ):
        lines.append(f"{site},{site}/{image},{site}/{mask}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    data = data_of(make_data)
    for name in discover_sites(tmp_path):
        site = open_site(tmp_path, name, data)
        store = open_store(site, data, tmp_path / "cache", heldout=True)
        assert (store.problems, store.cases[0].name) == ((), "a")
        np.testing.assert_array_equal(store.truth(store.cases[0]), labels.transpose(2, 1, 0))
    (tmp_path / "itk/a_mask.nrrd").unlink()
    for path in (tmp_path / "dicom/a_image").iterdir():
        path.unlink()
    for name in ("itk", "dicom"):
        (problem,) = open_site(tmp_path, name, data).quarantined
        assert problem.code == "DAT-103"


def test_disc_and_cup_as_two_binary_pictures_in_a_table(tmp_path, make_data):
    rng = np.random.default_rng(0)
    disc = np.zeros((20, 22), np.uint8)
    disc[4:16, 4:18] = 255
    cup = np.zeros_like(disc)
    cup[8:12, 8:12] = 1
    lines = ["site,image,Mask_Disc,mask_cup,patient_id"]
    for name in ("p1", "p2"):
        pixels = rng.integers(0, 255, (20, 22, 3)).astype(np.uint8)
        for folder, array in (("img", pixels), ("disc", disc), ("cup", cup)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
        lines.append(f"A,img/{name}.png,disc/{name}.png,cup\\{name}.png,{name}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    data = data_of(make_data, stack=1, intensity="fixed", spacing_unit="pixel")
    site = open_site(tmp_path, "A", data)
    store = open_store(site, data, tmp_path / "cache", heldout=True)
    wanted = (disc > 0).astype(int) + (cup > 0)
    for case in store.cases:
        np.testing.assert_array_equal(store.truth(case)[0], wanted)
    other = data_of(make_data, stack=1, intensity="fixed", spacing_unit="pixel")
    swapped = other.structures | {"disc": ["cup"], "cup": ["rim", "cup"]}
    exchanged = data_of(make_data, stack=1, intensity="fixed")
    object.__setattr__(exchanged, "structures", swapped)
    with pytest.raises(FedsgcgError) as caught:  # not the slices of the other meaning
        open_store(site, exchanged, tmp_path / "cache", heldout=True)
    assert {problem.code for problem in caught.value.problems[1:]} == {"DAT-166"}
    (tmp_path / "cup/p2.png").unlink()
    (problem,) = open_site(tmp_path, "A", data).quarantined
    assert (problem.code, problem.where) == ("DAT-103", "p2")


def test_a_case_in_two_formats_is_left_out_and_named(tmp_path, make_data):
    native, labels = voxels(0)
    (tmp_path / "A").mkdir()
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / f"A/{name}_image.nii.gz", native + len(name), AFFINE)
        write_nifti(tmp_path / f"A/{name}_mask.nii.gz", labels, AFFINE)
    write_itk(tmp_path / "A/a_image.mha", native, AFFINE)
    write_itk(tmp_path / "A/b_mask_cup.mha", labels, AFFINE)
    site = open_site(tmp_path, "A", data_of(make_data))
    assert [case.name for case in site.cases] == ["c"]
    assert [(one.code, one.where) for one in site.quarantined] == [
        ("DAT-167", "a"),
        ("DAT-167", "b"),
    ]
    assert "a_image.mha" in site.quarantined[0].found


def test_mixed_formats_of_a_hospital_are_a_note(tmp_path, make_data):
    (tmp_path / "A").mkdir()
    for number, (suffix, write) in enumerate(
        ((".nii.gz", write_nifti), (".mha", write_itk), (".hdr", write_analyze))
    ):
        native, labels = voxels(number)
        write(tmp_path / f"A/c{number}_image{suffix}", native, AFFINE)
        write(tmp_path / f"A/c{number}_mask{suffix}", labels, AFFINE)
    (note,) = open_site(tmp_path, "A", data_of(make_data)).notes
    assert note.code == "DAT-168"
    assert "NIfTI 1, MetaImage 1, ANALYZE" in note.found
    assert [problem.code for problem in data_warnings(tmp_path, ["A"])] == ["DAT-168"]


def test_data_next_to_a_header_count_for_the_fingerprint_and_must_be_inside(tmp_path, make_data):
    native, labels = voxels(0)
    (tmp_path / "data/A").mkdir(parents=True)
    write_itk(tmp_path / "data/A/a_image.mhd", native, AFFINE)
    write_itk(tmp_path / "data/A/a_mask.mhd", labels, AFFINE)
    data = data_of(make_data)

    def taken():
        return data_fingerprint(tmp_path / "data", ["A"], data, tmp_path / "cache")

    before = taken()
    raw = tmp_path / "data/A/a_image.raw"
    raw.write_bytes(raw.read_bytes()[::-1])
    assert taken() != before
    policy = policy_of(tmp_path / "data")
    site = open_site(tmp_path / "data", "A", data)
    assert len(only_inside_data_root(site, policy).cases) == 1
    raw.rename(tmp_path / "outside.raw")
    header = tmp_path / "data/A/a_image.mhd"
    header.write_text(header.read_text().replace("a_image.raw", "../../outside.raw"))
    site = open_site(tmp_path / "data", "A", data)
    (problem,) = only_inside_data_root(site, policy).quarantined
    assert problem.code == "POL-702"


def test_a_series_without_a_place_in_the_layout_is_a_note(tmp_path, make_data):
    native, labels = voxels(0)
    (tmp_path / "A").mkdir()
    write_nifti(tmp_path / "A/a_image.nii.gz", native, AFFINE)
    write_nifti(tmp_path / "A/a_mask.nii.gz", labels, AFFINE)
    write_dicom(tmp_path / "A/export", native, AFFINE)
    (note,) = open_site(tmp_path, "A", data_of(make_data)).notes
    assert note.code == "DAT-119"
    assert "1 folder of DICOM files not named <case>_image: export" in note.found
