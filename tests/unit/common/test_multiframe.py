"""Enhanced DICOM: the frames of one file are checked, sorted and referred to like slices."""

import highdicom as hd
import numpy as np
import pydicom
import pytest

from fedsgcg.clients.predict.files import jobs_of_images
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images import segmentation
from fedsgcg.common.images.read import read_volume, segments_of, slices_in
from tests.support.dicoms import change, put_pixels, slice_header, write_enhanced, write_series
from tests.support.unreadable import code_of

AFFINE = np.diag([-0.7, -0.8, 3.0, 1.0])
AFFINE[:3, 3] = 10, 20, -30
ORDER = [2, 0, 4, 1, 3]


def voxels(count=5):
    return np.random.default_rng(0).integers(1, 3000, (6, 7, count)).astype(np.uint16)


def problem_of(path):
    with pytest.raises(FedsgcgError) as caught:
        read_volume(path)
    return caught.value.problems[0]


def test_frames_in_any_order_give_the_volume_of_a_series_of_files(tmp_path):
    write_enhanced(tmp_path / "p/a.dcm", voxels(), AFFINE, order=ORDER)
    write_series(tmp_path / "s", voxels(), AFFINE)
    wanted = read_volume(tmp_path / "s")
    for path in (tmp_path / "p", tmp_path / "p/a.dcm"):
        found = read_volume(path)
        np.testing.assert_array_equal(found.array, wanted.array)
        np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-5)
        assert slices_in(path) == 5
    (job,), _ = jobs_of_images([tmp_path / "p"])
    assert (job.image, job.suffix) == (tmp_path / "p", ".dcm")


def test_every_frame_has_its_own_rescaling(tmp_path):
    slopes = [1, 2, 3, 4, 5]
    write_enhanced(tmp_path / "a.dcm", voxels(), AFFINE, order=ORDER, slope=slopes)
    by_slice = np.array([slopes[ORDER.index(k)] for k in range(5)])
    wanted = voxels().transpose(2, 1, 0) * by_slice[:, None, None]
    np.testing.assert_array_equal(read_volume(tmp_path / "a.dcm").array, wanted)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"order": [0, 1, 3, 4]}, "DAT-161", "1 of 5 slices missing"),
        ({"stacks": 2}, "DAT-106", "at one position (frame"),
    ],
)
def test_gaps_and_echoes_are_found_with_their_frames(tmp_path, options, code, text):
    write_enhanced(tmp_path / "a.dcm", voxels(), AFFINE, **options)
    problem = problem_of(tmp_path / "a.dcm")
    assert problem.code == code
    assert text in problem.found
    assert "frame" in problem.found


def test_frames_of_two_orientations_a_second_file_and_films_are_refused(tmp_path):
    header = write_enhanced(tmp_path / "a/a.dcm", voxels(), AFFINE)
    turned = pydicom.Dataset()
    turned.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    header.PerFrameFunctionalGroupsSequence[1].PlaneOrientationSequence = [turned]
    header.save_as(tmp_path / "a/a.dcm")
    problem = problem_of(tmp_path / "a")
    assert (problem.code, "frame 2" in problem.found) == ("DAT-163", True)
    other = write_enhanced(tmp_path / "a/a.dcm", voxels(), AFFINE)
    write_enhanced(tmp_path / "a/b.dcm", voxels(), AFFINE)
    assert code_of(tmp_path / "a") == "DAT-162"
    change(tmp_path / "a/b.dcm", SeriesInstanceUID=other.SeriesInstanceUID)
    assert code_of(tmp_path / "a") == "DAT-106"
    film = slice_header("1.2", "1.3", "1.4", 1, 1)
    put_pixels(film, voxels()[:, :, 0])
    film.NumberOfFrames, film.PixelData = 2, film.PixelData * 2
    film.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    problem = problem_of(tmp_path / "film.dcm")
    assert (problem.code, "without positions" in problem.found) == ("DAT-106", True)


def test_a_segmentation_refers_to_the_frame_of_each_slice(tmp_path):
    header = write_enhanced(tmp_path / "a.dcm", voxels(), AFFINE, order=ORDER)
    image = read_volume(tmp_path / "a.dcm")
    classes = (image.array > 1500).astype(np.uint8)
    segmentation.write(tmp_path / "m.dcm", classes, ["background", "gland"], image, model="x")
    layers = segments_of(tmp_path / "m.dcm", image)
    np.testing.assert_array_equal(layers.masks[0], classes == 1)
    stored = hd.seg.segread(tmp_path / "m.dcm")
    assert stored.ReferencedSeriesSequence[0].SeriesInstanceUID == header.SeriesInstanceUID
    assert stored.FrameOfReferenceUID == header.FrameOfReferenceUID
    frames = header.PerFrameFunctionalGroupsSequence
    for drawn in stored.PerFrameFunctionalGroupsSequence:
        (source,) = drawn.DerivationImageSequence[0].SourceImageSequence
        assert source.ReferencedSOPInstanceUID == header.SOPInstanceUID
        own = frames[int(source.ReferencedFrameNumber) - 1].PlanePositionSequence[0]
        place = drawn.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(
            [float(one) for one in place],
            [float(one) for one in own.ImagePositionPatient],
            atol=1e-4,
        )
