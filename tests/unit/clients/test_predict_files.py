"""Files of a prediction: where results lie, their names, and nothing written over unasked."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.predict.files import Job, check_output, jobs_of_images
from fedsgcg.common.images.read import affine_as, read_volume, write_volume
from fedsgcg.common.images.write import mask_bytes, wide_bytes, write_like
from tests.support.predictions import code_of, touch

# geometry


@pytest.mark.parametrize(
    "codes", [("L", "P", "S"), ("R", "A", "S"), ("P", "S", "L"), ("I", "R", "A")]
)
def test_what_is_written_lies_where_its_image_lies(codes, tmp_path):
    rng = np.random.default_rng(1)
    array = rng.integers(0, 100, (3, 4, 5)).astype(np.int16)
    canonical = np.diag([-0.7, -0.8, 3.0, 1.0])
    canonical[:3, 3] = 11, -7, 5
    source = tmp_path / "image.nii.gz"
    write_volume(source, array, affine_as(codes, canonical, array.shape))
    stored = nib.load(source)
    stored.header.set_qform(stored.affine, 1)
    stored.header.set_sform(stored.affine, 4)
    stored.header["scl_slope"], stored.header["descrip"] = 1.0, b"T2"
    nib.save(nib.Nifti1Image(np.asarray(stored.dataobj), None, stored.header), source)
    volume = read_volume(source)
    labels = (volume.array > 50).astype(np.uint8)
    write_like(tmp_path / "mask.nii.gz", labels, volume)
    written, image = nib.load(tmp_path / "mask.nii.gz"), nib.load(source)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(image.dataobj) > 50)
    np.testing.assert_array_equal(written.affine, image.affine)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 4)
    assert written.header.get_xyzt_units() == image.header.get_xyzt_units()
    assert written.get_data_dtype() == np.uint8
    maps = np.stack([volume.array / 100, volume.array / 200]).astype(np.float32)
    write_like(tmp_path / "p.nii", maps, volume)
    both = nib.load(tmp_path / "p.nii")
    assert both.shape == (*image.shape, 2)
    np.testing.assert_allclose(both.get_fdata()[..., 1], image.get_fdata() / 200, rtol=1e-6)
    once = (tmp_path / "mask.nii.gz").read_bytes()
    write_like(tmp_path / "mask.nii.gz", labels, volume)
    assert (tmp_path / "mask.nii.gz").read_bytes() == once


def test_masks_of_pictures_keep_their_values(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "m.png").write_bytes(mask_bytes(labels))
    np.testing.assert_array_equal(read_volume(tmp_path / "m.png", mask=True).array[0], labels)
    (tmp_path / "w.png").write_bytes(wide_bytes(labels.astype(np.int32) * 100))
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "w.png")), labels.astype(int) * 100
    )


# files


def test_a_folder_gives_its_images_and_passes_over_masks_and_results(tmp_path):
    touch(
        *(
            tmp_path / name
            for name in (
                "a_image.nii.gz",
                "a_mask.nii.gz",
                "b.png",
                "sub/c.nii",
                "sub/c_Segmentation.nii",
                "b_overlay.png",
                "b_probability_cup.png",
                "a_confidence.nii.gz",
                ".hidden.png",
                "note.txt",
            )
        )
    )
    jobs, skipped = jobs_of_images([tmp_path])
    assert [(job.name, job.suffix) for job in jobs] == [
        ("a", ".nii.gz"),
        ("b", ".png"),
        ("sub/c", ".nii"),
    ]
    assert skipped.texts() == [
        "5 files named like masks or results: "
        "a_confidence.nii.gz, a_mask.nii.gz, b_overlay.png, ...",
        "1 hidden file named like images: .hidden.png",
    ]


def test_images_of_one_name_get_results_of_their_own(tmp_path):
    paths = touch(
        tmp_path / "p1/t2.nii.gz",
        tmp_path / "p2/t2.nii.gz",
        tmp_path / "p1/t2.png",
        tmp_path / "o.png",
    )
    jobs, _ = jobs_of_images(paths)
    there = tmp_path.name
    assert [job.name for job in jobs] == [f"{there}_p1_t2", "p2_t2", f"{there}_p1_t2_2", "o"]
    deep, _ = jobs_of_images(touch(tmp_path / "p1/anat/t2.nii", tmp_path / "p2/anat/t2.nii"))
    assert [job.name for job in deep] == ["p1_anat_t2", "p2_anat_t2"]
    assert code_of(jobs_of_images, [tmp_path / "gone.nii"]) == "MOD-809"
    (tmp_path / "empty").mkdir()
    assert code_of(jobs_of_images, [tmp_path / "empty"]) == "MOD-809"


def test_nothing_is_written_over_unless_asked_and_never_an_input(tmp_path):
    image, mask = touch(tmp_path / "x.nii.gz", tmp_path / "x_mask.nii.gz")
    job = Job(image, "x")
    assert code_of(check_output, tmp_path, [job], ["_mask"], overwrite=False) == "MOD-808"
    check_output(tmp_path, [job], ["_mask"], overwrite=True)
    touch(tmp_path / "[eye]_probability_cup.png")
    eye = Job(tmp_path / "[eye].png", "[eye]")
    assert code_of(check_output, tmp_path, [eye], ["_probability"], overwrite=False) == "MOD-808"
    check_output(tmp_path, [eye], ["_mask"], overwrite=False)
    own = replace(job, mask=mask)
    assert code_of(check_output, tmp_path, [own], ["_mask"], overwrite=True) == "MOD-808"
    (tmp_path / "file").write_bytes(b"")
    assert (
        code_of(check_output, tmp_path / "file/sub", [job], ["_mask"], overwrite=True) == "MOD-808"
    )
