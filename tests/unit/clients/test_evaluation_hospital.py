"""Evaluation of a small hospital: every case scored once, and nothing changed by it."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from fedsgcg.clients import evaluation
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import CaseStore, SliceTable, open_store
from fedsgcg.clients.evaluation import evaluate_cases, validation_dice
from fedsgcg.clients.training import weights_of
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import CASES_SCHEMA, decode_cases, encode_cases
from tests.support import sites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("evaluation") / "data")


def opened(root: Path, *overrides: str, heldout: bool) -> tuple[Plan, CaseStore, torch.nn.Module]:
    plan = sites.plan_of(root, root.parent, *overrides)
    store = open_store(
        open_site(root, "South", plan.data), plan.data, root.parent / "cache", heldout=heldout
    )
    return plan, store, build_network(plan.network, 3, plan.data.out_channels, 3)


def test_every_case_is_scored_under_its_alias_and_the_pictures_show_the_same(root, tmp_path):
    plan, store, network = opened(root, heldout=True)
    rows = evaluate_cases(
        network, [store], plan, "test", CPU, pictures=tmp_path / "site" / "pictures.arrow"
    )
    assert [row["case"] for row in rows] == [case.alias for case in store.cases]
    assert decode_cases(encode_cases(rows)) == rows
    assert set(rows[0]) == set(CASES_SCHEMA.names)
    with pa.ipc.open_file(tmp_path / "site" / "pictures.arrow") as reader:
        table = reader.read_all()
    assert json.loads(table.schema.metadata[b"structures"]) == ["gland"]
    for row, picture, case in zip(rows, table.to_pylist(), store.cases, strict=True):
        assert picture["case"] == row["case"]
        assert picture["dice"] == pytest.approx(row["dice"])
        truth = store.truth(case)
        assert picture["z"] == int((truth > 0).sum((1, 2)).argmax())
        assert picture["truth"] == truth[picture["z"]].tobytes()
        assert len(picture["prediction"]) == picture["height"] * picture["width"] == truth[0].size


def test_scores_equal_a_plain_recomputation(root):
    plan, store, network = opened(
        root, "data.largest_component=false", "data.fill_holes=false", heldout=True
    )
    rows = evaluate_cases(network, [store], plan, "test", CPU)
    table = store.slices("test")
    for row, case in zip(rows, store.cases, strict=True):
        images, _ = table.stack(np.flatnonzero(table.case_of == case.index))
        truth = store.truth(case)
        with torch.no_grad():
            logits, _ = network.eval()(torch.from_numpy(images))
            native = torch.nn.functional.interpolate(
                logits, truth.shape[1:], mode="bilinear", align_corners=False
            )
        prediction = native.argmax(1).numpy() == 1
        dice = 2 * (prediction & (truth == 1)).sum() / (prediction.sum() + (truth == 1).sum())
        assert row["dice"] == pytest.approx(dice, abs=1e-3)


def test_evaluation_changes_nothing_and_does_not_depend_on_the_batch(root, monkeypatch):
    plan, store, network = opened(root, heldout=True)
    before = weights_of(network.train()).digest()
    rows = evaluate_cases(network, [store], plan, "test", CPU)
    assert weights_of(network).digest() == before
    assert network.training
    monkeypatch.setattr(evaluation, "BATCH", 1)
    for row, alone in zip(rows, evaluate_cases(network, [store], plan, "test", CPU), strict=True):
        assert alone["dice"] == pytest.approx(row["dice"], abs=1e-3)


def test_each_slice_of_the_cache_is_read_once(root, monkeypatch):
    plan, store, network = opened(root, heldout=True)
    read: list[int] = []
    stack = SliceTable.stack

    def counted(table, indices):
        read.extend(int(index) for index in indices)
        return stack(table, indices)

    monkeypatch.setattr(SliceTable, "stack", counted)
    evaluate_cases(network, [store], plan, "test", CPU)
    assert sorted(read) == list(range(len(store.slices("test"))))


def test_validation_dice_is_the_mean_over_cases_at_training_size(root):
    plan, store, network = opened(root, "data.validation_fraction=0.6", heldout=False)
    table = store.slices("validation")
    assert 0 < len(set(table.case_of)) < 4
    dices = []
    for index in sorted(set(table.case_of)):
        images, labels = table.stack(np.flatnonzero(table.case_of == index))
        with torch.no_grad():
            prediction = network.eval()(torch.from_numpy(images))[0].argmax(1).numpy() == 1
        dices.append(
            2 * (prediction & (labels == 1)).sum() / (prediction.sum() + (labels == 1).sum())
        )
    value, cases = validation_dice(network, [store], plan, CPU)
    assert cases == len(dices)
    assert value == pytest.approx(np.mean(dices), abs=1e-3)


def test_without_validation_cases_there_is_no_dice(root):
    plan, store, network = opened(root, "data.validation_fraction=0", heldout=False)
    value, cases = validation_dice(network, [store], plan, CPU)
    assert math.isnan(value)
    assert cases == 0
