"""Classes that are made of overlapping structures give the structures back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.images.layers import OUTSIDE, Layers, class_map
from fedsgcg.deploy.prepare.structures import Overlaps

NAMES = ("disc", "cup", "vessel")
VOXELS = 12


def layers_of(bits: list[int], names: tuple[str, ...] = NAMES) -> Layers:
    """Return layers of a line of voxels; bit k of a voxel says whether it is in structure k."""
    codes = np.array(bits)
    return Layers(names, np.stack([codes >> k & 1 == 1 for k in range(len(names))]))


def settings_of(overlaps: Overlaps) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return classes and structures as the written settings have them, with class indices."""
    names = {0: "background"} | overlaps.classes()
    regions = overlaps.structures() or {name: (value,) for value, name in names.items() if value}
    assert len(set(names.values())) == len(names), "every class has a name of its own"
    classes = {name: [value] for value, name in names.items()}
    return classes, {name: list(values) for name, values in regions.items()}


voxels = st.lists(st.integers(0, 7), min_size=VOXELS, max_size=VOXELS)


@settings(max_examples=40)
@given(st.lists(voxels, min_size=1, max_size=4))
def test_law_every_structure_is_the_union_of_its_classes(cases: list[list[int]]) -> None:
    overlaps = Overlaps()
    for case in cases:
        overlaps.add(layers_of(case))
    classes, structures = settings_of(overlaps)
    assert set(structures) == set(NAMES)
    for case in cases:
        layers = layers_of(case)  # so few voxels that none is a crossing of contours
        found = class_map(layers, classes, structures, "case")
        for name, mask in zip(layers.names, layers.masks, strict=True):
            np.testing.assert_array_equal(np.isin(found, structures[name]), mask)


def test_the_edge_of_a_nested_structure_makes_no_class() -> None:
    disc, cup = np.zeros((2, 200), bool)
    disc[:100], cup[60:102] = True, True  # 2 of 42 voxels of the cup outside
    overlaps = Overlaps()
    overlaps.add(Layers(("disc", "cup"), np.stack([disc, cup])))
    assert 2 <= OUTSIDE * 42 < 3
    assert overlaps.classes() == {1: "disc_only", 2: "cup"}
    assert overlaps.structures() == {"disc": (1, 2), "cup": (2,)}
    classes, structures = settings_of(overlaps)
    found = class_map(Layers(("disc", "cup"), np.stack([disc, cup])), classes, structures, "case")
    assert found.tolist() == [1] * 60 + [2] * 42 + [0] * 98
    cup[102] = True  # 3 of 43: the structures cross
    overlaps.add(Layers(("disc", "cup"), np.stack([disc, cup])))
    assert overlaps.classes() == {1: "disc_only", 2: "cup_only", 3: "cup_and_disc"}
