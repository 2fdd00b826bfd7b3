"""A coordinator that evaluates models of its choice to learn about single patients."""

import math
from collections import defaultdict
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from fedsgcg.clients.evaluation import MaskAgreement, summarise_cases
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import SUMMARY, Request
from fedsgcg.common.wire.payload import decode_cases
from tests.support import sites
from tests.support.policed import Hospital, constant_model

TEST = {"options": {"split": "test"}}
VALIDATION = {"options": {"split": "validation"}}
CONSENT = {"sharing": ("weights", "statistics", "heldout_cases", "training_cases")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("evaluation") / "data", cases=6)


def test_an_all_foreground_model_gives_volumes_where_the_researcher_owns_the_data(data, tmp_path):
    """The attack itself, in a simulation: 2 V / (V + N) of a case is its volume."""
    plan = sites.plan_of(data, tmp_path, "heldout=North")
    request = Request(sites.identity(plan), constant_model(plan), **TEST)
    rows = decode_cases(sites.answer(plan, wire.EVALUATE, request, "North").cases)
    volumes, pixels = [], 0
    for path in sorted((data / "North").glob("*_mask.nii.gz")):
        mask = np.asarray(nibabel.load(path).dataobj)
        volumes.append(int((mask > 0).sum()))
        pixels = mask.size
    found = [round(row["dice"] * pixels / (2 - row["dice"])) for row in rows]
    assert sorted(found) == sorted(volumes)


@pytest.mark.parametrize("changes", [{}, CONSENT])
@pytest.mark.attack("all-foreground")
def test_an_all_foreground_model_gives_a_hospitals_volumes_to_nobody(data, tmp_path, changes):
    """The same attack at a hospital: refused, even where results of single cases may leave."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.4, **changes})
    for heldout, request in (("North", TEST), ("South", VALIDATION)):
        plan = hospital.plan(heldout=heldout)
        reply = hospital.ask(wire.EVALUATE, plan, weights=constant_model(plan), **request)
        assert reply.error == "POL-724"
        assert not reply.cases
        assert not reply.metrics
    plan = hospital.plan("method=source")
    trained = hospital.ask(wire.TRAIN, plan, weights=constant_model(plan))
    assert "validation_dice" not in trained.metrics


@pytest.mark.attack("case-rows")
def test_results_of_single_cases_leave_only_with_consent(data, tmp_path):
    """Held-out and training hospitals: without consent mean, sd and count, rounded."""
    open_to_all = Hospital(data, tmp_path / "open", {"validation_fraction": 0.5, **CONSENT})
    default = Hospital(data, tmp_path / "default", {"validation_fraction": 0.5})
    secret = (tmp_path / "default/home/split.salt", tmp_path / "open/home/split.salt")
    for heldout, request in (("North", TEST), ("South", VALIDATION)):
        plan = open_to_all.plan(heldout=heldout)
        with_rows = open_to_all.ask(wire.EVALUATE, plan, **request)
        secret[0].parent.mkdir(exist_ok=True)
        secret[0].write_bytes(secret[1].read_bytes())  # the same split, to compare the two
        without = default.ask(wire.EVALUATE, plan, **request)
        rows = decode_cases(with_rows.cases)
        assert (with_rows.error, without.error) == ("", "")
        assert len(rows) == (6 if heldout == "North" else 3)
        assert decode_cases(without.cases) == []
        assert not with_rows.details.get(SUMMARY)
        by_metric = {entry["metric"]: entry for entry in without.details[SUMMARY]}
        dice = [row["dice"] for row in rows]
        assert by_metric["dice"] == {
            "structure": rows[0]["structure"],
            "metric": "dice",
            "mean": round(float(np.mean(dice)), 3),
            "sd": round(float(np.std(dice, ddof=1)), 3),
            "count": len(rows),
        }
        assert without.metrics["dice"] == round(float(np.mean(dice)), 3)


def test_figures_sent_in_training_are_rounded(data, tmp_path):
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.5})
    dice = hospital.ask(wire.TRAIN, hospital.plan("method=source")).metrics["validation_dice"]
    assert dice == round(dice, 3)


def test_too_few_validation_patients_give_no_result(data, tmp_path):
    """One validation patient: its Dice would be the mean."""
    hospital = Hospital(data, tmp_path / "kit", {"validation_fraction": 0.17, **CONSENT})
    reply = hospital.ask(wire.EVALUATE, **VALIDATION)
    assert (reply.error, decode_cases(reply.cases), reply.metrics) == ("", [], {})
    assert set(reply.details) == {wire.DATA}


def row_of(case: str, dice: float, asd: float | None) -> dict[str, object]:
    return defaultdict(
        lambda: None,
        case=case,
        structure="organ",
        dice=dice,
        asd=math.nan if asd is None else asd,
    )


def test_a_summary_by_hand():
    """Two cases: sd would give both. One of four undefined: their number would be a patient's."""
    two = [row_of("a", 0.5, 1.0), row_of("b", 0.7, 2.0)]
    assert summarise_cases(two, 2) == [
        {"structure": "organ", "metric": "dice", "mean": 0.6, "sd": None, "count": 2},
        {"structure": "organ", "metric": "asd", "mean": 1.5, "sd": None, "count": 2},
    ]
    four = [*two, row_of("c", 0.9, 3.0), row_of("d", 0.0, None)]
    dice, asd = summarise_cases(four, 2)
    assert (dice["mean"], dice["sd"], dice["count"]) == (0.525, 0.386, 4)
    assert (asd["mean"], asd["sd"], asd["count"]) == (2.0, 1.0, None)
    assert [entry["metric"] for entry in summarise_cases(four[2:], 2)] == ["dice"]
    assert summarise_cases([], 2) == []


