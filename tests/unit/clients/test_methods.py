"""Every local method: reproducible, lowers its loss, keeps and refuses what it should."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsgcg.clients.methods import METHODS, Guidance
from fedsgcg.clients.methods.class_statistics import site_moments, site_statistics
from fedsgcg.clients.methods.partners import MeanMixer, build_mixer, own_summary
from fedsgcg.clients.training import Session, round_batches, train_round, weights_of
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.heads import build_trained
from fedsgcg.common.seeding import stream
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.training import TRAITS
from tests.support import sites
from tests.support.one_site import opened
from tests.unit.clients.test_step_parts import batch_of

CPU = torch.device("cpu")
PAPERS = ["isda", "moon", "mixstyle", "dsu", "harmofl", "fedproto", "elcfs", "saml", "jigen"]
RIVALS = ["bigaug", "gin", "trid"]
LEARNING = (
    "method.learning_rate=5e-3",
    "method.local_epochs=1",
    "method.poly_power=0",
    "prototypes.warmup_rounds=0",
)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return sites.hospitals(folder / "data"), folder


def rounds(plan, store, number=2):
    """Train some rounds as the only site; returns the digest, each round's figures, the state."""
    network, state, figures = build_trained(plan, 0), {}, []
    for round_number in range(1, number + 1):
        guide = None
        if plan.method.contrasts:
            rngs = [stream(0, "statistics")]
            own = site_statistics(network, [store.slices("train")], plan, CPU, rngs)
            guide = Guidance.of(own, plan.prototypes, CPU)
        found, state = train_round(
            network,
            [store],
            plan,
            round_number=round_number,
            guide=guide,
            device=CPU,
            state=state,
        )
        figures.append(found)
    return weights_of(network).digest(), figures, state


def test_the_traits_of_the_settings_are_those_of_the_classes():
    for name, cls in METHODS.items():
        found = {trait for trait in ("contrasts", "mixes", "pairs", "raw") if getattr(cls, trait)}
        assert found == TRAITS[name], name


@pytest.mark.parametrize("name", PAPERS + RIVALS)
def test_a_method_is_reproducible_and_lowers_its_loss(hospital, name):
    plan, store = opened(hospital, f"method={name}", *LEARNING)
    digest, (first, last), _ = rounds(plan, store)
    torch.manual_seed(7)  # the global generator has no say
    assert rounds(plan, store, 2)[0] == digest
    assert last["loss"] < first["loss"]
    assert last["loss_supervised"] < first["loss_supervised"]
    assert set(METHODS[name].parts) <= set(first)


def test_a_method_that_draws_depends_on_seed_and_round(hospital):
    plan, store = opened(hospital, "method=jigen", "method.steps_per_round=1")

    def numbers(plan, round_number):
        method = METHODS["jigen"](build_trained(plan, 0), plan, 1, CPU)
        rng = stream(plan.seed, round_number, store.site, "draws")
        return method.draw((40,), rng)[0].tolist()

    assert numbers(plan, 1) == numbers(plan, 1)
    assert numbers(plan, 1) != numbers(plan, 2)
    assert numbers(plan, 1) != numbers(replace(plan, seed=1), 1)


