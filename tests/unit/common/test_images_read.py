"""Reading volumes: orientation, lengths, scale factors and damaged files."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import (
    PLANES,
    affine_as,
    read_volume,
    suffix_of,
    to_native,
    write_volume,
)
from tests.support.unreadable import code_of

PAIRS = ("LR", "PA", "SI")
ALL_CODES = [
    tuple(pair[side] for pair, side in zip(order, sides, strict=True))
    for order in itertools.permutations(("LR", "PA", "SI"))
    for sides in itertools.product((0, 1), repeat=3)
]


def save(path, array, affine=None, dtype=None):
    image = nib.Nifti1Image(
        array, np.diag([-1.0, -2.0, 3.0, 1.0]) if affine is None else affine, dtype=dtype
    )
    nib.save(image, path)
    return path


# orientation


@pytest.mark.parametrize("codes", ALL_CODES, ids="".join)
@pytest.mark.row(43)
def test_a_landmark_is_found_at_its_anatomical_place_in_all_48_orientations(tmp_path, codes):
    """A marker is placed by its position in mm and found by anatomy, whatever the file's axes."""
    array = np.zeros((4, 5, 6), np.int16)
    sizes = np.array([1.0, 2.0, 3.0])
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        world = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2, "I": 2}[code]
        affine[:, axis] = 0
        affine[world, axis] = sizes[axis] * (1 if code in "RAS" else -1)
    # The marker lies at the voxel that is the most right, most anterior and most superior.
    place = tuple(
        0 if code in "LPI" else size - 1 for code, size in zip(codes, array.shape, strict=True)
    )
    array[place] = 9
    volume = read_volume(save(tmp_path / "a.nii.gz", array, affine))
    where = np.argwhere(volume.array == 9)
    # Slices are cut across the axis with the longest voxels, axis 2 of the file.
    assert volume.plane == {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal"}.get(
        codes[2], "sagittal"
    )
    along = PLANES[volume.plane][::-1]  # of slices, rows, columns
    last = [size - 1 for size in volume.array.shape]
    assert where.tolist() == [
        [end if code in "RAS" else 0 for code, end in zip(along, last, strict=True)]
    ]
    expected = [
        next(sizes[axis] for axis, own in enumerate(codes) if own in pair)
        for code in along
        for pair in PAIRS
        if code in pair
    ]
    assert volume.spacing == pytest.approx(tuple(expected))
    assert nib.aff2axcodes(volume.canonical_affine) == PLANES[volume.plane]


@pytest.mark.parametrize(
    ("sizes", "shape", "plane"),
    [
        ((1, 1, 1), (5, 6, 7), "axial"),  # isotropic
        ((0.9, 0.9, 0.5), (5, 6, 7), "axial"),  # slices thinner than pixels
        ((1.2, 1, 1), (5, 6, 7), "axial"),  # nearly isotropic
        ((1.4, 1, 1), (5, 6, 7), "axial"),
        ((1.5, 1, 1), (5, 6, 7), "sagittal"),
        ((0.5, 4, 0.5), (5, 6, 7), "coronal"),
        ((1, 1, 1), (1, 6, 7), "sagittal"),  # a single slice
        ((1, 1, 1), (5, 1, 7), "coronal"),
    ],
)
@pytest.mark.row(45)
def test_slices_are_those_of_the_acquisition(tmp_path, sizes, shape, plane):
    volume = read_volume(
        save(tmp_path / "a.nii", np.zeros(shape, np.int16), np.diag([*sizes, 1.0]))
    )
    assert (volume.plane, volume.kind) == (plane, f"{plane} volume")
    across = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    assert volume.array.shape[0] == shape[across]
    assert volume.spacing[0] == pytest.approx(sizes[across])


# lengths