@pytest.mark.attack("linked-aliases")
def test_aliases_of_two_studies_cannot_be_linked(data, tmp_path):
    """A case keeps its alias over methods and folds of a study, and has another one elsewhere."""
    hospital = Hospital(data, tmp_path / "kit", CONSENT)
    aliases = []
    for run in ("pilot/sgcg/North/0", "pilot/source/North/1", "final/sgcg/North/0"):
        plan = hospital.plan(f"run={run}", heldout="North")
        rows = decode_cases(hospital.ask(wire.EVALUATE, plan, **TEST).cases)
        aliases.append({row["case"] for row in rows})
    assert aliases[0] == aliases[1]
    assert not aliases[0] & aliases[2]
    table = (tmp_path / "kit/home/aliases.csv").read_text()
    assert all(alias in table for found in aliases for alias in found)
    elsewhere = Hospital(data, tmp_path / "other", CONSENT)
    plan = elsewhere.plan("run=pilot/sgcg/North/0", heldout="North")
    rows = decode_cases(elsewhere.ask(wire.EVALUATE, plan, **TEST).cases)
    assert not aliases[0] & {row["case"] for row in rows}


def test_agreement_of_masks_by_hand():
    masks = torch.zeros(4, 2, 2, 2, dtype=torch.bool)
    masks[:, 0] = True
    masks[:2, 1, 0, 0] = True
    agreement = MaskAgreement()
    agreement.add(masks[:1])
    assert agreement.values == [0.0]
    agreement.add(masks[1:])
    assert agreement.values == pytest.approx([1.0, 1 / 3])
    assert agreement.is_constant


def test_masks_of_different_patients_are_far_from_constant(data, tmp_path):
    """The threshold does not fire on a perfect model, whose predictions are the true masks."""
    agreement = MaskAgreement()
    for path in sorted((data / "North").glob("*_mask.nii.gz")):
        mask = np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0) > 0
        agreement.add(torch.from_numpy(np.ascontiguousarray(mask))[:, None, :36, :36])
    assert max(agreement.values) < 0.9
