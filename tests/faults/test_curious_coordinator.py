"""A coordinator that follows the protocol, but asks so as to learn about single patients."""

import json
import shutil
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.clients.data.case_files import validation_patients
from fedsgcg.clients.guard.releases import Sample, remember, smallest_group
from fedsgcg.clients.guard.site_secret import split_salt
from fedsgcg.common.wire import messages as wire
from tests.support import sites
from tests.support.policed import Hospital, keep_patients

CLASSES = {"options": {"classes": True}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return sites.hospitals(tmp_path / "data", cases=8)


def counts_at(hospital: Hospital, fraction: float) -> dict[str, dict[str, int | None]]:
    details = hospital.ask(
        wire.ENROL, hospital.plan(f"data.validation_fraction={fraction}"), 0
    ).details
    return {name: details[name] for name in ("cases", "patients", "slices")}


@pytest.mark.attack("membership-by-splits")
def test_bisection_of_the_validation_fraction_finds_no_patient_id(data, tmp_path):
    """Membership oracle: the counts jump where the fraction passes the hash of an id."""
    hospital = Hospital(data, tmp_path / "kit")
    ids = [f"North-{number:03d}" for number in range(1, 9)]
    hashes = {  # by bisection, as the coordinator computes the hash of an id that it guesses
        name: next((f for f in np.linspace(0, 0.99, 398) if name in validation_patients(ids, f)), 1)
        for name in ids
    }
    around = [value for mark in hashes.values() for value in (mark - 0.0025, mark)]
    seen = {json.dumps(counts_at(hospital, min(0.99, max(0.0, value)))) for value in around}
    assert len(seen) == 1, "the counts depend on the coordinator's fraction"


@pytest.mark.attack("membership-by-splits")
def test_two_sites_split_the_same_ids_differently_and_each_always_alike(tmp_path):
    """Membership oracle: no hash that the coordinator can compute decides the split."""
    ids = [f"p{number}" for number in range(200)]
    salts = [split_salt(Hospital(tmp_path, tmp_path / name).policy) for name in ("a", "b", "a")]
    assert salts[0] == salts[2] != salts[1]
    chosen = [validation_patients(ids, 0.2, salt) for salt in salts]
    assert chosen[0] != chosen[1]
    assert chosen[0] != validation_patients(ids, 0.2)


@pytest.mark.parametrize(("patients", "fraction", "expected"), [(10, 0.2, 2), (12, 0.25, 3)])
def test_the_secret_split_keeps_the_sites_fraction(tmp_path, patients, fraction, expected):
    ids = [f"p{number}" for number in range(patients)]
    hospital = Hospital(tmp_path, tmp_path / "kit", {"validation_fraction": fraction})
    salt = split_salt(hospital.policy)
    assert len(validation_patients(ids, fraction, salt)) == expected


@pytest.mark.attack("small-counts")
def test_a_count_below_the_floor_is_suppressed_and_differs_from_zero(data, tmp_path):
    """Row 14, row 48: one validation patient and none at all are two different statements."""
    few = Hospital(data, tmp_path / "few", {"validation_fraction": 0.13})
    details = few.ask(wire.ENROL, number=0).details
    for kind in ("cases", "patients", "slices"):
        assert details[kind]["validation"] is None
        assert details[kind]["test"] == 0
        assert details[kind]["train"] > 0
    trained = few.ask(wire.TRAIN, few.plan("method=source"))
    assert trained.error == ""
    assert "validation_dice" not in trained.metrics
    assert "validation_cases" not in trained.metrics


@pytest.mark.attack("small-counts")
def test_a_site_below_its_floor_does_not_enrol(data, tmp_path):
    """Row 48: a hospital with one training patient is left out before the first round."""
    keep_patients(data, 1)
    hospital = Hospital(data, tmp_path / "kit")
    assert hospital.ask(wire.ENROL, number=0).error == "POL-720"
    assert hospital.ask(wire.TRAIN, hospital.plan("method=source")).error == "POL-720"


@pytest.mark.attack("hashed-ids")
def test_the_digest_of_the_data_confirms_no_guess(data, tmp_path):
    """Membership oracle: two sites with the same files send different digests."""
    found = [
        Hospital(data, tmp_path / name).ask(wire.ENROL, number=0).details["data"]
        for name in ("a", "b", "a")
    ]
    assert found[0] == found[2] != found[1]


@pytest.mark.attack("differencing")
def test_subtracting_two_statistics_releases_gives_no_patient(data, tmp_path):
    """Row 62: the second release would differ by one patient, although both have many."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.0})
    keep_patients(data, 7)
    first = hospital.ask(wire.STATISTICS, **CLASSES)
    assert first.error == ""
    keep_patients(data, 8)
    for message in (wire.STATISTICS, wire.TRAIN, wire.ENROL):
        second = hospital.ask(message, number=2)
        assert second.error == "POL-720"
        assert second.statistics is second.weights is second.moments is None
    note = json.loads((tmp_path / "kit/home/ledger.jsonl").read_text().splitlines()[-1])["note"]
    assert "patient_floor" in note
    keep_patients(data, 7)  # the hospital holds the new patient back, until there are two
    assert hospital.ask(wire.STATISTICS, number=2, **CLASSES).error == ""


def test_two_new_patients_may_join_at_once(data, tmp_path):
    """Row 62: a difference of as many patients as the floor is not refused."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.0})
    keep_patients(data, 6)
    assert hospital.ask(wire.STATISTICS, **CLASSES).error == ""
    keep_patients(data, 8)
    assert hospital.ask(wire.STATISTICS, number=2, **CLASSES).error == ""


def test_a_class_that_gains_one_patient_is_withheld(data, tmp_path):
    """Row 62: of two new patients only one has the organ; the others' classes still leave."""
    path = data / "North/North-008_mask.nii.gz"
    mask = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(mask.shape, np.uint8), mask.affine), path)
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.0})
    keep_patients(data, 6)
    before = hospital.ask(wire.STATISTICS, **CLASSES).statistics
    keep_patients(data, 8)
    reply = hospital.ask(wire.STATISTICS, number=2, **CLASSES)
    assert before.count.min() > 0
    assert reply.statistics.count[0] > before.count[0]
    assert reply.statistics.count[1] == 0
    assert reply.details["withheld"] == [list(hospital.plan().data.classes)[1]]


