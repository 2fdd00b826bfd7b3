"""SegCLR against the other hospitals' projections: what is measured, sent, used and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fedsgcg.clients.app import build_client_app
from fedsgcg.clients.data.batches import Batch, gather, index_batches
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.pairs import make_pairs
from fedsgcg.clients.data.store import CaseStore, open_store
from fedsgcg.clients.methods.guidance import Guidance
from fedsgcg.clients.methods.projections import site_projections
from fedsgcg.clients.methods.segclr import SegCLR, global_nt_xent, nt_xent, project
from fedsgcg.clients.training import Session
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.heads import build_trained, state_of
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.rules import rule_problems
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import STATISTICS
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.study.inprocess import run_in_process
from fedsgcg.server.aggregation.prototypes import PrototypeMemory
from fedsgcg.server.app import build_server_app
from tests.support import sites
from tests.support.policed import Hospital

CPU = torch.device("cpu")
METHOD = ("method=segclr_global", "method.segclr.projection=6", "method.segclr.hidden=8")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("global")
    return sites.hospitals(folder / "data"), folder


def opened(hospital: tuple[Path, Path], plan: Plan) -> CaseStore:
    root, folder = hospital
    site = open_site(root, "North", plan.data)
    return open_store(site, plan.data, folder / "cache", heldout=False)


def described(seed: int, count: int, length: int = 6) -> ClassStatistics:
    rows = np.random.default_rng(seed).normal(size=(count, length))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return ClassStatistics.from_features(unit, np.zeros(count, np.int64), 1)


def test_the_statistics_are_those_of_the_projections_that_training_compares(
    hospital: tuple[Path, Path],
) -> None:
    plan = sites.plan_of(*hospital, *METHOD)
    table = opened(hospital, plan).slices("train")
    network = build_trained(plan, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def rng() -> np.random.Generator:
        return np.random.default_rng(3)

    found = site_projections(network, [table], plan, CPU, [rng()], torch.Generator().manual_seed(5))
    assert found.mean.shape == (1, 6)
    assert found.count.tolist() == [2 * len(table)]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())

    generator, rows = torch.Generator().manual_seed(5), []
    network.train()
    for chosen in index_batches([table], plan.method, [rng()]):
        pairs = make_pairs(gather([table], chosen)[0], None, plan.method.segclr, generator)
        rows.append(torch.nn.functional.normalize(project(network, pairs), dim=1).detach())
    points = torch.cat(rows).double().numpy()
    assert np.allclose(found.mean[0], points.mean(0), atol=1e-6)
    assert np.allclose(found.covariance[0], np.cov(points.T, bias=True), atol=1e-6)


def test_a_guide_replaces_the_negatives_of_the_batch(hospital: tuple[Path, Path]) -> None:
    plan = sites.plan_of(*hospital, *METHOD)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    pairs = make_pairs(images, None, plan.method.segclr, generator)
    method = SegCLR(build_trained(plan, 0).train(), plan, 1, CPU)
    guide = Guidance.of_projections(described(1, 40), CPU)
    assert guide is not None
    first, second = project(method.network, pairs).chunk(2)
    own = nt_xent(first, second, 0.1)
    others = global_nt_xent(first, second, guide.mean[0], guide.covariance[0], 0.1, 6)
    assert torch.allclose(method.contrast(pairs, (4,)), own)
    assert torch.allclose(method.contrast(pairs, (4,), guide), others)
    batch = Batch(images, (images[:, 0] > 0).long(), (4,), pairs=pairs)
    session = Session(build_trained(plan, 0), plan, 1, CPU, {})
    losses = [float(session.step(batch, guide)[0]) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_each_site_receives_the_merge_of_all_others(hospital: tuple[Path, Path]) -> None:
    plan = sites.plan_of(*hospital, *METHOD)
    memory = PrototypeMemory(plan.prototypes)
    parts = {site: described(seed, 20 + seed) for seed, site in enumerate("ABC")}
    parts["D"] = ClassStatistics.empty(1, 6)  # withholds its projections
    found = memory.others(parts, "ABCDE")
    assert found["A"].count.tolist() == [21 + 22]
    pooled = parts["A"] + parts["B"] + parts["C"]
    assert np.allclose((found["A"] + parts["A"]).mean, pooled.mean)
    assert np.allclose(found["D"].covariance, pooled.covariance)
    assert np.allclose(found["E"].covariance, pooled.covariance)
    assert memory.others({"A": parts["A"]}, "AB").keys() == {"B"}
    assert Guidance.of_projections(parts["D"], CPU) is None


@pytest.mark.parametrize(
    ("texts", "code", "where"),
    [
        (["method.segclr.contrast=simsiam"], "CFG-001", "method.segclr.global_negatives"),
        (["method.statistics=false"], "CFG-001", "method.statistics"),
        (["federation=pooled"], "CFG-001", "federation.ownership"),
        (["prototypes.memory=momentum"], "CFG-001", "prototypes.memory"),
        (["prototypes.shared=means"], "CFG-001", "prototypes.shared"),
        (["adapt.by=[prototypes]"], "CFG-001", "adapt.by"),
        (["privacy=secure_sums"], "PRV-952", "method"),
        (
            ["privacy.dp.channels=[statistics]", "network.norm=group"],
            "PRV-972",
            "method.segclr.global_negatives",
        ),
    ],
)
def test_what_has_no_part_of_each_site_or_no_bound_is_refused(
    hospital: tuple[Path, Path], texts: list[str], code: str, where: str
) -> None:
    try:
        plan = sites.plan_of(*hospital, *METHOD, *texts)
        problems = tuple(rule_problems(plan, ["North", "South"]))
    except FedsgcgError as error:
        problems = error.problems
    assert (code, where) in {(problem.code, problem.where) for problem in problems}


def weights_of(plan: Plan) -> Weights:
    return Weights.from_state(state_of(build_trained(plan, 0)))


@pytest.mark.parametrize("length", [6, 64])
def test_a_hospital_without_masks_sends_them_unless_they_are_too_few(
    tmp_path: Path, length: int
) -> None:
    root = sites.hospitals(tmp_path / "data", cases=6)
    for mask in (root / "North").glob("*_mask.nii.gz"):
        mask.unlink()
    changes: dict[str, Any] = {"roles": ("unlabelled",), "patient_floor": 2, "round_slices": 4}
    kit = Hospital(root, tmp_path / "kit", changes)
    plan = kit.plan(*METHOD, f"method.segclr.projection={length}", "unlabelled=[North]")
    asked = {"options": {"classes": True}, "weights": weights_of(plan)}
    reply = kit.ask(STATISTICS, plan, number=2, **asked)
    assert reply.error == ""
    assert reply.statistics is not None
    assert reply.statistics.mean.shape == (1, length)
    few = length == 64  # 24 slices span their covariance
    assert reply.details["withheld"] == (["projections"] if few else [])
    assert (reply.statistics.count.sum() == 0) == few
    mute = Hospital(root, tmp_path / "mute", {**changes, "sharing": ("weights",)})
    assert mute.ask(STATISTICS, plan, number=2, **asked).error.startswith("POL-704")


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["restart", "lagged"])
def test_a_federation_with_a_hospital_without_labels_uses_them(tmp_path: Path, memory: str) -> None:
    root = write_hospitals(
        tmp_path / "data", sites=("A", "B", "C"), cases_per_site=3, shape=(4, 40, 40)
    )
    texts = (*METHOD, "data.sites=[A,B,C]", "unlabelled=[B]")
    texts += ("federation.rounds=3", "method.steps_per_round=2", f"prototypes.memory={memory}")
    tree = sites.tree_of(root, tmp_path, *texts)
    run_in_process(build_server_app(tree), build_client_app(tree), Plan.from_tree(tree).members())
    run = tmp_path / "run"
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["status"], outcome["problems"]) == ("completed", [])
    assert not (run / "prototypes.arrow").exists()
    for site in "ABC":
        lines = (run / "sites" / site / "ledger.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        sent = [entry["round"] for entry in entries if "statistics" in entry["parts"]]
        assert sent == [2, 3], site
    rows = pq.read_table(run / "rounds.parquet").to_pylist()
    losses = {
        row["round"]: row["value"]
        for row in rows
        if (row["site"], row["metric"]) == ("A", "loss_contrast")
    }
    assert sorted(losses) == [1, 2, 3]
    assert all(np.isfinite(list(losses.values())))
