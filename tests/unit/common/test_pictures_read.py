"""Reading pictures: colours, TIFF as a viewer shows it, masks, and turned photographs."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from fedsgcg.common.images.read import read_volume
from tests.support.unreadable import code_of


def test_grey_colour_and_alpha_pictures(tmp_path):
    colours = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(colours[..., :3]).save(tmp_path / "rgb.bmp")
    Image.fromarray(colours, "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.jpg", quality=100)
    for name, channels in (("grey.png", 1), ("rgb.bmp", 3), ("rgba.png", 3)):
        picture = read_volume(tmp_path / name)
        assert picture.is_picture
        assert picture.spacing == (1.0, 1.0, 1.0)
        np.testing.assert_array_equal(picture.array, colours[..., :channels].transpose(2, 0, 1))
    np.testing.assert_allclose(read_volume(tmp_path / "grey.jpg").array[0], colours[..., 0], atol=4)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_sixteen_bit_tiff_keeps_its_values(tmp_path, compression):
    grey = np.array([[0, 1000], [40000, 65535]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tiff", grey, compression=compression)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tiff").array[0], grey)
    colours = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    tifffile.imwrite(tmp_path / "b.tif", colours, photometric="rgb", compression=compression)
    np.testing.assert_array_equal(read_volume(tmp_path / "b.tif").array, colours.transpose(2, 0, 1))
    tifffile.imwrite(
        tmp_path / "c.tif",
        colours.transpose(2, 0, 1).copy(),
        photometric="rgb",
        planarconfig="separate",
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "c.tif").array, colours.transpose(2, 0, 1))


def test_lzw_tiff_as_scanners_write_it(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "a.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").array[0], grey)


def test_a_tiff_of_many_colour_pages_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 8, 9, 3), np.uint8), photometric="rgb")
    assert code_of(tmp_path / "a.tif") == "DAT-106"


BILEVEL = {
    "none": None,
    "lzw": "tiff_lzw",
    "group4": "group4",
    "packbits": "packbits",
    "deflate": "tiff_adobe_deflate",
}


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression", BILEVEL.values(), ids=list(BILEVEL))
def test_a_tiff_is_read_as_a_viewer_shows_it_whether_white_or_black_is_zero(
    tmp_path, compression, photometric
):
    mask = np.zeros((48, 64), bool)
    mask[10:30, 15:40] = True
    Image.fromarray(mask).save(
        tmp_path / "a.tif", compression=compression, tiffinfo={262: photometric}
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif", mask=True).array[0], mask)
    if compression == "group4":
        return  # holds one bit a pixel alone
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(
        tmp_path / "b.tif", compression=compression, tiffinfo={262: photometric}
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "b.tif").array[0], grey)
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 200
    stored = 65535 - deep if photometric == 0 else deep
    Image.fromarray(stored).save(
        tmp_path / "c.tif", compression=compression, tiffinfo={262: photometric}
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "c.tif").array[0], deep)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_palette_tiff_gives_colours_as_an_image_and_indices_as_a_mask(tmp_path, compression):
    colours = np.random.default_rng(0).integers(20, 230, (48, 64, 3)).astype(np.uint8)
    palette = Image.fromarray(colours).quantize(128)
    palette.save(tmp_path / "p.tif", compression=compression)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_volume(tmp_path / "p.tif").array, expected)
    np.testing.assert_array_equal(
        read_volume(tmp_path / "p.tif", mask=True).array[0], np.asarray(palette)
    )


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_ink_colours_of_a_printed_tiff_are_turned_into_light(tmp_path, compression):
    inks = np.random.default_rng(0).integers(0, 256, (8, 9, 4)).astype(np.uint8)
    picture = Image.fromarray(inks, "CMYK")
    picture.save(tmp_path / "a.tif", compression=compression)
    expected = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").array, expected)


@pytest.mark.parametrize("thumbnail_first", [True, False])
@pytest.mark.parametrize("reduced", [0, 1])
def test_the_thumbnail_of_a_tiff_is_not_its_picture(tmp_path, thumbnail_first, reduced):
    colours = np.random.default_rng(0).integers(0, 256, (49, 64, 3)).astype(np.uint8)
    pages = [(colours[::4, ::4].copy(), reduced), (colours, 0)]
    with tifffile.TiffWriter(tmp_path / "t.tif") as file:
        for page, kind in pages if thumbnail_first else pages[::-1]:
            file.write(page, photometric="rgb", subfiletype=kind)
    np.testing.assert_array_equal(read_volume(tmp_path / "t.tif").array, colours.transpose(2, 0, 1))


def test_a_tiff_of_two_different_pictures_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "t.tif") as file:
        file.write(np.zeros((40, 64), np.uint8), photometric="minisblack")
        file.write(np.zeros((32, 20), np.uint8), photometric="minisblack")
    assert code_of(tmp_path / "t.tif") == "DAT-106"


def test_a_mask_in_a_lossy_format_is_refused_whatever_it_is_called(tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 15:40] = 1
    for name, options in (
        ("m.jpg", {}),
        ("m.jpeg", {"quality": 100}),
        ("m.tif", {"compression": "jpeg"}),
    ):
        Image.fromarray(mask).save(tmp_path / name, **options)
        assert code_of(tmp_path / name, mask=True) == "DAT-116", name
    (tmp_path / "m.png").write_bytes((tmp_path / "m.jpg").read_bytes())
    assert code_of(tmp_path / "m.png", mask=True) == "DAT-116"
    assert read_volume(tmp_path / "m.jpg").array.shape == (1, 48, 64), "images may be JPEG"
    assert read_volume(tmp_path / "m.tif").array.shape == (1, 48, 64)


def test_mask_pictures_give_label_values(tmp_path):
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.repeat(labels[..., None], 3, 2)).save(tmp_path / "equal.png")
    Image.fromarray(labels > 0).save(tmp_path / "binary.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "palette.png", mask=True).array[0], labels)
    np.testing.assert_array_equal(read_volume(tmp_path / "equal.png", mask=True).array[0], labels)
    np.testing.assert_array_equal(
        read_volume(tmp_path / "binary.png", mask=True).array[0], labels > 0
    )
    assert read_volume(tmp_path / "palette.png").array.shape == (3, 2, 2), (
        "as an image a palette means colours"
    )
    coloured = np.zeros((2, 2, 3), np.uint8)
    coloured[0, 0] = (255, 0, 0)
    Image.fromarray(coloured).save(tmp_path / "colours.png")
    assert code_of(tmp_path / "colours.png", mask=True) == "DAT-106"


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_read_as_people_see_it(tmp_path, suffix, orientation):
    """Each EXIF orientation, stored so that the upright picture is the same every time."""
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # a landmark in the upper left corner
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),  # shown after a quarter turn clockwise
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    path = tmp_path / f"picture.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(
            path, np.ascontiguousarray(turned), extratags=[(274, 3, 1, orientation, True)]
        )
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(np.ascontiguousarray(turned)).save(path, exif=exif)
    read = read_volume(path).array[0]
    assert read.shape == upright.shape
    assert np.abs(read - upright).max() < 20