@pytest.mark.parametrize(
    ("unit", "factor"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1)]
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_lengths_are_in_millimetres_whatever_the_headers_unit(tmp_path, unit, factor, kind):
    affine = np.diag([0.8 * factor, 0.8 * factor, 3.0 * factor, 1.0])
    affine[:3, 3] = np.array([10, 20, 30]) * factor
    image = kind(np.zeros((6, 6, 4), np.float32), affine)
    image.header.set_xyzt_units(unit)
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    volume = read_volume(tmp_path / "a.nii")
    assert volume.millimetres == pytest.approx((3.0, 0.8, 0.8))
    np.testing.assert_allclose(volume.affine[:3, 3], [10, 20, 30], rtol=1e-6)


@pytest.mark.parametrize("missing", [0.0, np.nan])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_voxel_size_that_is_missing_gives_no_millimetres(tmp_path, missing, kind):
    image = kind(np.zeros((6, 6, 4), np.float32), np.diag([0.8, 0.8, 3.0, 1.0]))
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)
    (tmp_path / "whole.nii").write_bytes(image.to_bytes())
    assert read_volume(tmp_path / "whole.nii").millimetres == pytest.approx((3.0, 0.8, 0.8))
    raw = bytearray(image.to_bytes())
    size = image.header.structarr.nbytes
    header = np.frombuffer(bytes(raw[:size]), image.header.structarr.dtype).copy()
    header["pixdim"][0, 2] = missing
    raw[:size] = header.tobytes()
    (tmp_path / "a.nii").write_bytes(bytes(raw))
    if np.isnan(missing):
        assert (
            code_of(tmp_path / "a.nii") == "DAT-103"
        )  # an affine that is no number places nothing
    else:
        assert read_volume(tmp_path / "a.nii").millimetres is None


@settings(deadline=None)  # writing files on a busy machine takes what it takes
@given(
    codes=st.sampled_from(ALL_CODES),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    tilt=st.floats(-0.3, 0.3),
    sizes=st.permutations((1.0, 2.0, 4.0)),
)
def test_law_to_native_undoes_reading(tmp_path_factory, codes, shape, tilt, sizes):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 100, shape).astype(np.int16)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine = affine_as(codes, turn @ np.diag([-sizes[0], -sizes[1], sizes[2], 1.0]), (4, 5, 6))
    path = save(tmp_path_factory.mktemp("v") / "a.nii", array, affine)
    volume = read_volume(path)
    np.testing.assert_array_equal(to_native(volume.array, volume), array)


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("P", "S", "L"), ("I", "R", "P")])
def test_writing_and_reading_returns_the_canonical_array_and_the_same_place_in_mm(tmp_path, codes):
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    canonical = np.diag([-1.5, -2.0, 3.0, 1.0])
    canonical[:3, 3] = (10, 20, 30)
    affine = affine_as(codes, canonical, array.shape)
    write_volume(tmp_path / "a.nii.gz", array, affine)
    assert nib.aff2axcodes(nib.load(tmp_path / "a.nii.gz").affine) == codes
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.canonical_affine, canonical, atol=1e-5)
    assert volume.spacing == pytest.approx((3.0, 2.0, 1.5))


def test_equal_volumes_are_written_as_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_volume(
            tmp_path / f"{name}.nii.gz", np.ones((2, 3, 4), np.int16), np.diag([-1.0, -1, 1, 1])
        )
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == bytes(4), "no time stamp"


# voxels


@pytest.mark.parametrize(
    ("dtype", "raw"), [(np.int16, -300), (np.uint16, 65000), (np.uint8, 200), (np.float64, 0.25)]
)
def test_scale_factors_of_the_header_are_applied(tmp_path, dtype, raw):
    image = nib.Nifti1Image(np.full((2, 2, 2), raw, dtype), np.diag([-1.0, -1, 1, 1]))
    image.header.set_slope_inter(0.5, 7)
    # Written by hand: nibabel would rescale the stored values to fit the slope.
    content = bytearray(image.header.binaryblock) + b"\0\0\0\0" + np.full(8, raw, dtype).tobytes()
    content[108:112] = np.float32(352).tobytes()
    (tmp_path / "a.nii").write_bytes(bytes(content))
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").array, raw * 0.5 + 7)


