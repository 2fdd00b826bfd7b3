"""Laws of the split: by patient, as near to the share as whole patients allow, stable."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.clients.data.case_files import CaseFile, splits, validation_patients

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
patients = st.lists(names, min_size=1, max_size=30)
fractions = st.floats(0.0, 0.99)
salts = st.sampled_from([b"", b"s" * 32])
rules = st.sampled_from(["share", "hash"])


def cases_of(ids, stated=()):
    known = dict(stated)
    return [
        CaseFile("S", f"case{number}", Path("i"), Path("m"), name, known.get(name))
        for number, name in enumerate(ids)
    ]


@given(patients, fractions, rules)
def test_all_cases_of_a_patient_share_a_split(ids, fraction, rule):
    chosen = splits(cases_of(ids), fraction, heldout=False, rule=rule)
    assert len(set(zip(ids, chosen, strict=True))) == len(set(ids))
    assert set(chosen) <= {"train", "validation"}
    assert "train" in chosen


@given(patients, fractions, salts)
def test_the_share_is_as_near_as_whole_patients_allow(ids, fraction, salt):
    """No other number of patients that leaves one to train is nearer to the share."""
    number = len(set(ids))
    chosen = len(validation_patients(ids, fraction, salt))
    assert abs(chosen / number - fraction) <= 1 / number
    best = min(range(number), key=lambda count: abs(count - fraction * number))
    assert abs(chosen - fraction * number) <= abs(best - fraction * number) + 1e-9


@given(patients, names, fractions, salts)
def test_a_new_patient_moves_one_other_at_most_and_only_if_it_must(ids, new, fraction, salt):
    before = validation_patients(ids, fraction, salt)
    after = validation_patients([*ids, new], fraction, salt)
    known = set(ids)
    moved = {one for one in known if (one in before) != (one in after)}
    if new in known:
        assert not moved, "a further image of a known patient moves nobody"
        return
    grows = len(after) > len(before)
    # The new patient takes the free place, or stays in training while no place is free.
    if (new in after) == grows:
        assert not moved
    else:
        (one,) = moved
        assert (one in after) == grows


@given(patients, st.lists(names, max_size=10), fractions, salts)
def test_new_patients_move_at_most_as_many(ids, more, fraction, salt):
    before = validation_patients(ids, fraction, salt)
    after = validation_patients([*ids, *more], fraction, salt)
    moved = sum((one in before) != (one in after) for one in set(ids))
    assert moved <= len(set(more) - set(ids))


@given(patients, fractions, rules, st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_matter(ids, fraction, rule, random):
    cases = cases_of(ids)
    shuffled = random.sample(cases, len(cases))
    by_name = dict(
        zip(
            [case.name for case in shuffled],
            splits(shuffled, fraction, heldout=False, rule=rule),
            strict=True,
        )
    )
    found = splits(cases, fraction, heldout=False, rule=rule)
    assert [by_name[case.name] for case in cases] == list(found)


@given(patients, st.tuples(fractions, fractions), salts)
def test_a_larger_share_only_adds_validation_patients(ids, pair, salt):
    small, large = (validation_patients(ids, share, salt) for share in sorted(pair))
    assert small <= large


@given(patients, fractions, st.dictionaries(names, st.sampled_from(["train", "validation"])))
def test_stated_splits_stay_and_count_towards_the_share(ids, fraction, stated):
    found = dict(zip(ids, splits(cases_of(ids, stated), fraction, heldout=False), strict=True))
    assert {one: found[one] for one in found if one in stated} == {
        one: stated[one] for one in found if one in stated
    }
    free = [one for one in found if one not in stated]
    validating = sum(split == "validation" for split in found.values())
    if any(found[one] == "validation" for one in free):
        assert validating <= fraction * len(found) + 0.5


@given(patients, fractions)
def test_a_held_out_hospital_only_tests(ids, fraction):
    assert set(splits(cases_of(ids), fraction, heldout=True)) == {"test"}


@pytest.mark.parametrize(
    ("number", "expected"), [(1, 0), (2, 0), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3), (150, 30)]
)
def test_a_fifth_of_the_patients_by_hand(number, expected):
    ids = [f"p{one}" for one in range(number)]
    assert len(validation_patients(ids, 0.2)) == expected
