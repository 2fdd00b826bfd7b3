"""One case in every format: the same slices, the same place of a result, clear refusals."""

import contextlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images import extras
from fedsgcg.common.images.formats import DICOM, FORMATS, format_of
from fedsgcg.common.images.parts import files_of
from fedsgcg.common.images.read import affine_as, check_geometry, read_volume, slices_in, to_native
from fedsgcg.common.images.write import write_like
from tests.support.formats import WITHOUT_ORIENTATION, WRITERS, write_itk, write_nifti
from tests.support.unreadable import code_of

CODES = [("L", "P", "S"), ("R", "A", "S"), ("P", "S", "L"), ("I", "R", "A"), ("S", "L", "A")]


def case(codes=("L", "P", "S"), seed=0, sizes=(0.7, 0.8, 3.0), shape=(4, 6, 5)):
    """Return native voxels (i, j, k) and their affine: canonical shape (Z, Y, X) is `shape`."""
    canonical = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    canonical[:3, 3] = 11.5, -7.25, 30
    affine = affine_as(codes, canonical, shape)
    order = [int(axis) for axis in nib.io_orientation(affine)[:, 0]]
    native = tuple(shape[::-1][axis] for axis in order)
    return np.random.default_rng(seed).integers(0, 4000, native).astype(np.uint16), affine


@settings(deadline=None, max_examples=12)
@given(codes=st.sampled_from(CODES), seed=st.integers(0, 99), turn=st.booleans())
def test_one_case_gives_the_same_slices_in_every_format(tmp_path_factory, codes, seed, turn):
    folder = tmp_path_factory.mktemp("formats")
    native, affine = case(codes, seed)
    if turn:  # oblique: 17 degrees about z
        c, s = np.cos(0.3), np.sin(0.3)
        affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine
    # A series has right-handed axes, as its slices' normal says.
    right_handed = np.linalg.det(np.diag([-1.0, -1.0, 1.0]) @ affine[:3, :3]) > 0
    write_nifti(folder / "reference.nii", native, affine)
    wanted = read_volume(folder / "reference.nii")
    for name, write in WRITERS.items():
        if name == "series" and not right_handed:
            continue
        write(folder / name, native, affine)
        found = read_volume(folder / name)
        assert found.kind == wanted.kind, name
        np.testing.assert_array_equal(found.array, wanted.array, err_msg=name)
        np.testing.assert_allclose(found.affine, affine, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found.spacing, wanted.spacing, atol=1e-5, err_msg=name)
        assert found.millimetres is not None
        check_geometry(wanted, found, name)
        assert slices_in(folder / name) == 4


@pytest.mark.parametrize("name", [*WRITERS, *WITHOUT_ORIENTATION])
def test_a_result_is_in_the_place_of_its_image_in_every_format(name, tmp_path):
    native, affine = case()
    native[0, 0, 0] = 0
    {**WRITERS, **WITHOUT_ORIENTATION}[name](tmp_path / name, native, affine)
    image = read_volume(tmp_path / name)
    labels = (image.array > 2000).astype(np.uint8) * 7
    np.testing.assert_array_equal(to_native(labels, image), 7 * (native > 2000))
    suffixes = [".nii.gz", ".mha", ".nrrd", ".mhd", ".nhdr"]
    suffixes += [".hdr"] if name.endswith(".hdr") else []
    suffixes += [".tif"] if name.endswith(".tif") else []
    for suffix in suffixes:
        write_like(tmp_path / f"mask{suffix}", labels, image)
        mask = read_volume(tmp_path / f"mask{suffix}", mask=True)
        np.testing.assert_array_equal(mask.array, labels, err_msg=suffix)
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4, err_msg=suffix)
        check_geometry(image, mask, suffix)
    maps = np.stack([image.array / 4000, 1 - image.array / 4000]).astype(np.float32)
    write_like(tmp_path / "maps.nii.gz", maps, image)
    write_like(tmp_path / "maps.mha", maps, image)
    stored = nib.load(tmp_path / "maps.nii.gz").get_fdata()[..., 1]
    np.testing.assert_allclose(stored, 1 - native / 4000, atol=1e-6)
    values = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "maps.mha"))[..., 1]
    np.testing.assert_allclose(values.transpose(2, 1, 0), 1 - native / 4000, atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_ORIENTATION)
