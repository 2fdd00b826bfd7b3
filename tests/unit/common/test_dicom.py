"""DICOM series and segmentations: order from positions, one regular stack, the right references."""

import shutil

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import generate_uid

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images import segmentation
from fedsgcg.common.images.folders import look_through
from fedsgcg.common.images.layers import Layers, class_map
from fedsgcg.common.images.read import read_volume, segments_of, slices_in
from tests.support.dicoms import change, put_pixels, slice_header, write_series
from tests.support.unreadable import code_of

CLASSES = {"background": [0], "rim": [1], "cup": [2]}
NESTED = {"disc": [1, 2], "cup": [2]}


def affine(spacing=3.0, shift=0.0):
    found = np.diag([-0.7, -0.8, spacing, 1.0])
    found[:3, 3] = 10 + shift, 20, -30
    return found


def voxels(count=5, seed=0):
    return np.random.default_rng(seed).integers(0, 3000, (6, 7, count)).astype(np.uint16)


@pytest.fixture
def series(tmp_path):
    folder = tmp_path / "series"
    write_series(folder, voxels(), affine())
    return folder


def by_position(folder):
    headers = {path: pydicom.dcmread(path) for path in folder.glob("*.dcm")}
    return sorted(headers, key=lambda path: float(headers[path].ImagePositionPatient[2]))


def problem_of(path, **options):
    with pytest.raises(FedsgcgError) as caught:
        read_volume(path, **options)
    return caught.value.problems[0]


def test_simpleitk_reads_the_same_geometry(series):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in by_position(series)])
    image = reader.Execute()
    found = read_volume(series)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ found.affine
    np.testing.assert_allclose(lps[:3, 3], image.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(lps[:3, :3], axis=0), image.GetSpacing(), atol=1e-5)
    assert slices_in(series) == 5


def test_files_without_suffix_notes_and_directories_do_not_matter(series):
    for number, path in enumerate(by_position(series)):
        path.rename(series / f"IM{number}")
    (series / "DICOMDIR.txt").write_text("x")
    (series / "report.pdf").write_bytes(b"%PDF")
    np.testing.assert_array_equal(read_volume(series).array, voxels().transpose(2, 1, 0))
    assert list(look_through(series).series) == [series]


def test_a_rescaled_series_gives_the_scaled_values(series):
    for path in series.glob("*.dcm"):
        change(path, RescaleSlope="2", RescaleIntercept="-1000", RescaleType="US")
    wanted = voxels().transpose(2, 1, 0) * 2.0 - 1000
    np.testing.assert_array_equal(read_volume(series).array, wanted)


def test_a_missing_slice_is_found_with_its_place(series):
    by_position(series)[2].unlink()
    problem = problem_of(series)
    assert problem.code == "DAT-161"
    assert "1 of 5 slices missing" in problem.found
    assert by_position(series)[1].name in problem.found


def test_two_orientations_are_refused(series, tmp_path):
    localizer = by_position(series)[0]
    change(localizer, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    problem = problem_of(series)
    assert (problem.code, "two orientations" in problem.found) == ("DAT-163", True)
    assert localizer.name in problem.found


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"PixelSpacing": ["0.9", "0.7"]}, "DAT-163"),
        ({"ImagePositionPatient": None}, "DAT-163"),
        ({"NumberOfFrames": 2}, "DAT-106"),
    ],
)
def test_one_slice_that_differs_stops_the_series(series, fields, code):
    change(by_position(series)[3], **fields)
    assert code_of(series) == code


def test_a_tilted_gantry_is_refused(series):
    for number, path in enumerate(by_position(series)):
        position = pydicom.dcmread(path).ImagePositionPatient
        change(path, ImagePositionPatient=[position[0], position[1] + number, position[2]])
    assert "tilted" in problem_of(series).found


def test_two_time_points_at_one_position_are_refused(series):
    path = by_position(series)[1]
    shutil.copy(path, series / "again.dcm")
    change(series / "again.dcm", SOPInstanceUID=generate_uid())
    assert code_of(series) == "DAT-106"


