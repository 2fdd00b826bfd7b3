"""A hospital with a `site.yaml` and without masks: what it does, refuses and sends."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import data_fingerprint, open_store
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.heads import CHILD, build_trained, state_of
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import ENROL, EVALUATE, STATISTICS, TRAIN
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.site.check_files import examine_files
from tests.support import sites
from tests.support.policed import Hospital

SEGCLR = ("method=segclr", "unlabelled=[North]")


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """North has no mask file at all; it only takes part without labels."""
    root = sites.hospitals(tmp_path / "data", cases=6)
    for mask in (root / "North").glob("*_mask.nii.gz"):
        mask.unlink()
    limits = {"patient_floor": 2, "round_slices": 4}
    return Hospital(root, tmp_path / "kit", {"roles": ("unlabelled",), **limits})


def weights_of(plan: Plan) -> Weights:
    return Weights.from_state(state_of(build_trained(plan, 0)))


def test_it_enrols_trains_and_measures_moments_without_a_mask(hospital: Hospital) -> None:
    plan = hospital.plan(*SEGCLR)
    model = weights_of(plan)
    enrolled = hospital.ask(ENROL, plan)
    assert enrolled.error == ""
    assert enrolled.details["cases"] == {"train": 6, "validation": 0, "test": 0}
    trained = hospital.ask(TRAIN, plan, weights=model)
    assert trained.error == ""
    assert trained.weights is not None
    assert trained.statistics is None
    assert not any(name.startswith(("validation", "loss_supervised")) for name in trained.metrics)
    before, after = model.to_state(), trained.weights.to_state()
    moved = {name.split(".")[0] for name in before if (before[name] != after[name]).any()}
    assert moved == {"encoder", CHILD}
    measured = hospital.ask(STATISTICS, plan, weights=model, options={"moments": True})
    assert measured.moments is not None
    assert measured.statistics is None


def test_it_refuses_what_needs_labels(hospital: Hospital) -> None:
    plan = hospital.plan(*SEGCLR, "method.statistics=true")
    model = weights_of(plan)
    classes = hospital.ask(STATISTICS, plan, weights=model, options={"classes": True})
    assert classes.error.startswith("ROL-212")
    validation = hospital.ask(EVALUATE, plan, weights=model, options={"split": "validation"})
    assert validation.error.startswith("ROL-201")
    labelled = hospital.plan("method=source")
    assert hospital.ask(TRAIN, labelled, weights=weights_of(labelled)).error != ""
    bound = hospital.plan("method=upper_bound", "unlabelled=[North]")
    assert hospital.ask(TRAIN, bound, weights=weights_of(bound)).error != ""


def test_pairs_of_slices_work_with_its_volumes(hospital: Hospital) -> None:
    plan = hospital.plan(*SEGCLR, "method.segclr.pairs=slices+augment")
    assert hospital.ask(TRAIN, plan, weights=weights_of(plan)).error == ""


def test_the_check_of_its_files_needs_no_mask(hospital: Hospital) -> None:
    data = hospital.plan(*SEGCLR).data
    found, seen = examine_files(
        hospital.policy, data, heldout=False, target=True, progress=lambda done, total: None
    )
    assert len(seen) == 6
    assert {finding.verdict for finding in found} == {"ok"}
    strict, _ = examine_files(
        hospital.policy, data, heldout=False, progress=lambda done, total: None
    )
    assert "fail" in {finding.verdict for finding in strict}


def test_a_test_case_without_a_mask_is_left_out_with_its_reason(hospital: Hospital) -> None:
    manifest = hospital.root / "manifest.csv"
    with manifest.open(newline="") as file:
        head, *rows = csv.reader(file)
    table = [[*row, "test" if row[0] == "North" and row[3].endswith("1") else ""] for row in rows]
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([[*head, "split"], *table])
    data = hospital.plan(*SEGCLR).data
    site = open_site(hospital.root, "North", data, masks=False)
    assert len(site.cases) == 5
    assert [problem.code for problem in site.quarantined] == ["DAT-103"]


def test_labels_without_a_mask_are_ignored_and_the_cache_is_its_own(tmp_path: Path) -> None:
    root = sites.hospitals(tmp_path / "data")
    plan = sites.plan_of(root, tmp_path, *SEGCLR)
    stores = [
        open_store(
            open_site(root, "North", plan.data, masks=masks),
            plan.data,
            tmp_path / "cache",
            heldout=False,
            masks=masks,
            target=True,
        )
        for masks in (True, False)
    ]
    assert stores[0].key != stores[1].key
    with_masks, without = (store.slices("train") for store in stores)
    for one, other in zip(with_masks.stored, without.stored, strict=True):
        assert np.array_equal(one.image, other.image)
        assert (other.label == 255).all()
        assert (other.truth == 255).all()
        assert other.truth.shape == one.truth.shape
        assert not other.present.any()


def test_the_fingerprint_of_a_study_does_not_read_hidden_masks(tmp_path: Path) -> None:
    root = sites.hospitals(tmp_path / "data")
    plan = sites.plan_of(root, tmp_path, *SEGCLR)

    def prints(hidden: tuple[str, ...]) -> str:
        return data_fingerprint(root, sites.SITES, plan.data, tmp_path / "cache", hidden)

    before = prints(("North",)), prints(())
    mask = next((root / "North").glob("*_mask.nii.gz"))
    mask.write_bytes(b"damaged")
    assert prints(("North",)) == before[0]
    assert prints(()) != before[1]


def test_without_its_role_a_missing_mask_is_still_a_problem(tmp_path: Path) -> None:
    root = sites.hospitals(tmp_path / "data")
    for mask in (root / "North").glob("*_mask.nii.gz"):
        mask.unlink()
    plan = sites.plan_of(root, tmp_path)
    site = open_site(root, "North", plan.data)
    with pytest.raises(FedsgcgError):
        open_store(site, plan.data, tmp_path / "cache", heldout=False)