def test_without_an_orientation_axial_slices_and_the_voxel_size_are_kept(name, tmp_path):
    native, affine = case()
    WITHOUT_ORIENTATION[name](tmp_path / name, native, affine)
    found = read_volume(tmp_path / name)
    # Rows of a TIFF go from front to back, those of ANALYZE from back to front.
    wanted = native if name == "a.tif" else native[:, ::-1]
    np.testing.assert_array_equal(found.array, wanted.transpose(2, 1, 0))
    np.testing.assert_allclose(found.millimetres, (3.0, 0.8, 0.7), rtol=1e-5)
    assert found.kind == "axial volume"


def test_tiff_of_16_bits_with_pages_without_a_voxel_size_and_with_time(tmp_path):
    pages = np.arange(3 * 5 * 6, dtype=np.uint16).reshape(3, 5, 6) * 700
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    found = read_volume(tmp_path / "a.tif")
    np.testing.assert_array_equal(found.array, pages)
    assert (found.millimetres, found.is_picture) == (None, False)
    frames = [Image.fromarray(page) for page in pages]
    frames[0].save(
        tmp_path / "b.tif", save_all=True, append_images=frames[1:], compression="tiff_lzw"
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "b.tif").array, pages)
    ome = {"axes": "ZYX", "PhysicalSizeX": 500, "PhysicalSizeY": 600, "PhysicalSizeZ": 2000}
    tifffile.imwrite(tmp_path / "c.ome.tif", pages, metadata=ome, photometric="minisblack")
    assert read_volume(tmp_path / "c.ome.tif").millimetres == pytest.approx((2.0, 0.6, 0.5))
    tifffile.imwrite(tmp_path / "t.tif", pages, imagej=True, metadata={"axes": "TYX"})
    assert code_of(tmp_path / "t.tif") == "DAT-106"