def test_two_series_in_a_folder_are_listed(series):
    write_series(series / "x", voxels(3), affine(), number=7)
    for path in (series / "x").iterdir():
        path.rename(series / f"other_{path.name}")
    problem = problem_of(series)
    assert problem.code == "DAT-162"
    assert "T2 1 (5 files)" in problem.found
    assert "T2 7 (3 files)" in problem.found
    for name in ("7", "t2 7"):
        np.testing.assert_array_equal(
            read_volume(series, series=name).array, voxels(3).transpose(2, 1, 0)
        )
    with pytest.raises(FedsgcgError) as caught:
        read_volume(series, series="8")
    assert caught.value.problems[0].expected == "one series called '8'"


def test_a_file_without_position_is_a_picture(tmp_path):
    header = slice_header(generate_uid(), generate_uid(), generate_uid(), 1, 1)
    colours = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    put_pixels(header, colours[:, :, 0].astype(np.uint16))
    header.SamplesPerPixel, header.PhotometricInterpretation = 3, "RGB"
    header.PlanarConfiguration, header.BitsAllocated, header.BitsStored = 0, 8, 8
    header.HighBit, header.PixelData = 7, colours.tobytes()
    header.save_as(tmp_path / "eye.dcm", enforce_file_format=True)
    found = read_volume(tmp_path / "eye.dcm")
    assert (found.kind, found.is_eight_bit) == ("picture", True)
    np.testing.assert_array_equal(found.array, colours.transpose(2, 0, 1))


# segmentations


def segmented(series, path, classes=None):
    image = read_volume(series)
    if classes is None:
        classes = np.zeros(image.array.shape, np.uint8)
        classes[1:3, 2:5, 1:4], classes[2, 3, 2] = 1, 2
    segmentation.write(path, classes, list(CLASSES), image, model="m 123")
    return image, classes


@pytest.mark.parametrize("codes", ["axial", "sagittal"])
def test_what_is_written_is_read_back_in_place(tmp_path, codes):
    place = affine()
    if codes == "sagittal":  # columns to the back, rows to the feet, slices to the right
        place = np.array([[0, 0, 3.0, 5], [-0.7, 0, 0, 6], [0, -0.8, 0, 7], [0, 0, 0, 1]])
    write_series(tmp_path / "s", voxels(), place)
    image, classes = segmented(tmp_path / "s", tmp_path / "m.dcm")
    assert image.plane == codes
    layers = segments_of(tmp_path / "m.dcm", image)
    assert layers.names == ("rim", "cup")
    np.testing.assert_array_equal(class_map(layers, CLASSES, NESTED, ""), classes)
    alone = read_volume(tmp_path / "m.dcm", mask=True)
    assert (alone.array == 2).sum() == 1
    assert (alone.array == 1).sum() == (classes == 1).sum()


def test_the_references_are_those_of_the_series(series, tmp_path):
    segmented(series, tmp_path / "m.dcm")
    stored = hd.seg.segread(tmp_path / "m.dcm")
    first = pydicom.dcmread(by_position(series)[0])
    (reference,) = stored.ReferencedSeriesSequence
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert stored[name].value == first[name].value, name
    assert reference.SeriesInstanceUID == first.SeriesInstanceUID != stored.SeriesInstanceUID
    own = {pydicom.dcmread(path).SOPInstanceUID for path in series.glob("*.dcm")}
    named = {one.ReferencedSOPInstanceUID for one in reference.ReferencedInstanceSequence}
    assert named <= own
    labels = [stored.get_segment_description(number).segment_label for number in (1, 2)]
    assert labels == ["rim", "cup"]


def test_a_series_without_names_and_dates_gets_a_segmentation(series, tmp_path):
    names = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate")
    for path in series.glob("*.dcm"):
        change(path, **dict.fromkeys((*names, "AccessionNumber", "StudyTime", "StudyID")))
    image, classes = segmented(series, tmp_path / "m.dcm")
    layers = segments_of(tmp_path / "m.dcm", image)
    np.testing.assert_array_equal(class_map(layers, CLASSES, NESTED, ""), classes)
    for path in series.glob("*.dcm"):
        change(path, FrameOfReferenceUID=None)
    with pytest.raises(FedsgcgError) as caught:
        segmented(series, tmp_path / "m.dcm")
    assert caught.value.code == "MOD-812"


