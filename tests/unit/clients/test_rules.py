"""The site's part of the aggregation rules: gradients, own BatchNorm, a model without the site."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedsgcg.clients.corrections import ControlVariates, Proximal
from fedsgcg.clients.guard.policy import refusals
from fedsgcg.clients.training import Session, train_round, weights_of
from fedsgcg.clients.without_site import merged_without, own_share, sent_model
from fedsgcg.common.heads import build_trained
from fedsgcg.common.settings.plan import METHOD_NAMES, Plan
from fedsgcg.common.wire.learnable import learnable, split_learnable
from fedsgcg.common.wire.messages import SHARES, STATISTICS, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from tests.support import sites
from tests.support.one_site import network_of, opened
from tests.support.policed import Hospital

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rules")
    return sites.hospitals(folder / "data"), folder


def trained(hospital, *overrides, control=None, state=None, number=1):  # type: ignore[no-untyped-def]
    plan, store = opened(hospital, *overrides)
    network = network_of(plan)
    options = {"round_number": number, "guide": None, "device": CPU}
    figures, kept = train_round(network, [store], plan, control=control, state=state, **options)
    return weights_of(network), kept, figures


# FedProx


def test_the_proximal_gradient_is_that_of_the_published_term() -> None:
    """Autograd of task + mu/2 |x_s - x|^2 in float64, at a point away from x."""
    torch.manual_seed(0)
    network = nn.Linear(4, 3).double()
    received = [p.detach().clone() for p in network.parameters()]
    term = Proximal(network, 0.3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    inputs = torch.randn(5, 4, dtype=torch.float64)
    network(inputs).square().mean().backward()
    term.apply()
    found = [p.grad.clone() for p in network.parameters()]  # type: ignore[union-attr]
    network.zero_grad()
    distance = sum(
        (p - x).square().sum() for p, x in zip(network.parameters(), received, strict=True)
    )
    (network(inputs).square().mean() + 0.3 / 2 * distance).backward()
    for ours, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_without_a_weight_fedprox_is_fedavg_to_the_bit_and_with_one_it_stays_nearer(
    hospital,
) -> None:  # type: ignore[no-untyped-def]
    plain, _, _ = trained(hospital)
    prox = "federation.aggregator=fedprox"
    assert trained(hospital, prox, "federation.fedprox.mu=0")[0].digest() == plain.digest()
    start = sites.weights(opened(hospital)[0])
    moved = [
        np.linalg.norm((model.values - start.values)[learnable(model)])
        for model in (plain, trained(hospital, prox, "federation.fedprox.mu=1000")[0])
    ]
    assert moved[1] < moved[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_correction_is_added_once_per_step_whatever_the_number_of_its_parts(
    hospital, parts
) -> None:  # type: ignore[no-untyped-def]
    overrides = ("federation.aggregator=scaffold", f"site.micro_batches={parts}")
    plan, store = opened(hospital, *overrides, "network.norm=group", "method.steps_per_round=1")
    network = network_of(plan)
    zero = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    one = {name: torch.ones_like(p) for name, p in network.named_parameters()}
    found = []
    for common in (zero, one):
        network = network_of(plan)
        options = {"round_number": 1, "guide": None, "device": CPU}
        _, kept = train_round(network, [store], plan, control=common, state={}, **options)
        gradients = {name: p.grad for name, p in network.named_parameters()}
        found.append((gradients, kept))
    for name in zero:
        torch.testing.assert_close(found[1][0][name], found[0][0][name] + 1.0)
        torch.testing.assert_close(found[1][1][f"control.{name}"], found[0][0][name])


# SCAFFOLD


def test_four_steps_of_scaffold_by_hand() -> None:
    """y <- y - l (g - c_i + c) on a quadratic, then c_i - c + (x - y) / (K l)."""
    target, scale, rate = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0]), 0.1
    c, c_i = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([-0.1, 0.4, 0.2])
    x = torch.tensor([2.0, 2.0, 2.0])

    y = x.clone()
    for _ in range(4):
        y = y - rate * (scale * (y - target) - c_i + c)
    wanted = c_i - c + (x - y) / (4 * rate)

    network = nn.Module()
    network.w = nn.Parameter(x.clone())
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    variates = ControlVariates(network, {"w": c}, {"w": c_i})
    for _ in range(4):
        optimizer.zero_grad(set_to_none=True)
        (0.5 * scale * (network.w - target).square()).sum().backward()
        variates.apply()
        optimizer.step()
    torch.testing.assert_close(network.w.detach(), y)
    torch.testing.assert_close(variates.state(4)["control.w"], wanted)


def test_equal_control_variates_change_nothing_and_the_next_is_the_mean_gradient(hospital) -> None:  # type: ignore[no-untyped-def]
    rule = "federation.aggregator=scaffold"
    plain, _, _ = trained(hospital)
    first, state, _ = trained(hospital, rule)
    np.testing.assert_array_equal(first.values, plain.values)  # c and c_s are zero at first
    own = {n.removeprefix("control."): t for n, t in state.items() if n.startswith("control.")}
    equal, _, _ = trained(hospital, rule, control=own, state=state)
    np.testing.assert_array_equal(equal.values, plain.values)
    other, _, _ = trained(hospital, rule, control={}, state=state)
    assert other.digest() != plain.digest()


def plan_for(hospital: tuple[Path, Path], folder: Path, *overrides: str) -> Plan:
    root, _ = hospital
    cache = f"site.cache={folder.parent / 'cache'}"
    return sites.plan_of(root, folder, "heldout=South", cache, *overrides)


def answer(plan: Plan, number: int, weights: Weights, kind: str = TRAIN, **request) -> Reply:  # type: ignore[no-untyped-def]
    identity = sites.identity(plan, number)
    return sites.answer(plan, kind, Request(identity, weights, **request), "North")


def test_a_site_answers_with_its_control_variate_and_refuses_a_wrong_one(
    hospital, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    plan = plan_for(hospital, tmp_path, "federation.aggregator=scaffold")
    weights = sites.weights(plan)
    first = answer(plan, 1, weights)
    assert first.error == ""
    assert first.control_variates is not None
    size = int(learnable(weights).sum())
    assert first.control_variates.shape == (size,)
    assert first.control_variates.any()
    for wrong in (np.zeros(size - 1, np.float32), np.full(size, np.nan, np.float32)):
        assert answer(plan, 2, weights, control_variates=wrong).error == "PAY-121"
    # c = c_s: the second round is that of FedAvg; and the site has kept c_s.
    second = answer(plan, 2, weights, control_variates=first.control_variates)
    plain = plan_for(hospital, tmp_path / "plain", "federation.aggregator=fedavg")
    assert second.weights is not None
    assert second.weights.digest() == answer(plain, 2, weights).weights.digest()  # type: ignore[union-attr]
    assert answer(plain, 1, weights).control_variates is None


def test_a_hospital_sends_control_variates_only_with_its_consent(hospital, tmp_path) -> None:  # type: ignore[no-untyped-def]
    root, _ = hospital
    rule = "federation.aggregator=scaffold"
    strict = Hospital(root, tmp_path / "strict")
    (problem,) = refusals(strict.plan(rule), strict.policy)
    assert (problem.code, problem.where) == ("POL-704", "sharing")
    consent = {"sharing": ("weights", "statistics", "control_variates")}
    open_one = Hospital(root, tmp_path / "open", consent)
    assert not list(refusals(open_one.plan(rule), open_one.policy))
    assert not list(refusals(strict.plan(rule, heldout="North"), strict.policy))


# FedBN


def bent(weights: Weights) -> Weights:
    """The same model with other BatchNorm layers."""
    values = weights.values.copy()
    model = dataclasses.replace(weights, values=values)
    layers = {n.rpartition(".")[0] for n, _ in weights.layout if n.endswith("running_mean")}
    for name, array in model.to_state().items():
        if name.rpartition(".")[0] in layers and array.dtype == np.float32:
            array[...] = array + 0.5
    return model


def test_a_site_trains_its_own_batch_norm_whatever_it_receives(hospital, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = plan_for(hospital, tmp_path, "federation.aggregator=fedbn", "method=source")
    weights = sites.weights(plan)
    first = answer(plan, 1, weights)
    assert first.error == ""
    # The next model has the site's convolutions, and the layers of others.
    assert first.weights is not None
    others = bent(first.weights)
    assert others.digest() != first.weights.digest()
    own, foreign = answer(plan, 2, first.weights), answer(plan, 2, others)
    assert own.weights is not None
    assert foreign.weights is not None
    np.testing.assert_array_equal(own.weights.values, foreign.weights.values)
    plain = plan_for(hospital, tmp_path / "plain", "method=source")
    assert answer(plain, 2, others).weights.digest() != own.weights.digest()  # type: ignore[union-attr]


def test_class_statistics_have_the_sites_layers_and_moments_those_of_everybody(
    hospital, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    plan = plan_for(hospital, tmp_path, "federation.aggregator=fedbn", "method=sgcg")
    first = answer(plan, 1, sites.weights(plan))
    assert first.weights is not None
    both = {"moments": True, "classes": True}
    own = answer(plan, 1, first.weights, STATISTICS, options=both)
    foreign = answer(plan, 1, bent(first.weights), STATISTICS, options=both)
    assert own.statistics is not None
    assert foreign.statistics is not None
    assert own.statistics.digest() == foreign.statistics.digest()
    assert own.moments is not None
    assert foreign.moments is not None
    assert not np.allclose(own.moments.mean, foreign.moments.mean)
    # The closing pass describes the model that the held-out hospital gets.
    closing = {"classes": True, "norm_mode": "running"}
    own, foreign = (
        answer(plan, 1, model, STATISTICS, options=closing)
        for model in (first.weights, bent(first.weights))
    )
    assert own.statistics.digest() != foreign.statistics.digest()  # type: ignore[union-attr]


# FedCE and FedDG-GA


@pytest.mark.parametrize("averaged", [True, False])
def test_the_model_without_a_site_is_the_mean_of_the_others(averaged: bool) -> None:
    rng = np.random.default_rng(0)
    layout = (("w", (6,)), ("bn.running_mean", (2,)), ("bn.running_var", (2,)))
    parts = [
        (site, Weights(layout, np.abs(rng.normal(size=10)).astype(np.float32)), share)
        for site, share in (("A", 3.0), ("B", 1.0), ("C", 2.0))
    ]
    merged = merge_weights(parts)
    state = sent_model(parts[0][1])
    shares = {model.digest(): share / 6 for _, model, share in parts}
    found = merged_without(merged, state, {SHARES: shares}, averaged=averaged)
    assert found is not None
    wanted = merge_weights(parts[1:]).values.copy()
    if not averaged:
        wanted[6:] = merged.values[6:]  # pooled moments are not those of a mean
    np.testing.assert_allclose(found.values, wanted, rtol=1e-5)
    assert (found.values[8:] >= 0).all()


def test_a_model_that_was_not_merged_is_not_subtracted() -> None:
    model = Weights((("w", (2,)),), np.ones(2, np.float32))
    state, digest = sent_model(model), model.digest()
    assert own_share(state, {SHARES: {digest: 0.25}}) == 0.25
    for options in (
        *({}, {SHARES: {"0" * 64: 0.25}}, {SHARES: [digest]}, {SHARES: {digest: "1"}}),
        *({SHARES: {digest: value}} for value in (1.0, -0.1, float("nan"))),
    ):
        assert own_share(state, options) is None
        assert merged_without(model, state, options, averaged=True) is None
    assert own_share({}, {SHARES: {digest: 0.25}}) is None


@pytest.mark.parametrize(
    ("rule", "metric"),
    [("feddg_ga", "validation_dice_trained"), ("fedce", "validation_dice_without")],
)
def test_a_site_states_one_more_dice_for_the_rules_that_weigh_by_it(
    hospital, rule: str, metric: str, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    plan = plan_for(
        hospital, tmp_path, f"federation.aggregator={rule}", "data.validation_fraction=0.5"
    )
    first = answer(plan, 1, sites.weights(plan))
    assert first.weights is not None
    assert (metric in first.metrics) == (rule == "feddg_ga")  # nothing was merged before
    shares = {first.weights.digest(): 0.5}
    second = answer(plan, 2, first.weights, options={SHARES: shares})
    assert 0 <= second.metrics[metric] <= 1
    none = plan_for(
        hospital, tmp_path / "none", f"federation.aggregator={rule}", "data.validation_fraction=0"
    )
    assert metric not in answer(none, 1, sites.weights(none)).metrics


# every method


@pytest.mark.parametrize(
    ("method", "rule"), list(itertools.product(METHOD_NAMES, ["fedprox", "scaffold"]))
)
def test_a_correction_changes_the_gradient_of_every_method(
    hospital, method: str, rule: str
) -> None:  # type: ignore[no-untyped-def]
    plan, store = opened(
        hospital, f"method={method}", f"federation.aggregator={rule}", "method.steps_per_round=2"
    )
    network = build_trained(plan, 0)
    control = {name: torch.ones_like(p) for name, p in network.named_parameters()}
    options = {"round_number": 1, "guide": None, "device": CPU}
    _, kept = train_round(network, [store], plan, control=control, **options)
    corrected = weights_of(network)
    plain = dataclasses.replace(
        plan, federation=dataclasses.replace(plan.federation, aggregator="fedavg")
    )
    other = build_trained(plan, 0)
    train_round(other, [store], plain, **options)
    assert corrected.digest() != weights_of(other).digest()
    names = {name.removeprefix("control.") for name in kept if name.startswith("control.")}
    assert names == (set(control) if rule == "scaffold" else set())
    assert set(control) == set(
        split_learnable(corrected, np.zeros(sum(map(torch.numel, control.values()))))
    )


def test_a_session_keeps_the_addresses_that_a_captured_step_uses(hospital) -> None:  # type: ignore[no-untyped-def]
    """A CUDA graph reads and writes the same memory in every replay."""
    plan, _ = opened(hospital, "federation.aggregator=scaffold")
    session = Session(network_of(plan), plan, 1, CPU, {}, control={})
    (variates,) = session._corrections
    tensors = [*variates._sums.values(), *variates._offsets.values()]  # type: ignore[attr-defined]
    before = [tensor.data_ptr() for tensor in tensors]
    for parameter in session.method.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    variates.apply()
    after = [*variates._sums.values(), *variates._offsets.values()]  # type: ignore[attr-defined]
    assert [tensor.data_ptr() for tensor in after] == before