def test_a_header_and_its_data_belong_together(tmp_path):
    native, affine = case()
    for name in ("a.mhd", "a.nhdr"):
        write_itk(tmp_path / name, native, affine)
        header, data = files_of(tmp_path / name)
        assert data.is_file()
        data.unlink()
        assert code_of(header) == "DAT-103"
    (tmp_path / "list.mhd").write_text("NDims = 3\nElementDataFile = LIST\na.raw\n")
    assert code_of(tmp_path / "list.mhd") == "DAT-103"
    WITHOUT_ORIENTATION["a.hdr"](tmp_path / "b.hdr", native, affine)
    assert files_of(tmp_path / "b.hdr") == [tmp_path / "b.hdr", tmp_path / "b.img"]
    np.testing.assert_array_equal(
        read_volume(tmp_path / "b.img").array, read_volume(tmp_path / "b.hdr").array
    )
    (tmp_path / "b.img").unlink()
    assert code_of(tmp_path / "b.hdr") == "DAT-103"


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "pair.hdr", "series"])
def test_a_truncated_file_is_refused_never_filled_up(name, tmp_path):
    native, affine = case()
    WRITERS[name](tmp_path / name, native, affine)
    files = files_of(tmp_path / name)
    whole = files[-1].read_bytes()
    for share in (0.0, 0.5, 0.97):
        files[-1].write_bytes(whole[: int(len(whole) * share)])
        assert code_of(tmp_path / name) in ("DAT-103", "DAT-161"), share
    files[-1].write_bytes(whole)
    read_volume(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_a_truncated_compressed_file_is_refused(name, tmp_path):
    image = sitk.GetImageFromArray(case()[0])
    sitk.WriteImage(image, tmp_path / name, useCompression=True)
    data = files_of(tmp_path / name)[-1]
    whole = data.read_bytes()
    for share in (0.5, 0.97):
        data.write_bytes(whole[: int(len(whole) * share)])
        assert code_of(tmp_path / name) == "DAT-103"
    data.unlink()
    assert code_of(tmp_path / name) == "DAT-103"


def test_colours_and_time_points_are_refused(tmp_path):
    colours = sitk.GetImageFromArray(np.zeros((2, 3, 4, 3), np.uint8), isVector=True)
    sitk.WriteImage(colours, tmp_path / "a.mha")
    assert code_of(tmp_path / "a.mha") == "DAT-106"
    series = sitk.JoinSeries([sitk.Image(3, 4, 5, sitk.sitkUInt8) for _ in range(2)])
    sitk.WriteImage(series, tmp_path / "b.nrrd")
    assert code_of(tmp_path / "b.nrrd") == "DAT-106"
    single = sitk.JoinSeries([sitk.Image(3, 4, 5, sitk.sitkUInt8)])
    sitk.WriteImage(single, tmp_path / "c.nrrd")
    assert read_volume(tmp_path / "c.nrrd").array.shape == (5, 4, 3)
    sitk.WriteImage(sitk.Image(6, 7, sitk.sitkUInt8), tmp_path / "d.mha")
    assert read_volume(tmp_path / "d.mha").array.shape == (1, 7, 6)


def test_a_header_without_a_voxel_size_has_none(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(range(24)))
    text = "ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\n"
    end = "ElementType = MET_UCHAR\nElementDataFile = a.raw\n"
    (tmp_path / "a.mhd").write_text(text + end)
    assert read_volume(tmp_path / "a.mhd").millimetres is None
    (tmp_path / "a.mhd").write_text(text + "ElementSpacing = 1 1 2\n" + end)
    assert read_volume(tmp_path / "a.mhd").millimetres == (2.0, 1.0, 1.0)


def test_analyze_of_another_orientation_is_refused(tmp_path):
    native, affine = case()
    WITHOUT_ORIENTATION["a.hdr"](tmp_path / "a.hdr", native, affine)
    content = bytearray((tmp_path / "a.hdr").read_bytes())
    content[252] = 1  # orient: coronal
    (tmp_path / "a.hdr").write_bytes(bytes(content))
    assert code_of(tmp_path / "a.hdr") == "DAT-169"


def test_without_the_library_the_error_has_the_command(tmp_path, monkeypatch):
    native, affine = case()
    write_itk(tmp_path / "a.mha", native, affine)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", absent)
    with pytest.raises(FedsgcgError) as caught:
        read_volume(tmp_path / "a.mha")
    assert caught.value.code == "DAT-160"
    assert 'pip install "fedsgcg[formats]"' in caught.value.problems[0].action


def test_a_colour_picture_saved_as_a_volume_is_named(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "i.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((20, 30, 1), np.uint8), np.eye(4)), tmp_path / "m.nii.gz")
    image, mask = (read_volume(tmp_path / name) for name in ("i.nii.gz", "m.nii.gz"))
    with pytest.raises(FedsgcgError) as caught:
        check_geometry(image, mask, "case")
    (problem,) = caught.value.problems
    assert problem.code == "DAT-104"
    assert "20x30x3" in problem.expected
    assert "20x30x1" in problem.found
    assert "colour picture" in problem.action
    assert "PNG" in problem.action


def test_a_header_that_announces_more_than_the_file_can_hold_is_refused(tmp_path):
    native, _ = case()
    image = sitk.GetImageFromArray(native)
    for name, packed in (("a.mha", True), ("b.mha", False), ("c.nrrd", True)):
        sitk.WriteImage(image, tmp_path / name, useCompression=packed)
        content = (tmp_path / name).read_bytes()
        sizes = " ".join(map(str, native.shape[::-1])).encode()
        (tmp_path / name).write_bytes(content.replace(sizes, b"900 900 900", 1))
        with pytest.raises(FedsgcgError, match="truncated"):
            read_volume(tmp_path / name)


SHARES = st.floats(0, 1, exclude_max=True)


@settings(deadline=None, max_examples=120)
@given(
    name=st.sampled_from([*WRITERS, *WITHOUT_ORIENTATION]),
    number=st.integers(0, 7),
    changes=st.lists(st.tuples(SHARES, st.integers(0, 255), st.booleans()), max_size=8),
    kept=st.one_of(st.just(1.0), SHARES),
)
def test_law_a_spoiled_file_is_read_or_refused_with_a_code(
    tmp_path_factory, name, number, changes, kept
):
    folder = tmp_path_factory.mktemp("spoiled")
    native, affine = case()
    {**WRITERS, **WITHOUT_ORIENTATION}[name](folder / name, native, affine)
    files = files_of(folder / name)
    file = files[number % len(files)]
    content = bytearray(file.read_bytes())
    for place, value, in_header in changes:
        reach = min(len(content), 400) if in_header else len(content)
        content[int(place * reach)] = value
    file.write_bytes(bytes(content[: round(kept * len(content))]))
    for mask in (False, True):
        with contextlib.suppress(FedsgcgError):
            assert read_volume(folder / name, mask=mask).array.ndim == 3
    slices_in(folder / name)


def test_every_format_of_the_table_has_a_reader():
    for form in FORMATS:
        assert callable(form.reader.read)
        assert callable(form.reader.shape)


def test_a_folder_and_a_file_without_suffix_can_be_dicom(tmp_path):
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    assert format_of(tmp_path / "IM0001") is DICOM
    assert format_of(tmp_path) is DICOM
    assert format_of(tmp_path / "scan.vtk") is None