def test_an_empty_mask_can_be_written(series, tmp_path):
    image, classes = segmented(series, tmp_path / "m.dcm", np.zeros((5, 7, 6), np.uint8))
    layers = segments_of(tmp_path / "m.dcm", image)
    np.testing.assert_array_equal(class_map(layers, CLASSES, NESTED, ""), classes)


def test_a_segmentation_of_other_images_is_refused(series, tmp_path):
    segmented(series, tmp_path / "m.dcm")
    write_series(tmp_path / "other", voxels(), affine())
    other = read_volume(tmp_path / "other")
    with pytest.raises(FedsgcgError) as caught:
        segments_of(tmp_path / "m.dcm", other)
    assert caught.value.code == "DAT-164"
    for path in series.glob("*.dcm"):  # the same series, exported again with new instances
        change(path, SOPInstanceUID=generate_uid())
    with pytest.raises(FedsgcgError) as caught:
        segments_of(tmp_path / "m.dcm", read_volume(series))
    assert caught.value.code == "DAT-164"
    assert code_of(tmp_path / "m.dcm") == "DAT-164"  # as an image


def test_a_segmentation_with_a_nifti_image_must_have_its_grid(series, tmp_path):
    from tests.support.formats import write_nifti

    _, classes = segmented(series, tmp_path / "m.dcm")
    write_nifti(tmp_path / "same.nii.gz", voxels(), affine())
    layers = segments_of(tmp_path / "m.dcm", read_volume(tmp_path / "same.nii.gz"))
    np.testing.assert_array_equal(class_map(layers, CLASSES, NESTED, ""), classes)
    for place in (affine(shift=0.3), affine(spacing=2.0), affine(shift=7.0)):
        write_nifti(tmp_path / "x.nii.gz", voxels(), place)
        with pytest.raises(FedsgcgError) as caught:
            segments_of(tmp_path / "m.dcm", read_volume(tmp_path / "x.nii.gz"))
        assert caught.value.code == "DAT-105"


