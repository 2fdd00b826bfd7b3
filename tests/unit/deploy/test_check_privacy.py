"""`fedsgcg-site check` on what the floors mean for this hospital's own data."""

import csv
from pathlib import Path

import pytest

from fedsgcg.common.wire import messages as wire
from fedsgcg.deploy.site.check import examine_sample
from fedsgcg.deploy.site.check_files import examine_files
from fedsgcg.deploy.site.findings import Finding
from tests.support import sites
from tests.support.policed import Hospital, keep_patients


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return sites.hospitals(tmp_path / "data", cases=4)


def without_patient_ids(root: Path, *names: str) -> None:
    path = root / "manifest.csv"
    head, *rows = csv.reader(path.read_text().splitlines())
    place = head.index("patient_id")
    for row in rows:
        if not names or row[place] in names:
            row[place] = ""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def findings(hospital: Hospital) -> dict[str, Finding]:
    found, _ = examine_files(
        hospital.policy, hospital.plan().data, heldout=False, progress=lambda done, total: None
    )
    return {finding.name: finding for finding in found if finding.area == "site"}


@pytest.mark.parametrize(("names", "number"), [((), 4), (("North-001",), 1)])
@pytest.mark.attack("cases-as-patients")
def test_cases_without_patient_id_are_reported_as_patients(data, tmp_path, names, number):
    without_patient_ids(data, *names)
    found = findings(Hospital(data, tmp_path / "kit"))["patient_id"]
    assert (found.verdict, found.code) == ("warn", "SITE-519")
    assert found.found.startswith(f"{number} of 4 cases without patient_id: each is one")


def test_a_manifest_with_patient_ids_gives_no_such_finding(data, tmp_path):
    assert "patient_id" not in findings(Hospital(data, tmp_path / "kit"))


def test_too_few_patients_or_slices_are_reported_before_the_federation(data, tmp_path):
    few = findings(Hospital(data, tmp_path / "kit", {"round_slices": 1000}))["slices"]
    assert (few.verdict, few.code) == ("warn", "SITE-513")
    keep_patients(data, 1)
    one = findings(Hospital(data, tmp_path / "kit"))["patients"]
    assert "nothing of this site's training leaves" in one.action


def test_check_splits_as_training_does(data, tmp_path):
    """The doctor's numbers are those of the secret split, with the site's own fraction."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.5, "patient_floor": 1})
    details = hospital.ask(wire.ENROL, number=0).details
    assert details["patients"] == {"train": 2, "validation": 2, "test": 0}
    assert "patients: 2 train, 2 validation" in findings(hospital)["cases"].found


def test_settings_of_the_kit_that_differ_from_the_accepted_ones_are_named(data, tmp_path):
    hospital = Hospital(data, tmp_path / "kit")
    assert examine_sample(hospital.policy, hospital.plan()) == []
    assert not (tmp_path / "kit/home/sample.yaml").exists()
    hospital.ask(wire.ENROL, number=0)
    assert examine_sample(hospital.policy, hospital.plan()) == []
    (found,) = examine_sample(hospital.policy, hospital.plan("data.image_size=48"))
    assert (found.name, found.verdict, found.code) == ("data.image_size", "warn", "POL-722")
    assert "32" in found.found
