"""Finds how the structures of a data set overlap, from masks with one layer a structure.

Two structures may exclude each other (lesion and vessel), be nested (cup in disc) or cross. Each
set of structures that a voxel is in becomes a class, and a structure consists of the classes that
it is in; then no mask is changed and none contradicts another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsgcg.common.images.layers import OUTSIDE, Layers
from fedsgcg.deploy.prepare.layouts import plain_name

Inside = frozenset[str]
"""Names of the structures that a voxel is in."""


class Overlaps:
    """The sets of structures that occur in the voxels of a data set.

    Attributes:
        names: All structures, in the order in which they are found.
        seen: Set of structures -> masks with such voxels.
        clear: Sets that occur in more voxels of a mask than contours which cross by a pixel have.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.seen: Counter[Inside] = Counter()
        self.clear: set[Inside] = set()

    def add(self, layers: Layers) -> dict[str, Any]:
        """Count the sets of one case; return what `restore` needs to count them again."""
        names = [plain_name(name) for name in layers.names]
        codes = np.zeros(layers.masks.shape[1:], np.uint64)
        for bit, mask in enumerate(layers.masks):
            codes |= mask.astype(np.uint64) << np.uint64(bit)
        sizes = [int(mask.sum()) for mask in layers.masks]
        found, counts = np.unique(codes, return_counts=True)
        sets: list[tuple[list[str], bool]] = []
        for code, count in zip(found.tolist(), counts.tolist(), strict=True):
            bits = [bit for bit in range(len(names)) if code >> bit & 1]
            clear = bool(bits) and count > OUTSIDE * min(sizes[bit] for bit in bits)
            sets.append(([names[bit] for bit in bits], clear))
        record = {"names": names, "sets": sets}
        self.restore(record)
        return record

    def restore(self, record: Mapping[str, Any]) -> None:
        """Count the sets of a case by what `add` returned for it."""
        self.names += [name for name in record["names"] if name not in self.names]
        for names, clear in record["sets"]:
            inside = frozenset(names)
            self.seen[inside] += 1
            if clear:
                self.clear.add(inside)

    def sets(self) -> list[Inside]:
        """Return the sets that need a class: one structure first, in the order of the names.

        A few voxels of an inner structure outside its outer one are inside both
        (`common.images.layers.class_map`), so they need none.
        """
        kept = {inside for inside in self.seen if inside and not self._is_stray(inside)}
        kept |= {frozenset({name}) for name in self.names if not any(name in one for one in kept)}
        place = {name: number for number, name in enumerate(self.names)}
        return sorted(kept, key=lambda one: (len(one), sorted(place[name] for name in one)))

    def _is_stray(self, inside: Inside) -> bool:
        if inside in self.clear:
            return False
        around = sorted((one for one in self.clear if one > inside), key=len)
        return len(around) == 1 or (len(around) > 1 and around[0] < around[1])

    def classes(self) -> dict[int, str]:
        """Return label value -> name of the class, without the background."""
        sets = self.sets()
        return {value: _class_name(one, sets) for value, one in enumerate(sets, 1)}

    def structures(self) -> dict[str, tuple[int, ...]]:
        """Return structure -> the label values of its classes; {} if no two overlap."""
        sets = self.sets()
        if all(len(one) == 1 for one in sets):
            return {}
        return {
            name: tuple(value for value, one in enumerate(sets, 1) if name in one)
            for name in self.names
        }

    def counts(self) -> Counter[int]:
        """Return label value -> masks with it; 0 is the background."""
        values = {one: value for value, one in enumerate(self.sets(), 1)} | {frozenset(): 0}
        return Counter({values[one]: n for one, n in self.seen.items() if one in values})


def _class_name(inside: Inside, sets: Sequence[Inside]) -> str:
    """Return a name for the voxels in exactly these structures, unlike those of other sets."""
    own = [name for name in sorted(inside) if [one for one in sets if name in one] == [inside]]
    if len(own) == 1:
        return own[0]
    joined = "_and_".join(sorted(inside))
    return joined if len(inside) > 1 else f"{joined}_only"