def test_a_corrected_mask_counts_as_another_patient(data, tmp_path):
    """Row 62: two releases over the same ids, one mask replaced, give that patient's change."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.0})
    assert hospital.ask(wire.STATISTICS, **CLASSES).error == ""
    shutil.copy(data / "North/North-001_mask.nii.gz", data / "North/North-002_mask.nii.gz")
    assert hospital.ask(wire.STATISTICS, number=2, **CLASSES).error == "POL-720"


@pytest.mark.parametrize(
    "change",
    [
        "data.train_slices=foreground",
        "data.classes={background: [0, 2], gland: [1]}",
        "data.image_size=48",
        "data.label_tolerance=0.3",
        "data.intensity=minmax",
        "prototypes.norm_mode=running",
    ],
)
@pytest.mark.attack("chosen-sample")
def test_a_coordinator_does_not_choose_the_sample(data, tmp_path, change):
    """Row 62: settings that define the sample are those of the first request."""
    hospital = Hospital(data, tmp_path / "kit")
    assert hospital.ask(wire.ENROL, number=0).error == ""
    changed = hospital.plan(change)
    assert hospital.ask(wire.STATISTICS, changed, **CLASSES).error == "POL-722"
    note = json.loads((tmp_path / "kit/home/ledger.jsonl").read_text().splitlines()[-1])["note"]
    assert change.partition("=")[0] in note
    assert hospital.ask(wire.STATISTICS, **CLASSES).error == ""


def test_the_hospital_may_accept_a_further_sample(data, tmp_path):
    hospital = Hospital(data, tmp_path / "kit")
    hospital.ask(wire.ENROL, number=0)
    path = tmp_path / "kit/home/sample.yaml"
    path.write_text(path.read_text().replace("data.image_size:\n- 32", "data.image_size: [32, 48]"))
    for side in (48, 32):
        assert hospital.ask(wire.ENROL, hospital.plan(f"data.image_size={side}"), 0).error == ""
    path.write_text("data.image_size: 32\n")
    assert hospital.ask(wire.ENROL, number=0).error == "SITE-501"


def test_a_study_of_rounds_folds_and_a_resume_is_not_refused(data, tmp_path):
    """Row 62: repeated statistics over the same patients are what every federation does."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.3, "releases": 6})
    # The model is untrained: its predictions may agree in the few cases that a secret split chose.
    scored = ("", "POL-724")
    for heldout, seed in (("South", 0), ("", 1)):
        plan = hospital.plan(f"seed={seed}", heldout=heldout)
        assert hospital.ask(wire.ENROL, plan, 0).error == ""
        for number in (1, 2, 2):  # round 2 is repeated, as after a restart of the coordinator
            assert hospital.ask(wire.TRAIN, plan, number).error == ""
        assert hospital.ask(wire.STATISTICS, plan, 2, **CLASSES).error == ""
        assert hospital.ask(wire.EVALUATE, plan, 2, options={"split": "validation"}).error in scored
    own_fold = hospital.plan(heldout="North")
    assert hospital.ask(wire.ENROL, own_fold, 0).error == ""
    assert hospital.ask(wire.EVALUATE, own_fold, 2, options={"split": "test"}).error in scored
    other = hospital.plan("seed=2")
    assert hospital.ask(wire.TRAIN, other, 1).error == "POL-721", "six releases were counted"


