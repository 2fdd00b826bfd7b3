"""Damaged files of a site: each case is left out with its reason, and the others are used."""

import errno
import json
import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsgcg.clients.data import store as cases_module
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.errors import CODES, FedsgcgError
from fedsgcg.common.images.read import read_volume, write_volume

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


def image(z=3):
    return np.random.default_rng(0).integers(1, 900, (z, 32, 32)).astype(np.int16)


def mask(z=3):
    labels = np.zeros((z, 32, 32), np.uint8)
    labels[1:, 8:20, 8:20] = 1
    return labels


def write(folder, name, pixels=None, labels=None, affine=AFFINE, mask_affine=None):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = image() if pixels is None else pixels
    pixels = pixels + np.array(
        sum(name.encode()), pixels.dtype
    )  # one image twice would be left out
    write_volume(folder / f"{name}_image.nii.gz", pixels, affine)
    if labels is not False:
        labels = mask() if labels is None else labels
        write_volume(
            folder / f"{name}_mask.nii.gz", labels, affine if mask_affine is None else mask_affine
        )


def spoil(root):
    """Write two good cases and one per kind of damage; return the expected code of each case."""
    site = root / "S"
    write(site, "good1")
    write(site, "good2")
    write(site, "shape", labels=mask(2))
    shifted = AFFINE.copy()
    shifted[0, 3] = 5
    write(site, "affine", mask_affine=shifted)
    write(site, "nan", pixels=np.where(np.arange(32) == 3, np.nan, image()).astype(np.float32))
    write(site, "constant", pixels=np.full((3, 32, 32), 7, np.int16))
    write(site, "label", labels=mask() * 4)
    write(site, "empty", labels=mask() * 0)
    write(site, "nomask", labels=False)
    write(site, "cut")
    cut = site / "cut_image.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-200])
    write(site, "zero")
    (site / "zero_mask.nii.gz").write_bytes(b"")
    write(site, "text")
    (site / "text_image.nii.gz").write_text("no image at all")
    write(site, "time")
    nib.save(nib.Nifti1Image(np.ones((32, 32, 3, 4), np.int16), AFFINE), site / "time_image.nii.gz")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(site / "picture_image.png")
    (site / "picture_mask.png").write_bytes((site / "picture_image.png").read_bytes()[:40])
    return {
        "shape": "DAT-104",
        "affine": "DAT-105",
        "nan": "DAT-107",
        "constant": "DAT-108",
        "label": "DAT-109",
        "empty": "DAT-110",
        "nomask": "DAT-112",
        "cut": "DAT-103",
        "zero": "DAT-103",
        "text": "DAT-103",
        "time": "DAT-106",
        "picture": "DAT-103",
    }


@pytest.fixture
def data(make_data):
    return make_data(image_size=32, validation_fraction=0.0)


@pytest.mark.row(41, 42, 43, 44)
def test_each_bad_case_is_left_out_for_its_reason_and_the_rest_goes_on(tmp_path, data):
    expected = spoil(tmp_path)
    store = open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=False)
    assert [case.name for case in store.cases] == ["empty", "good1", "good2"], (
        "a healthy patient is used"
    )
    assert {problem.where: problem.code for problem in store.problems} == expected
    for problem in store.problems:
        assert problem.found, problem
        assert problem.expected, problem
        assert problem.action, problem
    assert len(store.slices("train")) == 9
    foreground = replace(data, train_slices="foreground")
    chosen = open_store(
        open_site(tmp_path, "S", data), foreground, tmp_path / "cache", heldout=False
    ).slices("train")
    assert set(chosen.case_of.tolist()) == {1, 2}, "of a healthy patient no slice holds a structure"


def test_a_held_out_site_keeps_the_empty_mask_and_says_so(tmp_path, data):
    spoil(tmp_path)
    store = open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=True)
    assert [(case.name, case.has_foreground) for case in store.cases] == [
        ("empty", False),
        ("good1", True),
        ("good2", True),
    ]
    (empty,) = [problem for problem in store.problems if problem.code == "DAT-110"]
    assert "evaluated" in empty.action


def test_problems_are_remembered_with_the_cache(tmp_path, data):
    spoil(tmp_path)
    site = open_site(tmp_path, "S", data)
    first, second = (
        open_store(site, data, tmp_path / "cache", heldout=False).problems for _ in range(2)
    )
    assert first == second
    assert len(list((tmp_path / "cache" / "slices").glob("*.arrow"))) == 1


def test_a_repaired_case_is_used_again(tmp_path, data):
    spoil(tmp_path)
    open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=False)
    write(tmp_path / "S", "cut")
    store = open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=False)
    assert [case.name for case in store.cases] == ["cut", "empty", "good1", "good2"]


def test_a_site_without_a_usable_case_refuses_with_every_reason(tmp_path, data):
    write(tmp_path / "S", "a", labels=mask() * 4)
    write(tmp_path / "S", "b", labels=mask() * 3)
    (tmp_path / "S" / "c_image.nii.gz").write_bytes(b"x")
    with pytest.raises(FedsgcgError) as caught:
        open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=False)
    assert caught.value.code == "DAT-102"
    assert sorted(problem.code for problem in caught.value.problems) == [
        "DAT-102",
        "DAT-109",
        "DAT-109",
        "DAT-112",
    ]


