"""Laws of the split: by patient, stable, and near the share that was asked for."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.clients.data.case_files import CaseFile, split_of, splits

patients = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=30
)
fractions = st.floats(0.0, 0.99)


def cases_of(names):
    return [
        CaseFile("S", f"case{number}", Path("i"), Path("m"), name, None)
        for number, name in enumerate(names)
    ]


@given(patients, fractions)
def test_all_cases_of_a_patient_share_a_split(names, fraction):
    chosen = splits(cases_of(names), fraction, heldout=False)
    assert len(set(zip(names, chosen, strict=True))) == len(set(names))
    assert set(chosen) <= {"train", "validation"}
    assert "train" in chosen


@given(patients, patients, fractions)
def test_new_cases_move_no_patient(names, more, fraction):
    """Except for the special case of `splits`: a hospital without any training patient."""
    before, after = (
        splits(cases_of(names), fraction, heldout=False),
        splits(cases_of([*names, *more]), fraction, heldout=False),
    )
    by_hash = [split_of(name, fraction) for name in names]
    if "train" in by_hash:
        assert before == after[: len(names)] == tuple(by_hash)


@given(patients, fractions, st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_matter(names, fraction, random):
    cases = cases_of(names)
    shuffled = random.sample(cases, len(cases))
    by_name = dict(
        zip(
            [case.name for case in shuffled], splits(shuffled, fraction, heldout=False), strict=True
        )
    )
    assert [by_name[case.name] for case in cases] == list(splits(cases, fraction, heldout=False))


@given(patients, st.tuples(fractions, fractions))
def test_a_larger_share_only_adds_validation_patients(names, pair):
    small, large = (
        ({name for name in names if split_of(name, share) == "validation"})
        for share in sorted(pair)
    )
    assert small <= large


@given(patients, fractions)
def test_a_held_out_hospital_only_tests(names, fraction):
    assert set(splits(cases_of(names), fraction, heldout=True)) == {"test"}


def test_the_share_is_reached_over_many_patients():
    """5000 draws at 0.2 have a standard deviation of 28."""
    for kind in ("P{}", "sub-{:05d}", "Hospital A/{}"):
        count = sum(split_of(kind.format(number), 0.2) == "validation" for number in range(5000))
        assert abs(count - 1000) < 140
