"""Prediction of real folders: whatever one image does, the others are predicted."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest

from fedsgcg.clients.predict.files import Job, check_output, jobs_of_images
from fedsgcg.clients.predict.predictor import Predictor
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.cli.site import main
from tests.support.predictions import code_of, store, touch


@pytest.fixture
def stored(tmp_path):
    """A small model of volumes."""
    return store(tmp_path / "m")


def nifti():
    """Bytes of a small volume with a header of its own."""
    array = np.random.default_rng(0).normal(100, 20, (20, 24, 3)).astype(np.float32)
    image = nib.Nifti1Image(array, np.diag([-0.8, -0.8, 3, 1]))
    image.header["descrip"] = b"scanner"
    return image.to_bytes()


def predicted(stored, folder, out, *more):
    return main(
        [
            "predict",
            str(stored),
            str(folder),
            "-o",
            str(out),
            "--device",
            "cpu",
            "--threads",
            "1",
            *more,
        ]
    )


def test_files_with_a_wrong_gzip_suffix_are_predicted_like_the_others(stored, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    packed = gzip.compress(nifti())
    for name, content in {
        "a.nii.gz": packed,
        "b.nii.gz": nifti(),
        "c.nii": packed,
        "D.Nii.Gz": nifti(),
    }.items():
        (folder / name).write_bytes(content)
    (folder / "e.nii.gz").write_bytes(packed[:100])
    assert predicted(stored, folder, out, "--probability") == 3
    told = capsys.readouterr().out
    assert "4 of 5 images predicted" in told
    assert "[DAT-103]" in told
    masks = [
        nib.load(out / name)
        for name in ("a_mask.nii.gz", "b_mask.nii.gz", "c_mask.nii", "D_mask.nii.gz")
    ]
    for mask in masks:
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(masks[0].dataobj))
        assert mask.header["descrip"].item() == b"scanner"
        assert mask.shape == (20, 24, 3)


def test_whatever_one_image_does_the_others_are_predicted(stored, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.nii", "b.nii", "c.nii"):
        (folder / name).write_bytes(nifti())
    real = Predictor.predict

    def odd(self, path, series):
        if path.name == "b.nii":
            raise KeyError("a bug of a library")
        return real(self, path, series)

    monkeypatch.setattr(Predictor, "predict", odd)
    assert predicted(stored, folder, out) == 3
    results = sorted(path.name for path in out.iterdir())
    assert results == ["a_mask.nii", "c_mask.nii", "predictions.jsonl"]
    told = capsys.readouterr().out
    assert "[MOD-810]" in told
    assert "KeyError: 'a bug of a library'" in told
    assert "b.nii" in told


def test_an_image_that_is_called_image_writes_inside_the_folder(stored, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "deep" / "masks"
    folder.mkdir()
    for name in ("_image.nii", "__image.nii.gz"):
        (folder / name).write_bytes(nifti())
    for image in folder.iterdir():
        assert predicted(stored, image, out) == 0
    results = sorted(path.name for path in out.iterdir())
    assert results == ["__mask.nii.gz", "_image_mask.nii", "predictions.jsonl"]
    assert [path.name for path in out.parent.iterdir()] == ["masks"]


def test_results_outside_the_folder_are_refused(tmp_path):
    job = Job(tmp_path / "x.nii", "../x")
    assert code_of(check_output, tmp_path / "out", [job], ["_mask"], overwrite=True) == "MOD-808"
    assert not (tmp_path / "out").exists()


def test_names_without_utf8_and_names_that_are_too_long(stored, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in (os.fsdecode(b"M\xfcller.nii"), "x" * 249 + ".nii"):
        (folder / name).write_bytes(nifti())
    assert predicted(stored, folder, out) == 3
    told = capsys.readouterr().out
    assert "M%FCller.nii" in told
    assert "Shorten the name" in told
    names = sorted(os.fsencode(path.name) for path in out.iterdir())
    assert names == [b"M\xfcller_mask.nii", b"predictions.jsonl"]
    assert predicted(stored, folder, out, "--resume") == 3
    assert "1 of them earlier and unchanged" in capsys.readouterr().out


def test_a_linked_patient_is_predicted_and_other_formats_are_counted(tmp_path):
    touch(
        tmp_path / "data/a.nii",
        tmp_path / "data/b.mgz",
        tmp_path / "data/._a.nii",
        tmp_path / "elsewhere/P2/c.nii",
    )
    (tmp_path / "data/P2").symlink_to(tmp_path / "elsewhere/P2")
    jobs, skipped = jobs_of_images([tmp_path / "data"])
    assert [job.name for job in jobs] == ["P2/c", "a"]
    first, second = skipped.texts()
    assert first.startswith(
        "1 file in unsupported formats (.mgz 1): b.mgz. Convert it with FreeSurfer"
    )
    assert second == "1 hidden file named like images: ._a.nii"
    (tmp_path / "only").mkdir()
    touch(tmp_path / "only/x.par")
    with pytest.raises(FedsgcgError, match="dcm2niix"):
        jobs_of_images([tmp_path / "only"])


def test_masks_of_the_models_structures_are_no_images(tmp_path):
    names = ("a/1.png", "a/1_Cup.png", "a/1_rim.png", "a/2_cup.png", "cup/1.png", "b/cup/1.png")
    touch(*(tmp_path / name for name in names))
    jobs, skipped = jobs_of_images([tmp_path], structures=("disc", "cup"))
    assert [job.name for job in jobs] == ["a/1", "a/1_rim", "a/2_cup"]
    assert len(skipped.results) == 3
    (job,), _ = jobs_of_images([tmp_path / "cup"], structures=("disc", "cup"))
    assert job.image == tmp_path / "cup/1.png"  # the folder that was asked for