def test_a_site_of_healthy_patients_takes_part(tmp_path, data):
    """Masks without a structure are true negatives: they train, and they do not drop the site."""
    for name in ("a", "b"):
        write(tmp_path / "S", name, labels=mask() * 0)
    store = open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=False)
    assert [case.has_foreground for case in store.cases] == [False, False]
    assert [problem.code for problem in store.problems] == ["DAT-110", "DAT-110"]
    assert len(store.slices("train")) == 6


def test_a_held_out_site_whose_manifest_has_no_test_case_refuses(tmp_path, data):
    write(tmp_path / "S", "a")
    (tmp_path / "manifest.csv").write_text(
        "site,image,mask,split\nS,S/a_image.nii.gz,S/a_mask.nii.gz,train\n"
    )
    site = open_site(tmp_path, "S", data)
    assert open_store(site, data, tmp_path / "cache", heldout=False).cases[0].split == "train"
    with pytest.raises(FedsgcgError, match="none in the test split"):
        open_store(site, data, tmp_path / "cache", heldout=True)


def test_what_crosses_the_wire_names_no_patient(tmp_path, data):
    write(tmp_path / "S", "JohnDoe", labels=mask() * 4)
    with pytest.raises(FedsgcgError) as caught:
        open_store(open_site(tmp_path, "S", data), data, tmp_path / "cache", heldout=False)
    assert "JohnDoe" in str(caught.value)
    assert caught.value.public() in CODES
    assert "JohnDoe" not in caught.value.public()


def test_a_file_that_vanishes_after_listing_is_left_out(tmp_path, data):
    write(tmp_path / "S", "a")
    write(tmp_path / "S", "b")
    site = open_site(tmp_path, "S", data)
    (tmp_path / "S" / "a_image.nii.gz").unlink()
    store = open_store(site, data, tmp_path / "cache", heldout=False)
    assert [case.name for case in store.cases] == ["b"]
    assert [(problem.code, problem.where) for problem in store.problems] == [("DAT-103", "a")]


# the cache itself


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_cache_file_is_built_again(tmp_path, data, damage):
    write(tmp_path / "S", "a")
    site = open_site(tmp_path, "S", data)
    before = open_store(site, data, tmp_path / "cache", heldout=False).slices("train").stack([1])
    (file,) = (tmp_path / "cache" / "slices").glob("*.arrow")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2] if damage is None else damage)
    after = open_store(site, data, tmp_path / "cache", heldout=False).slices("train").stack([1])
    np.testing.assert_array_equal(before[0], after[0])


@pytest.mark.parametrize("memo", ["{", "[1]", json.dumps({"x": [1]}), json.dumps({"x": 3})])
def test_a_damaged_memo_of_hashes_is_ignored(tmp_path, data, memo):
    write(tmp_path / "S", "a")
    site = open_site(tmp_path, "S", data)
    open_store(site, data, tmp_path / "cache", heldout=False)
    (file,) = (tmp_path / "cache" / "hashes").glob("*.json")
    file.write_text(memo)
    assert len(open_store(site, data, tmp_path / "cache", heldout=False).cases) == 1


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, data):
    write(tmp_path / "S", "a")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FedsgcgError) as caught:
        open_store(open_site(tmp_path, "S", data), data, tmp_path / "file", heldout=False)
    assert caught.value.code == "DAT-113"
    assert str(tmp_path / "file") in caught.value.problems[0].where


def test_a_full_disk_leaves_no_half_written_cache(tmp_path, data, monkeypatch):
    """The disk fills while the second case is written; once there is room the same call works."""
    for name in ("a", "b"):
        write(tmp_path / "S", name)
    site = open_site(tmp_path, "S", data)
    record, calls = cases_module._record, []

    def full(case, *rest):
        calls.append(case.name)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return record(case, *rest)

    monkeypatch.setattr(cases_module, "_record", full)
    with pytest.raises(FedsgcgError, match="No space left") as caught:
        open_store(site, data, tmp_path / "cache", heldout=False)
    assert caught.value.code == "DAT-113"
    assert [path.suffix for path in (tmp_path / "cache" / "slices").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert len(open_store(site, data, tmp_path / "cache", heldout=False).cases) == 2


# any bytes at all


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    nifti = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    nib.save(nifti, folder / "a.nii.gz")
    nib.save(nifti, folder / "a.nii")
    nib.save(
        nib.Nifti2Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE), folder / "b.nii"
    )
    for suffix in ("png", "jpg", "bmp", "tif"):
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(
            folder / f"a.{suffix}"
        )
    return folder


def outcome(path):
    """Return what reading gives, or the code of the error."""
    try:
        volume = read_volume(path)
    except FedsgcgError as error:
        return error.code
    return f"{volume.array.dtype} {volume.array.ndim}-D"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
    cut=st.booleans(),
)
@pytest.mark.row(41)
def test_law_a_spoiled_file_is_read_or_refused_with_a_code(samples, tmp_path, edits, keep, cut):
    """Whatever bytes a file holds, reading it ends in a volume or in one of our errors."""
    for sample in sorted(samples.iterdir()):
        content = bytearray(sample.read_bytes())
        for place, value in edits:
            content[place % len(content)] = value
        spoiled = tmp_path / sample.name
        spoiled.write_bytes(bytes(content[: int(len(content) * keep)] if cut else content))
        assert outcome(spoiled) in ("float32 3-D", "DAT-103", "DAT-106")
