"""Masks of several structures, one layer each: as class indices.

Layers come from one mask file a structure (disc and cup, for example) or from the segments of a
DICOM segmentation. A layer's name is a structure or a class of the data settings. Structures may be
nested: a voxel of the cup belongs to the disc as well.

Legend: S = layers; Z, Y, X = slices, rows, columns of the canonical image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.names import number_of

OUTSIDE: Final = 0.05
"""Largest share of an inner structure's voxels outside its outer one: contours that were drawn
separately cross by a pixel; more means that two files were exchanged."""


@dataclass(frozen=True)
class Layers:
    """Binary masks on the grid of an image.

    Attributes:
        names: Name of each layer.
        masks: (S, Z, Y, X), or (S, H, W) of a picture.
        numbers: Number of each layer, empty if they have none.
        absent_is_empty: Whether a structure without a layer is not in the image; otherwise it may
            not have been drawn, which is an error.
    """

    names: tuple[str, ...]
    masks: NDArray[np.bool_]
    numbers: tuple[int, ...] = ()
    absent_is_empty: bool = False


def class_map(
    layers: Layers,
    classes: Mapping[str, Sequence[int]],
    structures: Mapping[str, Sequence[int]],
    where: str,
) -> NDArray[np.uint8]:
    """Return the class index of every voxel.

    A voxel's class is the one that is in exactly the voxel's layers. A voxel of an inner structure
    slightly outside its outer one counts as inside both (`OUTSIDE`).

    Args:
        layers: The masks.
        classes: Class name -> label values, background first.
        structures: Structure name -> indices of its classes.
        where: Name of the case in an error.

    Raises:
        FedsgcgError: DAT-165 for layers whose names do not fit the classes or do not separate them,
            DAT-166 for voxels in structures that exclude each other.
    """
    covered = _covered(layers, classes, structures, where)
    names = list(classes)
    patterns = [
        sum(1 << bit for bit, group in enumerate(covered) if index in group)
        for index in range(len(names))
    ]
    # A class without a layer of its own looks like the background: empty, or not drawn.
    known: dict[int, int] = {0: 0}
    for index, pattern in enumerate(patterns[1:], 1):
        if pattern == 0 and layers.absent_is_empty:
            continue
        if pattern in known:
            raise _not_separated(names[known[pattern]], names[index], layers, where)
        known[pattern] = index
    codes = np.zeros(layers.masks.shape[1:], np.uint64)
    for bit, mask in enumerate(layers.masks):
        codes |= mask.astype(np.uint64) << np.uint64(bit)
    found, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    sizes = [int(mask.sum()) for mask in layers.masks]
    table = np.zeros(len(found), np.uint8)
    for row, (code, count) in enumerate(zip(found.tolist(), counts.tolist(), strict=True)):
        table[row] = _class_of(code, count, known, sizes, layers, where)
    return np.asarray(table[inverse.reshape(codes.shape)])


def plain(name: str) -> str:
    """Return a name without case, spaces, hyphens, underscores and other punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())


def _covered(
    layers: Layers,
    classes: Mapping[str, Sequence[int]],
    structures: Mapping[str, Sequence[int]],
    where: str,
) -> list[frozenset[int]]:
    """Return the class indices of each layer: by its name, or by its number if no name is known."""
    meaning = {plain(name): frozenset({index}) for index, name in enumerate(classes) if index}
    meaning |= {plain(name): frozenset(group) for name, group in structures.items()}
    by_name = [meaning.get(plain(name)) for name in layers.names]
    if not any(by_name) and layers.numbers:
        values = {
            value: frozenset({index})
            for index, group in enumerate(classes.values())
            for value in group
            if index
        }
        by_name = [values.get(number) for number in layers.numbers]
    unknown = [name for name, group in zip(layers.names, by_name, strict=True) if group is None]
    twice = len({plain(name) for name in layers.names}) < len(layers.names)
    if unknown or twice or len(layers.names) > 63:
        shown = ", ".join((unknown or layers.names)[:6])
        raise fail(
            "DAT-165",
            found=f"masks named {shown}" + (", a name twice" if twice else ""),
            expected="names of " + ", ".join(dict.fromkeys([*structures, *list(classes)[1:]])),
            action="Rename the masks or segments, or declare them in data.classes and "
            "data.structures.",
            where=where,
        )
    return [group for group in by_name if group is not None]


def _class_of(
    code: int,
    count: int,
    known: Mapping[int, int],
    sizes: Sequence[int],
    layers: Layers,
    where: str,
) -> int:
    """Return the class of voxels in the layers whose bits are set."""
    if code in known:
        return known[code]
    bits = [bit for bit in range(len(layers.names)) if code >> bit & 1]
    around = sorted((one for one in known if one & code == code), key=int.bit_count)
    single = len(around) == 1 or (len(around) > 1 and around[0] & around[1] == around[0])
    if around and single and count <= OUTSIDE * min(sizes[bit] for bit in bits):
        return known[around[0]]
    inside = " and ".join(layers.names[bit] for bit in bits)
    outer = [layers.names[bit] for bit in range(len(sizes)) if around and around[0] >> bit & 1]
    found = f"{number_of(count, 'voxel')} in {inside} at once"
    expected, action = "structures that exclude each other", "Correct the masks."
    if around:
        missing = [name for name in outer if name not in inside.split(" and ")]
        found = f"{number_of(count, 'voxel')} in {inside}, outside {' and '.join(missing)}"
        expected = f"{inside} inside {' and '.join(missing)} ({OUTSIDE:.0%} may be outside)"
        action = "Check whether two masks were exchanged, and correct them."
    raise fail("DAT-166", found=found, expected=expected, action=action, where=where)


def _not_separated(first: str, second: str, layers: Layers, where: str) -> FedsgcgError:
    action = (
        f"Add the mask of {second}, an empty one if it is not in the image; or remove the class "
        "from data.classes."
    )
    found = f"masks of {', '.join(layers.names)}: none separates {second} from {first}"
    expected = "a mask for each structure"
    return fail("DAT-165", found=found, expected=expected, action=action, where=where)
