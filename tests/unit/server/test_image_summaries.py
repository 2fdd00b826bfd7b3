"""Summaries of images leave a hospital by consent, and only those of hospitals that train count."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.files.disk import Disk
from fedsgcg.common.image_summary import IMAGE_SUMMARY, HospitalSummary, merge_summaries
from fedsgcg.common.wire import messages as wire
from fedsgcg.server.sites.enrolment import Member
from fedsgcg.server.sites.image_summaries import FILE, record_summaries
from tests.support import sites
from tests.support.policed import Hospital
from tests.unit.common.test_image_summary import hospital

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
names = ("patients", "kind", "shape", "longest", "spacing", "extent", "values")


@given(
    st.builds(hospital, st.integers(1, 50), st.floats(0.1, 5), st.floats(10, 600)),
    st.sampled_from(names),
    json_values,
)
def test_a_summary_survives_the_message_and_anything_else_is_none_or_can_be_merged(
    summary, name, value
):
    tree = json.loads(json.dumps(summary.as_dict()))
    assert HospitalSummary.from_dict(tree, 50) == summary
    found = HospitalSummary.from_dict(tree | {name: value}, 50)
    if found is not None:
        assert found.patients <= 50
        assert merge_summaries({"A": found})["image_size"] % 16 == 0
    assert HospitalSummary.from_dict(value, 50) is None


def member(site: str, summary: object, patients: int) -> Member:
    details = {IMAGE_SUMMARY: summary, "patients": {"train": patients}}
    return Member(site, 1, details)


def test_only_hospitals_that_train_count_and_none_with_more_patients_than_it_enrolled(
    tmp_path,
):
    plan = replace(
        Hospital(tmp_path / "data", tmp_path / "kit").plan(heldout="South"), output=str(tmp_path)
    )
    record_summaries(plan, {}, Disk())
    assert not (tmp_path / FILE).exists()
    near, far = hospital(4, 0.5, 160.0), hospital(1000, 2.0, 160.0)
    members = {
        "North": member("North", near.as_dict(), 4),
        "East": member("East", far.as_dict(), 3),
        "South": member("South", hospital(9, 1.0, 900.0).as_dict(), 9),
        "West": member("West", {"patients": "many"}, 9),
    }
    record_summaries(plan, members, Disk())
    record = json.loads((tmp_path / FILE).read_text())
    assert set(record["hospitals"]) == {"North", "East"}
    assert record["hospitals"]["East"]["patients"] == 3
    # 4 patients against 3: the median voxel is North's; 160 mm are 320 pixels.
    assert (record["plan"]["spacing"], record["plan"]["image_size"]) == (0.5, 320)


def test_a_hospital_states_the_summary_of_its_training_images_only_with_consent(tmp_path):
    root = sites.hospitals(tmp_path / "data", cases=8)
    silent = Hospital(root, tmp_path / "silent")
    assert IMAGE_SUMMARY not in silent.ask(wire.ENROL, number=0).details
    sharing = [*silent.policy.sharing, IMAGE_SUMMARY]
    open_one = Hospital(root, tmp_path / "open", {"sharing": tuple(sharing)})
    reply = open_one.ask(wire.ENROL, number=0)
    found = HospitalSummary.from_dict(reply.details[IMAGE_SUMMARY], 50)
    assert found is not None
    assert found.patients == reply.details["patients"]["train"]
    ledger = (tmp_path / "open" / "home" / "ledger.jsonl").read_text()
    assert IMAGE_SUMMARY in ledger
    tested = open_one.ask(wire.ENROL, open_one.plan(heldout="North"), number=0)
    assert tested.error == ""
    assert IMAGE_SUMMARY not in tested.details, "a held-out hospital plans nothing"