def test_nifti_2_and_big_endian_files_are_read(tmp_path):
    array = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    affine = np.diag([-1.0, -1, 1, 1])
    nib.save(nib.Nifti2Image(array, affine), tmp_path / "two.nii")
    big = nib.Nifti1Image(array, affine, nib.Nifti1Header(endianness=">"))
    (tmp_path / "big.nii").write_bytes(big.to_bytes())
    for name in ("two.nii", "big.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, array.transpose(2, 1, 0))


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 4, 5, 1, 1)])
def test_trailing_axes_of_length_one_are_dropped(tmp_path, shape):
    array = np.arange(60, dtype=np.int16).reshape(shape)
    assert read_volume(save(tmp_path / "a.nii", array)).array.shape == (5, 4, 3)


def test_a_single_slice_file_is_a_volume_of_one_slice(tmp_path):
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert read_volume(save(tmp_path / "a.nii", array)).array.shape == (1, 4, 3)


@pytest.mark.row(45)
def test_a_time_series_is_refused_with_a_hint(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 2), np.int16))
    with pytest.raises(FedsgcgError) as caught:
        read_volume(path)
    problem = caught.value.problems[0]
    assert problem.code == "DAT-106"
    assert "3x4x5x2" in problem.found
    assert "one time point" in problem.action


def test_colour_voxels_are_refused(tmp_path):
    colour = np.zeros((3, 4, 5), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert code_of(save(tmp_path / "a.nii", colour)) == "DAT-106"


# damaged files


def test_damaged_files_say_so(tmp_path):
    whole = save(
        tmp_path / "whole.nii.gz", np.arange(6000, dtype=np.int16).reshape(10, 20, 30)
    ).read_bytes()
    damaged = {
        "cut.nii.gz": whole[: len(whole) // 2],
        "cut_in_header.nii.gz": whole[:40],
        "empty.nii.gz": b"",
        "text.nii.gz": b"this is no image at all, but it is long enough" * 20,
        "zipped_text.nii.gz": gzip.compress(b"neither is this" * 100),
        "cut.nii": gzip.decompress(whole)[:1000],
        "picture.png": b"\x89PNG\r\n\x1a\n broken",
        "picture.tif": b"II*\0 broken",
        "picture.jpg": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert code_of(tmp_path / name) == "DAT-103", name


def test_a_bit_that_flipped_in_a_compressed_file_is_noticed(tmp_path):
    """Stored (uncompressed) gzip blocks decompress after a flip; only the checksum shows it."""
    plain = nib.Nifti1Image(np.ones((8, 8, 8), np.int16), np.diag([-1.0, -1, 1, 1])).to_bytes()
    content = bytearray(gzip.compress(plain, 0))
    content[600] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(bytes(content))
    assert code_of(tmp_path / "a.nii.gz") == "DAT-103"


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FedsgcgError, match="no such file"):
        read_volume(tmp_path / "nowhere.nii.gz")
    (tmp_path / "a.dcm").write_bytes(b"x")
    assert code_of(tmp_path / "a.dcm") == "DAT-103"


def test_a_header_without_a_usable_affine_is_refused(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header["srow_x"] = 0
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + b"\0\0\0\0" + bytes(16))
    assert code_of(tmp_path / "a.nii") == "DAT-103"


def test_a_header_that_announces_an_absurd_size_is_refused_before_memory_is_taken(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.diag([-1.0, -1, 1, 1]))
    header = bytearray(image.header.binaryblock)
    header[40:48] = np.array([3, 32767, 32767, 32767], np.int16).tobytes()
    (tmp_path / "a.nii").write_bytes(bytes(header) + bytes(20))
    assert code_of(tmp_path / "a.nii") == "DAT-103"


def test_suffixes():
    from pathlib import Path

    names = ("a.NII.GZ", "b.nii", "c.Jpeg", "d.gz", "e")
    suffixes = [suffix_of(Path(name)) for name in names]
    assert suffixes == [".nii.gz", ".nii", ".jpeg", "", ""]