@pytest.mark.attack("many-evaluations")
def test_the_number_of_evaluations_is_limited(data, tmp_path):
    hospital = Hospital(data, tmp_path / "kit", {"evaluations": 2})
    plan = hospital.plan(heldout="North")
    models = [sites.weights(plan, seed) for seed in (0, 1, 1, 2)]
    errors = [
        hospital.ask(wire.EVALUATE, plan, weights=model, options={"split": "test"}).error
        for model in models
    ]
    assert errors == ["", "", "", "POL-721"]


def test_a_damaged_list_of_releases_lets_nothing_leave_and_a_torn_line_is_dropped(data, tmp_path):
    """Row 37: the memory of releases is not silently lost."""
    hospital = Hospital(data, tmp_path / "kit")
    assert hospital.ask(wire.STATISTICS, **CLASSES).error == ""
    path = tmp_path / "kit/home/releases.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"sample": "trai')
    assert hospital.ask(wire.STATISTICS, **CLASSES).error == ""
    assert path.read_bytes() == whole
    for damaged in (b"{}\n", b"not JSON\n", b'{"sample": "training", "key": 1}\n'):
        path.write_bytes(damaged + whole)
        assert hospital.ask(wire.STATISTICS, **CLASSES).error == "SITE-501"


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.steps_per_round=1", "method.batch_size=2"),
        ("method.steps_per_round=1", "method.batch_size=7"),
    ],
)
@pytest.mark.attack("small-round")
def test_a_round_of_one_step_on_few_slices_is_refused(data, tmp_path, overrides):
    """An update on two slices gives their gradient, from which images can be reconstructed."""
    hospital = Hospital(data, tmp_path / "kit")
    reply = hospital.ask(wire.TRAIN, hospital.plan("method=source", *overrides))
    assert (reply.error, reply.weights) == ("POL-723", None)
    enough = hospital.plan("method=source", "method.steps_per_round=1", "method.batch_size=16")
    assert hospital.ask(wire.TRAIN, enough).error == ""


def test_statistics_summed_in_training_need_whole_passes(data, tmp_path):
    """The sums of two rounds differ by the slices of one of them."""
    hospital = Hospital(data, tmp_path / "kit")
    online = ("prototypes.memory=online", "method.batch_size=8")
    partial = hospital.plan(*online, "method.steps_per_round=1")
    assert hospital.ask(wire.TRAIN, partial).error == "POL-723"
    assert hospital.ask(wire.TRAIN, hospital.plan(*online)).error == ""


PATIENTS = [f"p{number}" for number in range(6)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from(PATIENTS)), min_size=1, max_size=4),
    st.integers(1, 3),
)
@pytest.mark.attack("differencing")
def test_no_combination_of_accepted_releases_isolates_fewer_than_the_floor(
    tmp_path_factory, wanted, floor
):
    """Row 62, by brute force: weighted sums of the accepted samples, weights from -2 to 2."""
    home = tmp_path_factory.mktemp("home")
    accepted = []
    for number, members in enumerate(wanted):
        sample = Sample("training", str(number), lambda members=members: frozenset(members))
        (answer,) = remember(home, [sample], floor)
        accepted += [members] if answer else []
        if answer:
            assert remember(home, [sample], floor) == [True]
    rows = np.array([[patient in sample for patient in PATIENTS] for sample in accepted])
    for weights in product(range(-2, 3), repeat=len(accepted)):
        covered = np.count_nonzero(np.array(weights) @ rows.astype(int)) if accepted else 0
        assert covered == 0 or covered >= floor


def test_the_smallest_group_by_hand():
    a, b = frozenset("abcd"), frozenset("abce")
    assert smallest_group([], a) == 4
    assert smallest_group([a], a) == 4
    assert smallest_group([a], b) == 1  # d, and e
    assert smallest_group([a], frozenset("abcdef")) == 2
    assert smallest_group([], frozenset()) == 0
