"""Predict in every format: the mask in place, mirrored, resumable, and marked if it was trained."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fedsgcg.clients.predict.record import RECORD
from fedsgcg.common.images import segmentation
from fedsgcg.common.images.contents import TRAINING_IMAGES, content_hash, salted_content
from fedsgcg.common.images.read import check_geometry, read_volume, segments_of
from fedsgcg.deploy.cli.site import main
from tests.support.dicoms import write_series
from tests.support.formats import WITHOUT_ORIENTATION, WRITERS, write_itk, write_nifti
from tests.support.predictions import store

AFFINE = np.diag([-0.7, -0.8, 3.0, 1.0])
AFFINE[:3, 3] = 5, -6, 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network with random weights, which finds something in noise."""
    return store(tmp_path_factory.mktemp("m") / "model", "data.largest_component=false")


def predict(*arguments):
    return main(["predict", *map(str, arguments), "--device", "cpu", "--threads", "1"])


def voxels(seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(6, 6, 4)).repeat(6, 0).repeat(7, 1)
    return ((smooth - smooth.min()) * 300).astype(np.uint16)


def labels_of(path, image):
    if path.suffix == ".dcm":
        layers = segments_of(path, image)
        return (layers.masks * np.array([1]).reshape(-1, 1, 1, 1)).sum(0)
    mask = read_volume(path, mask=True)
    check_geometry(image, mask, str(path))
    return mask.array


def test_every_format_gets_the_same_mask_in_place_and_folders_are_mirrored(model, tmp_path):
    native = voxels()
    images, out = tmp_path / "images", tmp_path / "out"
    results = {}
    for name, write in {**WRITERS, **WITHOUT_ORIENTATION}.items():
        folder = images / f"{name.replace('.', '_')}/deep"
        folder.mkdir(parents=True)
        # ANALYZE counts y to the front.
        write(folder / name, native[:, ::-1] if name == "a.hdr" else native, AFFINE)
        stem = name.partition(".")[0]
        suffix = ".dcm" if name == "series" else name[len(stem) :]
        results[folder / name] = out / folder.relative_to(images) / f"{stem}_mask{suffix}"
    assert predict(model, images, "-o", out, "--probability") == 0
    wanted = None
    for path, result in results.items():
        image = read_volume(path)
        labels = labels_of(result, image)
        wanted = labels if wanted is None else wanted
        np.testing.assert_array_equal(labels, wanted, err_msg=str(path))
        mapped = result.name.replace("_mask", "_probability")
        if result.suffix in (".dcm", ".hdr", ".tif"):
            mapped = mapped.replace(result.suffix, ".nii.gz")
        check_geometry(image, read_volume(result.with_name(mapped)), mapped)
    assert 0 < wanted.mean() < 1, "a mask of one value proves nothing about its place"


@pytest.mark.parametrize(
    ("form", "suffix"),
    [("nifti", ".nii.gz"), ("metaimage", ".mha"), ("nrrd", ".nrrd"), ("dicom-seg", ".dcm")],
)
def test_a_mask_can_have_another_format(model, tmp_path, form, suffix, capsys):
    write_series(tmp_path / "s", voxels(), AFFINE)
    assert predict(model, tmp_path / "s", "-o", tmp_path / "same") == 0
    assert predict(model, tmp_path / "s", "-o", tmp_path / "o", "--out-format", form) == 0
    image = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(
        labels_of(tmp_path / f"o/s_mask{suffix}", image),
        labels_of(tmp_path / "same/s_mask.dcm", image),
    )
    write_nifti(tmp_path / "a.nii.gz", voxels(), AFFINE)
    code = predict(model, tmp_path / "a.nii.gz", "-o", tmp_path / "n", "--out-format", form)
    assert code == (1 if form == "dicom-seg" else 0)
    assert ("[MOD-812]" in capsys.readouterr().out) == (form == "dicom-seg")


def test_masks_next_to_images_are_not_predicted(model, tmp_path):
    data = tmp_path / "data"
    write_series(data / "a_image", voxels(), AFFINE)
    image = read_volume(data / "a_image")
    classes = np.ones(image.array.shape, np.uint8)
    segmentation.write(data / "a_mask.dcm", classes, ["background", "gland"], image, model="x")
    write_itk(data / "b_image.mha", voxels(1), AFFINE)
    (data / "b_mask").mkdir()
    write_itk(data / "b_mask/gland.mha", voxels(1), AFFINE)
    write_itk(data / "c_image.mha", voxels(2), AFFINE)
    write_itk(data / "c_mask_gland.mha", voxels(2), AFFINE)
    assert predict(model, data, "-o", tmp_path / "out") == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["a_mask.dcm", "b_mask.mha", "c_mask.mha", RECORD]