def test_shares_of_draws_are_those_of_the_settings(hospital):
    plan, _ = opened(hospital, "method=jigen", "method.jigen.in_place=0.6")
    method = METHODS["jigen"](build_trained(plan, 0), plan, 1, CPU)
    (number,) = method.draw((20_000,), np.random.default_rng(0))
    assert abs((number == 0).mean() - 0.6) < 0.02
    assert set(np.unique(number)) == set(range(31))
    plan, _ = opened(hospital, "method=mixstyle", "method.mixstyle.probability=0.3")
    method = METHODS["mixstyle"](build_trained(plan, 0), plan, 1, CPU)
    rng = np.random.default_rng(0)
    mixed = [(method.draw((3,), rng)[0] != 1).any(0) for _ in range(2000)]
    assert np.abs(np.mean(mixed, axis=0) - 0.3).max() < 0.04
    plan, _ = opened(hospital, "method=dsu", "method.dsu.probability=0.3")
    method = METHODS["dsu"](build_trained(plan, 0), plan, 1, CPU)
    moved = [[one.any() for one in method.draw((2,), rng)] for _ in range(2000)]
    assert np.abs(np.mean(moved, axis=0) - 0.3).max() < 0.04
    plan, _ = opened(hospital, "method=trid", "method.trid.probability=0.3")
    method = METHODS["trid"](build_trained(plan, 0), plan, 1, CPU)
    drawn = [[one[:, 0].mean() for one in method.draw((20,), rng)] for _ in range(2000)]
    assert np.abs(np.mean(np.array(drawn) > 0, axis=0) - 0.3).max() < 0.04
    assert np.abs(np.mean(drawn, axis=0) - 0.15).max() < 0.03, "half of the channels of those"


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("mixstyle", "probability"),
        ("dsu", "probability"),
        ("trid", "probability"),
        ("trid", "share"),
        ("bigaug", "probability"),
    ],
)
def test_methods_of_probability_zero_are_the_baseline_and_leave_no_hooks(hospital, name, setting):
    plan, _ = opened(hospital, f"method={name}", f"method.{name}.{setting}=0")
    batch = batch_of((4,))
    losses = []
    for method in (name, "source"):
        plan = replace(plan, method=replace(plan.method, name=method))
        network = build_trained(plan, 0)
        losses.append(Session(network, plan, 1, CPU, {}).step(batch, None)[0].item())
        assert not any(module._forward_hooks for module in network.modules())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_draws_of_a_slice_are_the_same_in_any_number_of_parts(hospital):
    """Without BatchNorm and Dice a jigsaw step in parts is the whole step."""
    plan, _ = opened(hospital, "method=jigen", "network.norm=group")
    batch = batch_of((6,))
    found = []
    for parts in (1, 3):
        network = build_trained(plan, 0)
        session = Session(network, plan, 1, CPU, {}, np.random.default_rng(0))
        found.append(session.step(batch, None, parts)[2].item())  # the jigsaw loss
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_draws_of_gin_are_the_same_in_any_number_of_parts(hospital):
    """Without BatchNorm the consistency, a mean over slices, is that of the whole step."""
    plan, _ = opened(hospital, "method=gin", "network.norm=instance")
    batch, found = batch_of((6,)), []
    for parts in (1, 3):
        session = Session(build_trained(plan, 0), plan, 1, CPU, {}, np.random.default_rng(0))
        found.append(session.step(batch, None, parts)[2].item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_gins_loss_is_that_of_both_views_and_their_weighted_consistency(hospital):
    plan, _ = opened(hospital, "method=gin", "method.gin.weight=3")
    total, supervised, consistency = (
        Session(build_trained(plan, 0), plan, 1, CPU, {}).step(batch_of((4,)), None).tolist()
    )
    assert total == pytest.approx(supervised + 3 * consistency, rel=1e-5)
    assert consistency > 0


def test_gin_without_strength_is_the_baseline(hospital):
    plan, _ = opened(hospital, "method=gin", "method.gin.strength=0")
    baseline = replace(plan, method=replace(plan.method, name="source"))
    losses = [
        Session(build_trained(one, 0), one, 1, CPU, {}).step(batch_of((4,)), None)[0].item()
        for one in (plan, baseline)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bigaug_transforms_the_slices_of_training_and_of_recalibration(hospital):
    plan, store = opened(hospital, "method=bigaug", "augmentation=none")
    baseline = replace(plan, method=replace(plan.method, name="source"))
    table = store.slices("train")
    plain, changed = (
        next(iter(round_batches([table], one, 1, ["North"], CPU))) for one in (baseline, plan)
    )
    assert not torch.equal(plain.images, changed.images)
    assert not torch.equal(plain.labels, changed.labels)
    means = []
    for one in (baseline, plan):
        rngs, generator = [stream(0, "moments")], torch.Generator().manual_seed(0)
        found = site_moments(build_trained(one, 0), [table], one, CPU, rngs, generator)
        means.append(found.mean)
    assert not np.allclose(*means)


def test_running_moments_count_one_pass_a_step_at_the_weights_themselves(hospital):
    for name, passes in (("gin", 1), ("harmofl", 2), ("elcfs", 1), ("saml", 1), ("moon", 1)):
        plan, _ = opened(hospital, f"method={name}")
        batch = replace(batch_of((4,)), mixed=batch_of((4,)).images.flip(3))
        network = build_trained(plan, 0)
        Session(network, plan, 1, CPU, {}).step(batch, None)
        layers = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {int(layer.num_batches_tracked) for layer in layers} == {passes}, name
        assert all(layer.track_running_stats for layer in layers), name


# MOON's previous model, and what stays at the site


def test_moon_compares_with_the_model_that_the_site_sent_in_its_last_round(hospital):
    plan, store = opened(hospital, "method=moon", "method.steps_per_round=2")
    network = build_trained(plan, 0)
    figures, state = train_round(
        network, [store], plan, round_number=1, guide=None, device=CPU, state={}
    )
    assert figures["loss_contrast"] == pytest.approx(np.log(2), rel=1e-6)
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[f"local.previous.{name}"], tensor)
    other = build_trained(plan, 5)  # the received model of round 2 is another one
    figures, _ = train_round(
        other, [store], plan, round_number=2, guide=None, device=CPU, state=state
    )
    assert figures["loss_contrast"] != pytest.approx(np.log(2), rel=1e-3)


def test_samls_metric_network_stays_at_the_site_and_jigens_head_is_shared(hospital):
    plan, store = opened(hospital, "method=saml", "method.steps_per_round=1")
    network = build_trained(plan, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _, state = train_round(network, [store], plan, round_number=1, guide=None, device=CPU, state={})
    assert any(name.startswith("local.metric") for name in state)
    assert set(before) == set(network.state_dict())
    plan, _ = opened(hospital, "method=jigen")
    assert "training_heads.jigsaw.weight" in build_trained(plan, 0).state_dict()


# amplitudes and domains


def test_harmofls_partner_is_the_geometric_mean_of_all_slices(hospital):
    plan, store = opened(hospital, "method=harmofl")
    mixer = build_mixer([store], plan, "North", 1, b"", CPU)
    assert isinstance(mixer, MeanMixer)
    partners, ratio = mixer.draw((3,))
    summary = own_summary([store], plan.method.ram, CPU)
    expected = np.exp(summary.first / summary.count)
    np.testing.assert_allclose(partners[1].numpy(), expected, rtol=1e-6)
    assert ratio.tolist() == [0, 0, 0]
    # With all sites' summary the mean is theirs.
    both = summary + summary
    data = replace(both, first=both.first * 1.1, second=both.second * 1.21, sites=("A", "B"))
    shared = replace(plan.method.ram, sharing="summary")
    plan = replace(plan, method=replace(plan.method, ram=shared))
    partners, _ = build_mixer([store], plan, "North", 1, data.encode(), CPU).draw((1,))
    np.testing.assert_allclose(partners[0].numpy(), expected**1.1, rtol=1e-5)


def test_samls_meta_test_domain_is_one_of_the_clients_domains(hospital):
    plan, _ = opened(hospital, "method=saml", "federation=pooled")
    method = METHODS["saml"](build_trained(plan, 0), plan, 3, CPU)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        (test,) = method.draw((2, 3, 1), rng)
        seen.add(tuple(test.tolist()))
    assert seen == {(1, 1, 0, 0, 0, 0), (0, 0, 1, 1, 1, 0), (0, 0, 0, 0, 0, 1)}
    assert method.draw((4,), rng) == ()  # one domain: the other one is virtual
    batch = batch_of((2, 2))
    loss = Session(build_trained(plan, 0), plan, 2, CPU, {}).step(batch, None)
    assert loss.isfinite().all()


# refusals


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (("method=moon", "federation=pooled"), "federation.ownership"),
        (("method=isda", "network.features=bottleneck"), "network.features"),
        (("method=elcfs", "network.features=bottleneck"), "network.features"),
        (("method=saml", "network.features=bottleneck"), "network.features"),
        (("method=harmofl", "method.ram.sharing=bank"), "method.ram.sharing"),
        (("method=mixstyle", "method.mixstyle.blocks=[0,1]"), "method.mixstyle.blocks"),
        (("method=dsu", "method.dsu.blocks=[2,2]"), "method.dsu.blocks"),
        (("method=dsu", "method.dsu.probability=1.5"), "method.dsu.probability"),
        (("method=trid", "method.trid.blocks=[]"), "method.trid.blocks"),
        (("method=trid", "method.trid.share=2"), "method.trid.share"),
        (("method=gin", "method.gin.strength=1.5"), "method.gin.strength"),
        (("method=bigaug", "method.bigaug.elastic=0.05"), "method.bigaug.elastic"),
        (("method=moon", "method.moon.temperature=0"), "method.moon.temperature"),
        (("method=jigen", "method.jigen.in_place=0"), "method.jigen.in_place"),
        (("method=isda", "method.statistics=false"), "method.statistics"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_setting(tmp_path, overrides, where):
    with pytest.raises(FedsgcgError) as caught:
        sites.plan_of(tmp_path / "data", tmp_path, *overrides)
    assert where in {problem.where for problem in caught.value.problems}


class Plain(torch.nn.Module):
    """A network without encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 2, 1)

    def forward(self, images):
        logits = self.layer(images)
        return logits, logits


@pytest.mark.parametrize("name", ["isda", "mixstyle", "dsu", "trid"])
def test_a_network_without_the_layers_that_a_method_changes_is_refused(hospital, name):
    plan, _ = opened(hospital, f"method={name}")
    guide = Guidance(torch.zeros(2, 2), torch.zeros(2, 2, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(FedsgcgError, match="TRN-320"):
        Session(Plain(), plan, 1, CPU, {}).step(batch_of((2,)), guide)


def test_isda_uses_raw_features_and_other_methods_those_of_unit_length(tmp_path):
    def unit(*overrides) -> bool:
        plan: Plan = sites.plan_of(tmp_path / "data", tmp_path, *overrides)
        return plan.unit_features

    assert unit("method=fedproto")
    assert not unit("method=isda")
    assert not unit("method=sgcg", "prototypes.normalize=false")
