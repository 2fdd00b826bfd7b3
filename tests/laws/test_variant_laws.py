"""Variants of SgCG: each loss against brute force, each law of the differences between sites."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.clients.methods import Guidance
from fedsgcg.clients.methods.anchors import boundary_pixels, hard_pixels, weighted_mean
from fedsgcg.clients.methods.base import View
from fedsgcg.clients.methods.sgcg import between_penalty, contrast_loss, contrast_of_view
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.message_sizes import reply_sizes, request_sizes
from fedsgcg.common.settings.plan import Plan, PrototypeSettings
from fedsgcg.common.sgcg.loss import sgcg_loss
from fedsgcg.common.sgcg.mixture import mixture_losses
from fedsgcg.common.statistics import ClassStatistics, between_covariance, between_site_trace
from fedsgcg.common.wire.messages import Request, decode_request, encode_request
from fedsgcg.common.wire.payload import Identity
from fedsgcg.server.aggregation.prototypes import ALL_SITES, PrototypeMemory
from fedsgcg.server.aggregation.recalibration import fitted_change, virtual_features
from tests.support.plans import small_plan
from tests.support.scripted_run import run

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**31)


def gaussians(rng, S, K, A):
    """Weights (S, K), means and covariances of S sites, in float64."""
    weight = rng.random((S, K)) + 0.1
    root = rng.normal(size=(S, K, A, A)) / A
    parts = weight / weight.sum(0), rng.normal(size=(S, K, A)), root @ root.swapaxes(-1, -2)
    return [torch.from_numpy(part) for part in parts]


def brute_mixture(q, labels, weight, mean, covariance, tau, active):
    """The mixture loss by its formula, with autograd."""
    linear = torch.einsum("na,ska->nsk", q, mean) / tau
    square = torch.einsum("na,skab,nb->nsk", q, covariance, q) / (2 * tau**2)
    z = (weight.log() + linear + square).logsumexp(1)[:, active].logsumexp(1)
    centre = torch.einsum("sk,ska->ka", weight, mean)
    kept = (labels != 255) & active[labels.where(labels != 255, torch.tensor(0))]
    positive = (q * centre[labels.where(kept, torch.tensor(0))]).sum(1) / tau
    return (z - positive) * kept


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(2, 4), st.sampled_from([0.1, 0.5, 2.0]), st.booleans())
def test_the_mixture_loss_and_its_gradient_equal_brute_force(seed, S, K, tau, all_active):
    rng = np.random.default_rng(seed)
    weight, mean, covariance = gaussians(rng, S, K, 5)
    active = torch.ones(K, dtype=torch.bool)
    active[0] = all_active
    labels = torch.from_numpy(rng.integers(0, K, 12))
    labels[::5] = 255
    q = torch.from_numpy(rng.normal(size=(12, 5))).requires_grad_()
    found = mixture_losses(q, labels, weight, mean, covariance, temperature=tau, active=active)
    wanted = brute_mixture(q, labels, weight, mean, covariance, tau, active)
    torch.testing.assert_close(found, wanted)
    upstream = torch.from_numpy(rng.normal(size=12))
    gradients = [torch.autograd.grad(loss, q, upstream)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_the_mixture_loss_passes_gradcheck():
    weight, mean, covariance = gaussians(np.random.default_rng(0), 3, 2, 4)
    q = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, active = torch.tensor([0, 1, 1, 255, 0, 1]), torch.tensor([True, True])
    assert torch.autograd.gradcheck(
        lambda x: mixture_losses(
            x, labels, weight, mean, covariance, temperature=0.5, active=active, unit_norm=True
        ),
        q.requires_grad_(),
    )


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 3), st.sampled_from(["full", "diagonal", "none"]), st.booleans())
def test_equal_sites_give_the_loss_of_one_gaussian(seed, S, form, unit):
    rng = np.random.default_rng(seed)
    _, mean, covariance = gaussians(rng, 1, 3, 6)
    weight, _, _ = gaussians(rng, S, 3, 6)
    q, labels = torch.from_numpy(rng.normal(size=(9, 6))), torch.from_numpy(rng.integers(0, 3, 9))
    same = {"temperature": 0.5, "covariance_form": form, "unit_norm": unit}
    active = torch.ones(3, dtype=torch.bool)
    found = mixture_losses(
        q,
        labels,
        weight,
        mean.expand(S, 3, 6),
        covariance.expand(S, 3, 6, 6),
        active=active,
        **same,
    )
    wanted = sgcg_loss(q, labels, mean[0], covariance[0], active=active, reduction="none", **same)
    torch.testing.assert_close(found, wanted)
    assert (found >= -1e-12).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.1, 0.5]), st.booleans())
def test_hard_and_other_pixels_have_their_shares(seed, share, by_class):
    rng = np.random.default_rng(seed)
    values, labels = rng.normal(size=30), rng.choice([0, 1, 2, 255], 30)
    hard, active = rng.random(30) < rng.choice([0.0, 0.3, 1.0]), np.array([True, True, False])
    groups = [[0], [1]] if by_class else [[0, 1]]
    means = []
    for group in groups:
        inside = np.isin(labels, group)
        parts = [values[inside & hard], values[inside & ~hard]]
        if not inside.any():
            continue
        if len(parts[0]) and len(parts[1]):
            means.append(share * parts[0].mean() + (1 - share) * parts[1].mean())
        else:
            means.append(values[inside].mean())
    found = weighted_mean(
        *(torch.from_numpy(array) for array in (values, labels, active, hard)),
        share,
        by_class=by_class,
    )
    assert found.item() == pytest.approx(np.mean(means) if means else 0.0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_boundary_pixel_has_a_neighbour_of_another_class(seed):
    labels = np.random.default_rng(seed).choice([0, 1, 2, 255], (2, 5, 6), p=[0.6, 0.2, 0.1, 0.1])
    wanted = np.zeros(labels.shape, bool)
    for b, y, x in np.ndindex(labels.shape):
        around = labels[b, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        own = labels[b, y, x]
        wanted[b, y, x] = own != 255 and ((around != own) & (around != 255)).any()
    found = boundary_pixels(torch.from_numpy(labels))[:, 0]
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_wrong_pixels_are_hard_and_a_cell_is_hard_if_one_of_its_pixels_is(tmp_path):
    plan = small_plan(tmp_path)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 1.0
    logits[0, 1, 0, 3] = 2.0  # one wrong pixel
    assert hard_pixels(logits, labels, 4, plan.data).nonzero().flatten().tolist() == [3]
    assert hard_pixels(logits, labels, 2, plan.data).tolist() == [False, True, False, False]
    labels[0, 0, 3] = 255
    assert not hard_pixels(logits, labels, 4, plan.data).any()


def site_parts(seed, sites="ABC", K=2, A=4):
    rng = np.random.default_rng(seed)
    found = {}
    for site in sites:
        labels = rng.integers(0, K, 60)
        found[site] = ClassStatistics.from_features(rng.normal(size=(60, A)), labels, K)
    return found


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["pixels", "sites"]))
def test_the_part_between_sites_completes_the_part_within_them(seed, weighting):
    parts, memory = site_parts(seed), PrototypeMemory(PrototypeSettings(weighting=weighting))
    between, merged = memory.differences("between", parts), memory.prototypes(parts)
    listed = list(parts.values())
    if weighting == "sites":
        listed = [part.weighted_equally() for part in listed]
    count = np.stack([part.count for part in listed])
    share = count / count.sum(0)
    within = np.einsum("sk,skab->kab", share, np.stack([part.covariance for part in listed]))
    np.testing.assert_allclose(between.covariance + within, merged.covariance, atol=1e-12)
    np.testing.assert_allclose(between_covariance(listed), between.covariance, atol=1e-12)
    traces = np.trace(between.covariance, axis1=1, axis2=2)
    np.testing.assert_allclose(traces, between_site_trace(listed), atol=1e-12)


@pytest.mark.parametrize("wanted", ["between", "sites"])
def test_a_site_reads_what_the_coordinator_sends_of_the_differences(tmp_path, wanted):
    name = "sites" if wanted == "sites" else "between"
    plan = small_plan(
        tmp_path, data__sites=["A", "B", "C", "D"], method__sgcg={name: wanted == "sites" or 1.0}
    )
    assert plan.shift == wanted
    parts = site_parts(3, A=plan.network.num_features)
    memory = PrototypeMemory(plan.prototypes)
    identity = Identity("run", "D", 2, "plan")
    sent = Request(identity, shift=memory.differences(wanted, parts))
    read = decode_request(encode_request(sent), request_sizes(plan)).shift
    guidance = Guidance.of(memory.prototypes(parts), plan.prototypes, CPU).with_shift(read)
    wanted_between = between_covariance(list(parts.values()))
    np.testing.assert_allclose(guidance.between.numpy(), wanted_between, atol=1e-6)
    if wanted == "sites":
        assert guidance.sites.mean.shape == (3, 2, plan.network.num_features)
        np.testing.assert_allclose(guidance.sites.weight.sum(0).numpy(), 1, atol=1e-6)
        swapped = {new: parts[old] for new, old in zip("ABC", "CAB", strict=True)}
        assert memory.by_site(swapped).digest() == memory.by_site(parts).digest(), "no names"
    else:
        assert guidance.sites is None
    for sizes in (reply_sizes(plan), request_sizes(small_plan(tmp_path))):
        with pytest.raises(FedsgcgError, match="PAY-106"):
            decode_request(encode_request(sent), sizes)


def test_differences_between_sites_are_refused_where_only_sums_are_known(tmp_path):
    def refused(**changes):
        with pytest.raises(FedsgcgError) as caught:
            small_plan(tmp_path, method__sgcg={"between": 1.0}, **changes)
        return {problem.where for problem in caught.value.problems}

    assert refused(federation__ownership="pooled") == {"federation.ownership"}
    assert refused(prototypes__memory="momentum") == {"prototypes.memory"}
    assert refused(data__sites=["A", "D"]) == {"data.sites"}
    memory = PrototypeMemory(PrototypeSettings())
    with pytest.raises(ValueError, match="a sum over the sites"):
        memory.between({ALL_SITES: site_parts(0)["A"]})
    assert memory.differences("between", {}) is None
    assert memory.differences("", site_parts(0)) is None


def test_the_penalty_is_the_mean_of_the_quadratic_form(tmp_path):
    plan = small_plan(tmp_path, method__sgcg={"between": 1.0})
    rng = np.random.default_rng(0)
    A = plan.network.num_features
    maps = torch.from_numpy(rng.normal(size=(2, A, 3, 3)).astype(np.float32)).requires_grad_()
    labels = torch.from_numpy(rng.choice([0, 1, 255], (2, 3, 3)))
    parts = site_parts(1, A=A)
    memory = PrototypeMemory(plan.prototypes)
    guidance = Guidance.of(memory.prototypes(parts), plan.prototypes, CPU)
    guidance = guidance.with_shift(memory.between(parts))
    found = between_penalty(maps, labels, guidance, plan)
    B = between_covariance(list(parts.values()))
    pixels = maps.detach().permute(0, 2, 3, 1).reshape(-1, A).double().numpy()
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    flat = labels.reshape(-1).numpy()
    wanted = [q @ B[y] @ q for q, y in zip(pixels, flat, strict=True) if y != 255]
    assert found.item() == pytest.approx(np.mean(wanted), rel=1e-5)
    found.backward()
    assert maps.grad.abs().sum() > 0


def test_a_variant_that_is_off_is_the_published_loss(tmp_path):
    plan, hard = small_plan(tmp_path), small_plan(tmp_path, method__sgcg={"hard": 0.5})
    rng, A = np.random.default_rng(0), plan.network.num_features
    maps = torch.from_numpy(rng.normal(size=(2, A, 8, 8)).astype(np.float32))
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    guidance = Guidance.of(site_parts(1, A=A)["A"], plan.prototypes, CPU)
    view = View("source", torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 8, 8), maps)
    plain = contrast_loss(maps, labels, guidance, plan.prototypes, 2)
    assert torch.equal(contrast_of_view(view, labels, guidance, plan), plain)
    one_class = torch.zeros_like(labels)  # predicted rightly and without a boundary: all alike
    losses = [contrast_of_view(view, one_class, guidance, other) for other in (plan, hard)]
    torch.testing.assert_close(*losses)
    assert contrast_of_view(view, labels, guidance, hard) != plain


def one_plan(tmp_path, activation="softmax") -> Plan:
    return small_plan(tmp_path, data__activation=activation)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_fitted_output_layer_is_the_optimum_and_does_not_depend_on_where_it_starts(
    tmp_path, activation
):
    plan, rng = one_plan(tmp_path, activation), np.random.default_rng(0)
    A, C = 3, plan.data.out_channels
    statistics = site_parts(2, A=A)["A"]
    features, classes = virtual_features(statistics, 300, rng)
    counts = np.bincount(classes)
    assert np.abs(counts / counts.sum() - statistics.count / statistics.count.sum()).max() < 0.01
    kernel, bias = rng.normal(size=(C, A)), rng.normal(size=C)
    change, shift = fitted_change(kernel, bias, features, classes, plan)

    def objective(change, shift):
        z = features @ (kernel + change).T + bias + shift
        if activation == "softmax":
            entropy = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), classes]
        else:
            entropy = np.log1p(np.exp(z[:, 0])) - z[:, 0] * (classes == 1)
        return entropy.mean() + 5e-4 * ((change**2).sum() + (shift**2).sum())

    best = objective(change, shift)
    assert best < objective(np.zeros_like(change), np.zeros_like(shift))
    for _ in range(20):
        other = change + 1e-3 * rng.normal(size=change.shape), shift + 1e-3 * rng.normal(size=C)
        assert objective(*other) > best


def test_virtual_features_have_the_moments_of_their_class():
    statistics = site_parts(5)["B"]
    features, classes = virtual_features(statistics, 60_000, np.random.default_rng(0))
    found = ClassStatistics.from_features(features, classes, 2)
    np.testing.assert_allclose(found.mean, statistics.mean, atol=0.03)
    np.testing.assert_allclose(found.covariance, statistics.covariance, atol=0.06)


def test_a_run_without_the_sites_consent_to_pass_statistics_on_ends_before_its_first_round(
    tmp_path,
):
    outcome, _ = run(small_plan(tmp_path, method__sgcg={"sites": True}))
    assert (outcome.status, outcome.rounds_done) == ("failed", 0)
    assert {problem.code for problem in outcome.failure} == {"ROL-202"}
    assert {problem.where for problem in outcome.failure} == {"A", "B", "C"}
    assert all("method.sgcg.sites=false" in problem.action for problem in outcome.failure)