def test_scores_of_a_series_with_a_segmentation_and_the_mark_of_training(model, tmp_path, capsys):
    data = tmp_path / "data/A"
    write_series(data / "a_image", voxels(), AFFINE)
    image = read_volume(data / "a_image")
    classes = (image.array > 900).astype(np.uint8)
    segmentation.write(data / "a_mask.dcm", classes, ["background", "gland"], image, model="x")
    trained = tmp_path / "model"
    shutil.copytree(model, trained)
    salt = "ab" * 32
    # The model was trained on the same image as NIfTI.
    write_nifti(tmp_path / "t.nii.gz", voxels(), AFFINE)
    mark = salted_content(content_hash(read_volume(tmp_path / "t.nii.gz")), salt)
    known = {"salt": salt, "images": {"North": [mark]}}
    (trained / TRAINING_IMAGES).write_text(json.dumps(known))
    call = (trained, "--data", tmp_path / "data", "-o", tmp_path / "out")
    assert predict(*call) == 0
    shown = capsys.readouterr().out
    assert "TRAINED ON (at North)" in shown
    first = (tmp_path / "out/scores.csv").read_text()
    assert "North" in first
    assert predict(*call, "--resume") == 0
    again = capsys.readouterr().out
    assert "done earlier, unchanged" in again
    assert "TRAINED ON (at North)" in again
    assert (tmp_path / "out/scores.csv").read_text() == first


def test_resuming_is_by_content(model, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(5):
        write_itk(images / f"c{number}.mha", voxels(number), AFFINE)
    assert predict(model, images, "-o", out) == 0
    whole = {path.name: path.read_bytes() for path in out.glob("*.mha")}
    capsys.readouterr()
    assert predict(model, images, "-o", out) == 2, "results are not replaced unasked"
    assert "--resume" in capsys.readouterr().err
    lines = (out / RECORD).read_text().splitlines()
    kept = [line for line in lines if '"c3"' not in line or '"files"' not in line]
    (out / RECORD).write_text("\n".join(kept) + '\n{"name": "c4", "requ')  # as after a kill
    (out / "c1_mask.mha").write_bytes(whole["c1_mask.mha"][:100])  # half of a file
    (out / "c2_mask.mha").unlink()
    write_itk(images / "c0.mha", voxels(9), AFFINE)  # another image
    assert predict(model, images, "-o", out, "--resume") == 0
    shown = capsys.readouterr().out
    done = [line for line in shown.splitlines() if "done earlier" in line]
    assert [line.split()[1] for line in done] == ["c4.mha"]
    assert "5 of 5 images predicted, 1 of them earlier and unchanged" in shown
    for name in ("c1_mask.mha", "c2_mask.mha", "c3_mask.mha", "c4_mask.mha"):
        assert (out / name).read_bytes() == whole[name], name
    assert (out / "c0_mask.mha").read_bytes() != whole["c0_mask.mha"]
    other = ("--probability",)  # other options are another run
    assert predict(model, images, "-o", out, "--resume", *other) == 2
    assert predict(model, images, "-o", out, "--resume") == 0
    assert "5 of them earlier" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_is_completed_by_the_same_call(model, tmp_path):
    images = tmp_path / "images"
    for number in range(12):
        write_series(images / f"p{number}/t2", voxels(number), AFFINE)
    run = "from fedsgcg.deploy.cli.site import main; import sys; sys.exit(main(sys.argv[1:]))"
    call = ["predict", str(model), str(images), "-o", str(tmp_path / "out"), "--resume"]
    call += ["--device", "cpu", "--threads", "1", "--out-format", "metaimage"]
    process = subprocess.Popen([sys.executable, "-c", run, *call], stdout=subprocess.DEVNULL)
    record = tmp_path / "out" / RECORD
    while process.poll() is None and not (record.is_file() and b'"files"' in record.read_bytes()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(call) == 0
    whole = tmp_path / "whole"
    assert predict(model, images, "-o", whole, "--out-format", "metaimage") == 0
    wanted = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*.mha")}
    found = {
        path.relative_to(tmp_path / "out"): path.read_bytes()
        for path in (tmp_path / "out").rglob("*.mha")
        if ".part-" not in str(path)
    }
    assert found == wanted
    assert len(found) == 12


def test_results_of_pairs_are_complete_pairs(model, tmp_path):
    write_itk(tmp_path / "a.mhd", voxels(), AFFINE)
    assert predict(model, tmp_path / "a.mhd", "-o", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a_mask.mhd", "a_mask.zraw", RECORD}
    entry = json.loads((tmp_path / "out" / RECORD).read_text().splitlines()[-1])
    assert set(entry["files"]) == {"a_mask.mhd", "a_mask.zraw"}
