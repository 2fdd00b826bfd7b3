"""Hospitals state medians and quartiles; one plan follows from them by rules, checked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.image_summary import (
    LEAST_SIDE,
    MOST_SIDE,
    Facts,
    HospitalSummary,
    merge_summaries,
    summarise,
    weighted_median,
)
from fedsgcg.common.images.read import PICTURE


def scan(patient: str, side: float = 0.5, size: int = 320, **more) -> Facts:
    values = {
        "kind": "axial volume",
        "colour": False,
        "eight_bit": False,
        "shape": (20, size, size - 20),
        "spacing": (3.0, side, side),
        "values": (0.0, 100.0, 900.0),
    }
    return Facts(patient, **(values | more))


def hospital(patients: int, side: float, wide: float, **more) -> HospitalSummary:
    values = {
        "kind": "axial volume",
        "colour": False,
        "eight_bit": False,
        "shape": (20, 256, 256),
        "longest": wide / side,
        "spacing": (3.0, side, side),
        "extent": wide,
        "values": (0.0, 1.0, 2.0),
    }
    return HospitalSummary(patients, **(values | more))


hospitals = st.dictionaries(
    st.sampled_from("ABCDE"),
    st.builds(hospital, st.integers(1, 50), st.floats(0.1, 5), st.floats(10, 600)),
    min_size=1,
)


def test_a_summary_is_medians_and_an_upper_quartile_by_hand():
    found = summarise([scan("p1", 0.4), scan("p2", 0.5), scan("p3", 0.6), scan("p3", 1.0)])
    assert found is not None
    assert found.patients == 3
    assert found.shape == (20, 320, 300)
    assert found.spacing == (3.0, 0.55, 0.55)
    # 128, 160, 192 and 320 mm: the quartile is a quarter of the way from 192 to 320.
    assert found.extent == 224.0
    assert found.longest == 320.0
    assert found.values == (0.0, 100.0, 900.0)


def test_a_summary_covers_as_many_patients_as_the_floor_or_is_not_made():
    facts = [scan("p1"), scan("p1"), scan("p2")]
    assert summarise(facts, floor=2) is not None
    assert summarise(facts, floor=3) is None
    assert summarise([]) is None


def test_one_image_without_a_voxel_size_makes_the_spacing_unknown():
    found = summarise([scan("p1"), scan("p2", spacing=None)])
    assert found is not None
    assert (found.spacing, found.extent) == (None, None)


def test_the_plan_of_volumes_by_hand():
    """In-plane spacing is the median weighted by patients; the widest quartile fits."""
    plan = merge_summaries({"A": hospital(10, 0.5, 160.0), "B": hospital(30, 0.8, 200.0)})
    assert plan == {
        "image_size": 256,
        "spacing": 0.8,
        "aspect": "pad",
        "intensity": "percentile",
        "stack": 3,
    }
    # 500 pixels of 0.8 mm are more than the largest side: 400 mm / 384 pixels, rounded up.
    wide = merge_summaries({"A": hospital(10, 0.8, 400.0)})
    assert (wide["image_size"], wide["spacing"]) == (MOST_SIDE, 1.05)


def test_the_plan_of_pictures_by_hand():
    photographs = {
        "kind": PICTURE,
        "colour": True,
        "eight_bit": True,
        "shape": (1, 200, 300),
        "spacing": None,
        "extent": None,
    }
    plan = merge_summaries({"A": hospital(9, 1.0, 300.0, **photographs)})
    assert plan == {
        "image_size": 304,
        "spacing": 0.0,
        "aspect": "pad",
        "intensity": "fixed",
        "stack": 1,
    }


def test_nominal_spacing_is_not_used():
    plan = merge_summaries({"A": hospital(9, 0.5, 64.0)}, millimetres=False)
    assert (plan["spacing"], plan["image_size"]) == (0.0, 128)


def test_what_the_user_sets_is_kept_and_the_rest_fits_it():
    plan = merge_summaries({"A": hospital(10, 0.5, 160.0)}, given={"image_size": 64, "stack": 1})
    assert (plan["image_size"], plan["spacing"], plan["stack"]) == (64, 2.5, 1)


@given(hospitals)
def test_every_plan_is_possible_and_nothing_of_the_usual_size_is_made_smaller(summaries):
    plan = merge_summaries(summaries)
    side = plan["image_size"]
    assert side % 16 == 0
    assert LEAST_SIDE <= side <= MOST_SIDE
    widest = max(one.extent for one in summaries.values())
    assert side * plan["spacing"] >= widest * (1 - 1e-6)
    assert merge_summaries(dict(reversed(summaries.items()))) == plan


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_the_weighted_median_is_that_of_repeated_values(pairs):
    repeated = sorted(value for value, weight in pairs for _ in range(weight))
    expected = np.quantile(repeated, 0.5, method="inverted_cdf")
    assert weighted_median(pairs) == expected


def test_without_a_summary_or_with_two_kinds_there_is_no_plan():
    with pytest.raises(FedsgcgError) as caught:
        merge_summaries({})
    assert caught.value.code == "CFG-030"
    two = {"A": hospital(9, 0.5, 64.0), "B": hospital(9, 0.5, 64.0, kind="coronal volume")}
    with pytest.raises(FedsgcgError) as caught:
        merge_summaries(two)
    (problem,) = caught.value.problems
    assert (problem.code, problem.found) == (
        "CFG-031",
        "axial volume at A, coronal volume at B",
    )
