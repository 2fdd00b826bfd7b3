"""A site with differential privacy: what it sends, what it spends, and when it stops."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import CaseStore, open_store
from fedsgcg.clients.guard.budget import FILE, Budget, Charge, charge, require_affordable, spent
from fedsgcg.clients.methods.private_statistics import contribution, patients_of
from fedsgcg.clients.private_training import PrivateSession, clipped, train_private_round
from fedsgcg.clients.training import weights_of
from fedsgcg.common.differential_privacy import accounting
from fedsgcg.common.differential_privacy.accounting import Spending, epsilon_of
from fedsgcg.common.differential_privacy.noise import Noise
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.dp_rules import planned, round_spending
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply, Request
from tests.support import sites
from tests.support.policed import Hospital

CPU = torch.device("cpu")
PRIVATE = (
    "heldout=South",
    "data.validation_fraction=0",
    "network.norm=group",
    "method=sgcg",
    "federation.rounds=2",
    "method.steps_per_round=2",
    "privacy.dp.channels=[statistics,weights]",
    "privacy.dp.epsilon=100",
    "privacy.dp.noise=seeded",
    "privacy.dp.sampling_rate=0.5",
)


@pytest.fixture(scope="module", autouse=True)
def _accountant() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra privacy (dp-accounting)")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("private") / "data")


def federation(root: Path, folder: Path, *overrides: str) -> Plan:
    chosen = {text.partition("=")[0]: text for text in (*PRIVATE, *overrides)}
    return sites.plan_of(root, folder, f"site.cache={root.parent / 'cache'}", *chosen.values())


def asked(plan: Plan, kind: str, number: int = 1, **request) -> Reply:
    sent = None if kind == wire.ENROL else sites.weights(plan)
    return sites.answer(plan, kind, Request(sites.identity(plan, number), sent, **request), "North")


def home(plan: Plan) -> Path:
    return Path(plan.output) / "sites" / "North"


def stores(plan: Plan, root: Path) -> list[CaseStore]:
    site = open_site(root, "North", plan.data)
    return [open_store(site, plan.data, root.parent / "cache", heldout=False)]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


# --- what leaves -------------------------------------------------------------------------------


@pytest.mark.row(65)
def test_a_round_sends_noisy_weights_and_nothing_else_that_depends_on_the_images(root, tmp_path):
    plan = federation(root, tmp_path)
    reply = asked(plan, wire.TRAIN)
    assert reply.error == ""
    assert set(reply.metrics) == {
        *("examples", "steps", "seconds", "learning_rate", "micro_batches", "epsilon")
    }
    assert reply.statistics is None
    expected = epsilon_of([round_spending(plan)], plan.privacy.dp.delta)
    assert reply.metrics["epsilon"] == pytest.approx(expected)
    (line,) = lines(home(plan))
    assert line["channel"] == "weights"
    assert line["seeded"] is True
    note = json.loads((home(plan) / "ledger.jsonl").read_text().splitlines()[-1])["note"]
    assert f"epsilon={expected:.4g} at delta=0.001" in note
    assert "add or remove one patient" in note
    assert "SEEDED" in note


def test_statistics_count_patients_and_are_composed_with_the_weights(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.dp.statistics_noise=0.05", "privacy.dp.epsilon=1e5")
    asked(plan, wire.TRAIN)
    reply = asked(plan, wire.STATISTICS, 2, options={"classes": True})
    assert reply.error == ""
    assert reply.statistics.count.tolist() == [4, 4]  # the hospital's patients
    both = [round_spending(plan), Spending(0.05)]
    assert spent(home(plan), 1e-3) == pytest.approx(epsilon_of(both, 1e-3))
    assert reply.metrics["epsilon"] == pytest.approx(epsilon_of(both, 1e-3))


def test_with_much_noise_every_class_is_absent_instead_of_wrong(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.dp.statistics_noise=50")
    reply = asked(plan, wire.STATISTICS, 2, options={"classes": True})
    assert reply.error == ""
    assert reply.statistics.count.tolist() == [0, 0]


def test_validation_results_do_not_leave(root, tmp_path):
    plan = federation(root, tmp_path, "data.validation_fraction=0.6")
    reply = asked(plan, wire.EVALUATE, options={"split": "validation"})
    assert reply.error == ""
    assert reply.metrics == {}


def test_a_ledger_says_which_part_has_no_noise(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.dp.channels=[weights]")
    asked(plan, wire.TRAIN)
    note = json.loads((home(plan) / "ledger.jsonl").read_text().splitlines()[-1])["note"]
    assert "without noise: statistics" in note


# --- the budget --------------------------------------------------------------------------------


@pytest.mark.row(63)
def test_a_spent_budget_ends_the_contribution_and_says_so(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.dp.noise=entropy")
    once = epsilon_of([round_spending(plan)], 1e-3)
    thrice = epsilon_of([round_spending(plan, 3)], 1e-3)
    dp = replace(plan.privacy.dp, epsilon=(epsilon_of(planned(plan), 1e-3) + thrice) / 2)
    plan = replace(plan, privacy=replace(plan.privacy, dp=dp))
    assert once < dp.epsilon
    codes = [asked(plan, wire.TRAIN).error for _ in range(8)]
    assert codes[0] == ""
    assert codes[-1] == "PRV-975"
    assert spent(home(plan), 1e-3) <= dp.epsilon
    # It may still receive and evaluate nothing but the model: it enrols no more.
    assert asked(plan, wire.ENROL).error in ("", "PRV-974")


def test_seeded_noise_repeats_and_is_charged_once_and_other_noise_is_charged_again(root, tmp_path):
    plan = federation(root, tmp_path / "seeded")
    first, again = asked(plan, wire.TRAIN), asked(plan, wire.TRAIN)
    assert first.weights.digest() == again.weights.digest()
    assert len(lines(home(plan))) == 1
    other = federation(root, tmp_path / "entropy", "privacy.dp.noise=entropy")
    first, again = asked(other, wire.TRAIN), asked(other, wire.TRAIN)
    assert first.weights.digest() != again.weights.digest()
    assert len(lines(home(other))) == 2


def test_other_runs_folds_and_seeds_on_the_same_patients_add_up(tmp_path):
    budget = Budget(10.0, 1e-3)
    one = Charge("weights", "run A", "1", Spending(2.0, 0.5, 10))
    charge(tmp_path, one, budget)
    total = charge(tmp_path, replace(one, run="run B, fold 2, seed 1"), budget)
    assert total == pytest.approx(epsilon_of([Spending(2.0, 0.5, 20)], 1e-3))
    require_affordable(
        tmp_path, "run A", [Spending(2.0, 0.5, 10)], budget
    )  # its own share counts once
    with pytest.raises(FedsgcgError) as caught:
        require_affordable(tmp_path, "run C", [Spending(0.5, 0.5, 100)], budget)
    assert caught.value.code == "PRV-974"


def test_a_refused_release_is_not_charged_and_an_accepted_one_is_on_disk_before(tmp_path):
    budget = Budget(epsilon_of([Spending(1.0)], 1e-3) + 1e-9, 1e-3)
    charge(tmp_path, Charge("statistics", "run", "1", Spending(1.0)), budget)
    content = (tmp_path / FILE).read_bytes()
    with pytest.raises(FedsgcgError) as caught:
        charge(tmp_path, Charge("statistics", "run", "2", Spending(100.0)), budget)
    assert caught.value.code == "PRV-975"
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize("damage", ["{}\n", '{"noise": -1}\n', "no json\n"])
def test_a_damaged_budget_file_stops_every_release(tmp_path, damage):
    budget = Budget(100.0, 1e-3)
    charge(tmp_path, Charge("weights", "run", "1", Spending(1.0)), budget)
    with (tmp_path / FILE).open("a") as file:
        file.write(damage)
    with pytest.raises(FedsgcgError) as caught:
        charge(tmp_path, Charge("weights", "run", "2", Spending(1.0)), budget)
    assert caught.value.code == "SITE-501"


# --- what is refused ---------------------------------------------------------------------------

REFUSALS = {
    "PRV-971": ("network.norm=batch",),
    "PRV-972": ("federation.selection=source_validation",),
    "PRV-974": ("privacy.dp.weights_noise=0.1",),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_plan_that_contradicts_its_privacy_is_refused_by_the_site(root, tmp_path, code):
    assert asked(federation(root, tmp_path, *REFUSALS[code]), wire.TRAIN).error == code


@pytest.mark.parametrize(
    "override",
    [
        "method=moon",
        "federation.aggregator=scaffold",
        "prototypes.memory=overlay",
        "prototypes.normalize=false",
    ],
)
def test_settings_that_let_patients_out_without_noise_are_refused(root, tmp_path, override):
    assert asked(federation(root, tmp_path, override), wire.TRAIN).error == "PRV-972"


@pytest.mark.parametrize(
    "override",
    [
        "privacy.dp.epsilon=0",
        "privacy.dp.epsilon=.nan",
        "privacy.dp.delta=0",
        "privacy.dp.delta=1",
        "privacy.dp.weights_noise=0",
        "privacy.dp.sampling_rate=0",
        "privacy.dp.sampling_rate=1.5",
        "privacy.dp.clip=0",
        "privacy.dp.channels=[pixels]",
        "privacy.dp.central_noise=-1",
    ],
)
def test_numbers_out_of_range_are_refused(root, tmp_path, override):
    with pytest.raises(FedsgcgError) as caught:
        federation(root, tmp_path, override)
    assert caught.value.code == "CFG-001"


def test_a_delta_that_allows_to_publish_a_patient_is_refused(root, tmp_path):
    assert asked(federation(root, tmp_path, "privacy.dp.delta=0.3"), wire.ENROL).error == "PRV-973"
    assert asked(federation(root, tmp_path), wire.ENROL).error == ""


def test_a_hospital_can_demand_privacy_and_its_own_budget_counts(root, tmp_path):
    hospital = Hospital(root, tmp_path / "kit", {"dp_epsilon": 60.0, "dp_delta": 1e-2})
    assert hospital.ask(wire.ENROL, hospital.plan("federation.rounds=2")).error == "PRV-978"
    assert hospital.ask(wire.ENROL, hospital.plan(*PRIVATE[1:])).error == "PRV-979"
    entropy = [text for text in PRIVATE[1:] if "seeded" not in text]
    allowed = hospital.plan(*entropy)
    assert hospital.ask(wire.ENROL, allowed, 0).error == ""
    cost = epsilon_of(planned(allowed), 1e-2)
    poor = Hospital(root, tmp_path / "poor", {"dp_epsilon": cost / 2, "dp_delta": 1e-2})
    assert poor.ask(wire.ENROL, poor.plan(*entropy), 0).error == "PRV-974"


def test_a_real_hospital_is_not_recorded(root, tmp_path):
    hospital = Hospital(root, tmp_path / "kit")
    assert hospital.ask(wire.ENROL, hospital.plan("privacy.record=true")).error == "PRV-980"
    assert hospital.ask(wire.ENROL, hospital.plan(), 0).error == ""


def test_without_the_accountant_a_site_does_not_enrol(root, tmp_path, monkeypatch):
    accounting._epsilon.cache_clear()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # as if it were not installed
    with pytest.raises(FedsgcgError, match="PRV-976"):
        epsilon_of([Spending(2.0)], 1e-5)
    assert asked(federation(root, tmp_path), wire.ENROL).error == "PRV-976"


# --- DP-SGD ------------------------------------------------------------------------------------


def test_one_patient_moves_the_sum_of_a_step_by_at_most_the_clip(root, tmp_path):
    plan = federation(root, tmp_path)
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    session = PrivateSession(network, plan, CPU, {}, None, Noise.seeded(0, "x"))
    (store,) = stores(plan, root)
    for table, slices in patients_of([store], [store.slices("train")]):
        images, labels = table.stack(slices)
        from fedsgcg.clients.data.batches import Batch

        batch = Batch(torch.from_numpy(images), torch.from_numpy(labels).long(), (len(slices),))
        gradient = session.patient_gradient(batch)
        assert float(gradient.norm()) > 0.05  # the bound below has something to do
        for most in (0.05, 1e-6):
            assert float(torch.linalg.vector_norm(clipped(gradient, most))) <= most
    assert not clipped(torch.tensor([float("nan"), 1.0]), 1.0).any()
    short = torch.tensor([3e-3, 4e-3], dtype=torch.float64)
    assert torch.equal(clipped(short, 1.0), short)


def test_patients_are_drawn_with_the_stated_probability(root, tmp_path, monkeypatch):
    plan = federation(root, tmp_path, "privacy.dp.sampling_rate=0.25", "method.steps_per_round=400")
    (store,) = stores(plan, root)
    sizes: list[int] = []
    monkeypatch.setattr(
        PrivateSession, "private_step", lambda _, patients, rate: sizes.append(len(list(patients)))
    )
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    train_private_round(
        network,
        [store],
        plan,
        round_number=1,
        guide=None,
        device=CPU,
        noise=Noise.seeded(1, "drawn"),
    )
    assert len(sizes) == 400
    # 4 patients in 400 steps: 400 expected, standard deviation 17
    assert abs(sum(sizes) - 400) < 70


def test_without_a_drawn_patient_a_step_is_noise_and_the_model_still_trains(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.dp.sampling_rate=0.0001")
    (store,) = stores(plan, root)
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    before = weights_of(network).digest()
    figures, _ = train_private_round(
        network,
        [store],
        plan,
        round_number=1,
        guide=None,
        device=CPU,
        noise=Noise.seeded(1, "empty"),
    )
    assert weights_of(network).digest() != before
    assert figures["steps"] == 2


def test_a_contribution_does_not_depend_on_other_patients(root, tmp_path):
    """Instance or group normalisation: the features of a patient are its own."""
    plan = federation(root, tmp_path)
    (store,) = stores(plan, root)
    from fedsgcg.clients.methods.private_statistics import _statistics

    network = build_network(plan.network, 3, plan.data.out_channels, 0).eval()
    patients = list(patients_of([store], [store.slices("train")]))
    with torch.no_grad():
        table, slices = patients[0]
        alone = _statistics(network, table, slices, plan, CPU)
        both = np.concatenate([slices, patients[1][1]])
        from fedsgcg.clients.methods.class_statistics import batch_statistics

        images, labels = table.stack(both)
        _, maps = network(torch.from_numpy(images))
        mine = maps[: len(slices)], torch.from_numpy(labels[: len(slices)]).long()
        together = batch_statistics(*mine, plan)
    assert np.abs(contribution(alone) - contribution(together)).max() <= 1


# --- means instead of statistics ---------------------------------------------------------------


def test_block_means_leave_instead_of_statistics(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.dp.channels=[]", "prototypes.shared=means")
    full = federation(root, tmp_path / "full", "privacy.dp.channels=[]")
    options = {"classes": True}
    reply, other = (asked(each, wire.STATISTICS, 2, options=options) for each in (plan, full))
    assert reply.error == ""
    assert reply.block_means.count.shape == (2, 4)
    assert np.array_equal(reply.statistics.count, other.statistics.count)
    assert np.allclose(reply.statistics.mean, other.statistics.mean, atol=1e-6)
    ratio = np.trace(reply.statistics.covariance, axis1=1, axis2=2) / np.trace(
        other.statistics.covariance, axis1=1, axis2=2
    )
    # A pixel whose features are all zero has no unit length.
    assert np.allclose(ratio, 1, atol=0.02)
    parts = json.loads((home(plan) / "ledger.jsonl").read_text().splitlines()[-1])["parts"]
    assert "means" in parts
    assert "statistics" not in parts


def test_a_hospital_that_shares_means_alone_refuses_the_full_form(root, tmp_path):
    hospital = Hospital(root, tmp_path / "kit", {"sharing": ["weights", "means"]})
    plans = [f"prototypes.shared={form}" for form in ("full", "means")]
    codes = [
        hospital.ask(wire.STATISTICS, hospital.plan(form), 2, options={"classes": True}).error
        for form in plans
    ]
    assert codes == ["POL-704", ""]
