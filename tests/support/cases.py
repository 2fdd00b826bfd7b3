"""Small volumes of known pixels on disk, and the store of a hospital that has them."""

import numpy as np

from fedsgcg.clients.data.case_files import discover_sites, open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.images.read import affine_as, write_volume


def write_case(folder, name, image, mask, codes=("L", "P", "S")):
    """Write one canonical (Z, Y, X) case with spacing (3, 2, 1) mm, offset by a hash of its name.

    Without the offset two cases would be the same image, of which the second is left out. After
    scaling they are still equal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = image + np.array(sum(name.encode()), image.dtype)
    affine = affine_as(codes, np.diag([-1.0, -2.0, 3.0, 1.0]), image.shape)
    write_volume(folder / f"{name}_image.nii.gz", image, affine)
    write_volume(folder / f"{name}_mask.nii.gz", mask, affine)


def ramp(z=4, side=32):
    """Return an image (Z, side, side) with values z to z + 1 in slice z; a mask in slices 1, 2."""
    image = (
        np.arange(z)[:, None, None] * 100
        + np.linspace(0, 99, side)[None, None, :]
        + np.zeros((z, side, 1))
    )
    mask = np.zeros((z, side, side), np.uint8)
    mask[1:3, 4:20, 8:16] = 1
    return image.astype(np.int16), mask


def store_of(root, data, cache, site=None, heldout=False):
    site = site or discover_sites(root)[0]
    return open_store(open_site(root, site, data), data, cache, heldout=heldout)


def three_cases(folder, make_data):
    """Return root, data settings and cache of a hospital with three cases of known pixels."""
    for name in ("a", "b", "c"):
        write_case(folder / "data" / "S", name, *ramp())
    return (
        folder / "data",
        make_data(image_size=32, intensity="minmax", validation_fraction=0.0),
        folder / "cache",
    )
