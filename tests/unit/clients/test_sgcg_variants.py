"""Variants of SgCG in training: they lower their loss, and the diagnosis changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsgcg.clients.guard.policy import apply_policy
from fedsgcg.clients.methods import Guidance, SgCG
from fedsgcg.clients.methods.class_statistics import site_statistics
from fedsgcg.clients.methods.sgcg import contrast_of_view
from fedsgcg.clients.training import round_batches, train_round, weights_of
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.heads import build_trained
from fedsgcg.common.seeding import stream
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.aggregation.prototypes import PrototypeMemory
from tests.support import sites
from tests.support.one_site import opened
from tests.unit.clients.test_policy import asked_of, policy_for, refused

CPU = torch.device("cpu")
LEARNING = (
    "method.learning_rate=5e-3",
    "method.local_epochs=1",
    "method.poly_power=0",
    "prototypes.warmup_rounds=0",
)
VARIANTS = {
    "hard": ("method=sgcg", "method.sgcg.hard=0.5"),
    "between": ("method=sgcg", "method.sgcg.between=10"),
    "sites": ("method=sgcg", "method.sgcg.sites=true"),
    "style": ("method=sgcg", "prototypes.views=[style]"),
    "mixed": ("method=ram_sgcg", "prototypes.views=[ram]", "method.sgcg.hard=0.5"),
    "projection": ("method=sgcg_projection",),
    "isda": ("method=isda", "method.isda.covariance=between", "method.isda.strength=20"),
}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return sites.hospitals(folder / "data"), folder


def guide_of(plan, network, store):
    """Prototypes of this site and of one whose features are shifted."""
    own = site_statistics(network, [store.slices("train")], plan, CPU, [stream(0, "statistics")])
    offset = 0.2 * np.linspace(-1, 1, own.num_features)
    parts = {"A": own, "B": ClassStatistics(own.count, own.mean + offset, own.scatter)}
    memory = PrototypeMemory(plan.prototypes)
    guidance = Guidance.of(memory.prototypes(parts), plan.prototypes, CPU)
    return guidance.with_shift(memory.differences(plan.shift, parts))


def rounds(plan, store):
    network, state, figures = build_trained(plan, 0), {}, []
    for number in (1, 2):
        found, state = train_round(
            network,
            [store],
            plan,
            round_number=number,
            guide=guide_of(plan, network, store),
            device=CPU,
            state=state,
        )
        figures.append(found)
    return weights_of(network).digest(), figures


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_reproducible_and_lowers_its_loss(hospital, name):
    plan, store = opened(hospital, *VARIANTS[name], *LEARNING)
    digest, (first, last) = rounds(plan, store)
    torch.manual_seed(7)  # the global generator has no say
    assert rounds(plan, store)[0] == digest
    assert last["loss"] < first["loss"]
    if name == "isda":
        assert first["loss_augmentation"] > 0
    else:
        assert last["loss_contrast"] > 0
        assert -1 <= first["gradient_cosine"] <= 1
    assert (first.get("loss_between", 0) > 0) == (name == "between")


def test_the_diagnosis_changes_no_bit_of_the_training(hospital, monkeypatch):
    plan, store = opened(hospital, "method=sgcg", *LEARNING)
    digest, (found, _) = rounds(plan, store)
    assert "gradient_cosine" in found
    monkeypatch.setattr(SgCG, "diagnose", lambda *_: {})
    again, (plain, _) = rounds(plan, store)
    assert again == digest
    same = {name: value for name, value in found.items() if name not in ("seconds",)}
    del same["gradient_cosine"], plain["seconds"]
    assert same == plain


@pytest.mark.parametrize("features", ["penultimate", "projection"])
def test_the_cosine_is_that_of_both_gradients_at_the_shared_map(hospital, features):
    plan, store = opened(hospital, "method=sgcg", f"network.features={features}", *LEARNING)
    network = build_trained(plan, 0)
    guide = guide_of(plan, network, store)
    method = SgCG(network.train(), plan, 1, CPU)
    batch = next(round_batches([store.slices("train")], plan, 1, ["North"], CPU))
    before = weights_of(network).digest()
    found = method.diagnose(batch, guide)["gradient_cosine"]
    assert weights_of(network).digest() == before
    assert all(parameter.grad is None for parameter in network.parameters())
    kept = {}

    def keep(module, inputs, output):
        kept["map"] = output[1]
        output[1].retain_grad()

    handle = network.decoder.register_forward_hook(keep)
    gradients = []
    for term in ("supervised", "contrast"):
        view = method.view("source", batch.images)
        loss = method.supervised(batch, [view])[0]
        if term == "contrast":
            loss = contrast_of_view(view, batch.labels, guide, plan)
        loss.backward()
        gradients.append(kept["map"].grad.double().flatten())
    handle.remove()
    wanted = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert found == pytest.approx(wanted, abs=1e-4)


def test_the_style_view_leaves_the_running_moments_of_unchanged_slices(hospital):
    plan, store = opened(hospital, "method=sgcg", "prototypes.views=[style]", *LEARNING)
    network = build_trained(plan, 0)
    guide = guide_of(plan, network, store)
    method = SgCG(network.train(), plan, 1, CPU)
    batch = next(round_batches([store.slices("train")], plan, 1, ["North"], CPU))
    drawn = method.draw(batch.sizes, np.random.default_rng(0))
    batch = replace(batch, drawn=tuple(torch.from_numpy(one) for one in drawn))
    method.loss(batch, guide)
    counters = [int(value) for name, value in network.state_dict().items() if "num_batches" in name]
    assert set(counters) == {1}


def test_statistics_are_passed_on_only_with_the_sites_consent(hospital, tmp_path):
    root, _ = hospital
    plan = asked_of(root, tmp_path, "method=sgcg", "method.sgcg.sites=true")
    assert refused(policy_for(root, tmp_path), plan) == [("POL-704", "sharing")]
    allowed = policy_for(root, tmp_path, sharing=("weights", "statistics", "site_statistics"))
    assert apply_policy(plan, allowed).site.shares == ("site_statistics",)
    penalty = asked_of(root, tmp_path, "method=sgcg", "method.sgcg.between=1")
    assert apply_policy(penalty, policy_for(root, tmp_path)).shift == "between"


def test_a_variant_needs_what_it_reads(hospital):
    for setting in (
        ("method=isda", "prototypes.views=[style]"),
        ("method=sgcg", "method.sgcg.recalibration=500", "network.features=projection"),
        ("method=sgcg", "method.sgcg.hard=1"),
        ("method=sgcg", "network.projection_stride=3"),
    ):
        with pytest.raises(FedsgcgError, match="CFG-001"):
            opened(hospital, *setting)