def test_a_truncated_segmentation_is_refused(series, tmp_path):
    image, _ = segmented(series, tmp_path / "m.dcm")
    whole = (tmp_path / "m.dcm").read_bytes()
    (tmp_path / "m.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FedsgcgError) as caught:
        segments_of(tmp_path / "m.dcm", image)
    assert caught.value.code == "DAT-103"


def test_segmentations_of_different_structures_are_one_mask(series, tmp_path):
    image = read_volume(series)
    disc = np.zeros(image.array.shape, np.uint8)
    disc[1:4, 1:6, 1:6] = 1
    cup = np.zeros_like(disc)
    cup[2, 2:5, 2:5] = 1
    (tmp_path / "masks").mkdir()
    for name, mask in (("cup", cup), ("disc", disc)):
        path = tmp_path / "masks" / f"{name}.dcm"
        segmentation.write(path, mask, ["background", name], image, model="m")
    layers = segments_of(tmp_path / "masks", image)
    assert layers.names == ("cup", "disc")
    np.testing.assert_array_equal(layers.masks, [cup > 0, disc > 0])
    truth = class_map(layers, CLASSES, NESTED, "case")
    np.testing.assert_array_equal(truth, disc + cup)
    with pytest.raises(FedsgcgError) as caught:
        read_volume(tmp_path / "masks", mask=True)  # their own grids may differ
    assert caught.value.code == "DAT-162"


def test_a_structure_that_two_segmentations_draw_is_refused_with_both(series, tmp_path):
    image, _ = segmented(series, tmp_path / "m.dcm")
    (tmp_path / "masks").mkdir()
    for name in ("1.dcm", "2.dcm"):
        shutil.copy(tmp_path / "m.dcm", tmp_path / "masks" / name)
    with pytest.raises(FedsgcgError) as caught:
        segments_of(tmp_path / "masks", image)
    (problem,) = caught.value.problems
    assert problem.code == "DAT-198"
    assert problem.found == "1.dcm and 2.dcm: both have a segment rim"
    assert "move the other one away" in problem.action
    (tmp_path / "masks/2.dcm").unlink()
    assert segments_of(tmp_path / "masks", image).names == ("rim", "cup")
    shutil.copy(tmp_path / "m.dcm", series / "m.dcm")  # exported into the folder of the series
    np.testing.assert_array_equal(read_volume(series).array, image.array)


@pytest.mark.parametrize(
    ("first", "second", "twice"),
    [
        ((0, 40), (60, 90), False),  # apart
        ((0, 40), (0, 90), False),  # nested
        ((0, 40), (39, 90), False),  # contours that touch
        ((0, 40), (21, 90), False),  # less than half in common: structures that cross
        ((0, 40), (19, 90), True),  # more than half, and not nested
        ((0, 40), (2, 43), True),  # two readers
        ((0, 40), (0, 40), True),  # a copy
        ((0, 0), (0, 40), False),  # empty
        ((0, 0), (0, 0), False),
    ],
)
def test_two_readers_differ_from_two_structures(first, second, twice):
    masks = np.zeros((2, 1, 1, 100), bool)
    for mask, (start, end) in zip(masks, (first, second), strict=True):
        mask[..., start:end] = True
    one, other = (Layers((name,), mask[None]) for name, mask in zip(("a", "b"), masks, strict=True))
    assert bool(segmentation.drawn_twice(one, other)) is twice
    assert bool(segmentation.drawn_twice(other, one)) is twice
    same = Layers(("A ",), masks[1][None])
    assert segmentation.drawn_twice(one, same) == "both have a segment A "


# layers


def layers_of(*items, absent_is_empty=False, numbers=()):
    names = tuple(name for name, _ in items)
    masks = np.stack([np.array(mask, bool) for _, mask in items])
    return Layers(names, masks, numbers, absent_is_empty)


def code_of_layers(layers, classes=CLASSES, structures=NESTED):
    with pytest.raises(FedsgcgError) as caught:
        class_map(layers, classes, structures, "case")
    return caught.value.code


def test_layers_by_hand():
    disc, cup = [0, 1, 1, 1], [0, 0, 0, 1]
    by_structure = layers_of(("Disc", disc), ("CUP ", cup))
    assert class_map(by_structure, CLASSES, NESTED, "").tolist() == [0, 1, 1, 2]
    by_class = layers_of(("rim", [0, 1, 1, 0]), ("cup", cup))
    assert class_map(by_class, CLASSES, NESTED, "").tolist() == [0, 1, 1, 2]
    apart = {"background": [0], "left": [1], "right": [2]}
    only = {"left": [1], "right": [2]}
    one = layers_of(("left", [0, 1]))
    assert code_of_layers(one, apart, only) == "DAT-165"  # right: empty, or not drawn
    segment = layers_of(("left", [0, 1]), absent_is_empty=True)
    assert class_map(segment, apart, only, "").tolist() == [0, 1]
    numbered = layers_of(("Seg A", [1, 0]), ("Seg B", [0, 1]), numbers=(2, 1))
    assert class_map(numbered, apart, only, "").tolist() == [2, 1]


def test_layers_that_contradict_each_other_or_the_classes():
    apart = {"background": [0], "left": [1], "right": [2]}
    only = {"left": [1], "right": [2]}
    both = layers_of(("left", [1, 1]), ("right", [0, 1]))
    assert code_of_layers(both, apart, only) == "DAT-166"
    exchanged = layers_of(("disc", [0, 0, 1]), ("cup", [1, 1, 1]))
    assert code_of_layers(exchanged) == "DAT-166"
    assert code_of_layers(layers_of(("disk", [1]), ("cup", [0]))) == "DAT-165"
    assert code_of_layers(layers_of(("cup", [1]), ("Cup", [0]))) == "DAT-165"
    assert code_of_layers(layers_of(("disc", [1]), absent_is_empty=True)) == "DAT-165"
    disc, cup = np.ones(100, bool), np.zeros(100, bool)
    cup[:40], disc[:2] = True, False  # 2 of 40 pixels of the cup outside the disc
    found = class_map(layers_of(("disc", disc), ("cup", cup)), CLASSES, NESTED, "")
    assert found.tolist() == [2] * 40 + [1] * 60
    disc[2] = False
    assert code_of_layers(layers_of(("disc", disc), ("cup", cup))) == "DAT-166"
