"""The losses of the local methods against loops, and their gradients against moved networks."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods import METHODS
from fedsgcg.clients.methods.base import mean_dice_loss, segmentation_loss, targets
from fedsgcg.clients.methods.boundary import (
    boundary_contrast,
    contour_and_ring,
    region_means,
    triplet_loss,
)
from fedsgcg.clients.methods.elcfs import clipped_descent
from fedsgcg.clients.methods.feature_style import draw_style, mix_style
from fedsgcg.clients.methods.fedproto import prototype_distance
from fedsgcg.clients.methods.gin import divergence_from_mean
from fedsgcg.clients.methods.harmofl import ascent
from fedsgcg.clients.methods.isda import augmentation_surplus
from fedsgcg.clients.methods.jigen import permutations, permute_tiles
from fedsgcg.clients.methods.moon import model_contrast
from fedsgcg.clients.methods.saml import bounded_descent, compactness_loss
from fedsgcg.clients.methods.steps import norm_of
from fedsgcg.common.heads import build_trained
from tests.support import sites

CPU = torch.device("cpu")
seeds = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def covariances(rng, classes, channels):
    factor = normal(rng, classes, channels, channels)
    return factor @ factor.transpose(1, 2) / channels


# ISDA


def raised_by_hand(labels, weight, covariance, b, y, x, direction):
    """Return the variance of sum over o of d_o' e_(i+o) for noise e of the neighbours' classes."""
    H, W = labels.shape[1:]
    half = weight.shape[-1] // 2
    total = torch.zeros((), dtype=torch.float64)
    for dy in range(-half, half + 1):
        for dx in range(-half, half + 1):
            v, u = y + dy, x + dx
            if 0 <= v < H and 0 <= u < W and labels[b, v, u] != 255:
                d = direction[:, dy + half, dx + half]
                total = total + d @ covariance[labels[b, v, u]] @ d
    return total


@settings(max_examples=10, deadline=None)
@given(seed=seeds, kernel=st.sampled_from([1, 3]), strength=st.sampled_from([0.5, 7.5]))
def test_isda_raises_each_logit_by_the_variance_of_its_difference_to_the_own_class(
    seed, kernel, strength
):
    rng = generator(seed)
    B, K, A, H, W = 1, 3, 4, 3, 4
    logits, weight = normal(rng, B, K, H, W), normal(rng, K, A, kernel, kernel)
    covariance = covariances(rng, K, A)
    labels = torch.randint(0, K, (B, H, W), generator=rng)
    labels[0, 0, 0] = 255
    losses = []
    for y in range(H):
        for x in range(W):
            own = int(labels[0, y, x])
            if own == 255:
                continue
            raised = [
                logits[0, j, y, x]
                + strength
                / 2
                * raised_by_hand(labels, weight, covariance, 0, y, x, weight[j] - weight[own])
                for j in range(K)
            ]
            plain = torch.logsumexp(logits[0, :, y, x], 0) - logits[0, own, y, x]
            losses.append(torch.logsumexp(torch.stack(raised), 0) - raised[own] - plain)
    found = augmentation_surplus(logits, labels, weight, covariance, strength)
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    assert found >= 0


def test_isda_with_sigmoid_moves_each_structures_logit_away_from_the_truth():
    rng = generator(1)
    structures = {"disc": [1, 2], "cup": [2]}
    logits, weight = normal(rng, 1, 2, 2, 3), normal(rng, 2, 4, 3, 3)
    covariance, labels = covariances(rng, 3, 4), torch.tensor([[[0, 1, 2], [2, 255, 0]]])
    total, count = 0.0, 0
    for s, classes in enumerate(structures.values()):
        for y in range(2):
            for x in range(3):
                if labels[0, y, x] == 255:
                    continue
                move = 0.35 * raised_by_hand(labels, weight, covariance, 0, y, x, weight[s])
                sign = 1.0 if int(labels[0, y, x]) in classes else -1.0
                z = logits[0, s, y, x]
                total += (F.softplus(-(sign * z - move)) - F.softplus(-sign * z)).item()
                count += 1
    found = augmentation_surplus(logits, labels, weight, covariance, 0.7, structures)
    assert found.item() == pytest.approx(total / count, rel=1e-9)


def test_isda_bounds_the_expected_loss_of_augmented_features():
    """The promise behind the closed form, on 20 000 drawn augmentations of every pixel."""
    rng = generator(2)
    K, A, strength = 3, 4, 0.8
    features, weight = normal(rng, 1, A, 4, 4), normal(rng, K, A, 3, 3)
    covariance = covariances(rng, K, A)
    labels = torch.randint(0, K, (1, 4, 4), generator=rng)
    roots = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(A))
    noise = torch.einsum("nhwa,hwba->nbhw", normal(rng, 20_000, 4, 4, A), roots[labels[0]])
    drawn = F.conv2d(features + math.sqrt(strength) * noise, weight, padding=1)
    expected = F.cross_entropy(drawn, labels.expand(20_000, -1, -1))
    logits = F.conv2d(features, weight, padding=1)
    bound = F.cross_entropy(logits, labels) + augmentation_surplus(
        logits, labels, weight, covariance, strength
    )
    assert expected < bound
    assert F.cross_entropy(logits, labels) < expected


def test_isdas_gradient_reaches_logits_and_classifier():
    rng = generator(3)
    logits, weight = normal(rng, 1, 3, 2, 2), normal(rng, 3, 2, 3, 3)
    covariance, labels = covariances(rng, 3, 2), torch.tensor([[[0, 1], [2, 255]]])
    assert torch.autograd.gradcheck(
        lambda z, w: augmentation_surplus(z, labels, w, covariance, 0.5),
        (logits.requires_grad_(), weight.requires_grad_()),
    )


# FedProto and MOON


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_fedproto_is_the_mean_squared_error_of_the_class_means(seed):
    rng = generator(seed)
    features, mean = normal(rng, 12, 3), normal(rng, 4, 3)
    labels = torch.randint(0, 5, (12,), generator=rng)
    labels[labels == 4] = 255
    active = torch.tensor([True, True, False, True])
    errors = [
        (features[labels == k].mean(0) - mean[k]).square().mean().item()
        for k in (0, 1, 3)
        if (labels == k).any()
    ]
    expected = sum(errors) / len(errors) if errors else 0.0
    assert prototype_distance(features, labels, mean, active).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(
        lambda q: prototype_distance(q, labels, mean, active), features.requires_grad_()
    )


def test_without_a_class_in_common_fedproto_adds_nothing():
    features = torch.ones(3, 2, requires_grad=True)
    labels, mean = torch.tensor([0, 255, 0]), torch.zeros(2, 2)
    distance = prototype_distance(features, labels, mean, torch.tensor([False, True]))
    distance.backward()
    assert distance == 0
    assert torch.equal(features.grad, torch.zeros(3, 2))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, temperature=st.sampled_from([0.1, 0.5, 2.0]))
def test_moon_is_the_formula_of_the_paper(seed, temperature):
    rng = generator(seed)
    code, received, previous = (normal(rng, 5, 4) for _ in range(3))
    losses = []
    for z, g, p in zip(code, received, previous, strict=True):
        near, far = (math.exp(z @ o / (z.norm() * o.norm()) / temperature) for o in (g, p))
        losses.append(-math.log(near / (near + far)))
    found = model_contrast(code, received, previous, temperature)
    assert found.item() == pytest.approx(np.mean(losses))
    assert torch.autograd.gradcheck(
        lambda z: model_contrast(z, received, previous, temperature), code.requires_grad_()
    )


def test_moon_has_no_effect_while_both_models_are_the_same():
    code = normal(generator(0), 3, 4).requires_grad_()
    other = normal(generator(1), 3, 4)
    loss = model_contrast(code, other, other, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert code.grad.abs().max() < 1e-15


def test_gins_divergence_is_that_of_the_published_code_and_has_a_gradient():
    rng = generator(0)
    logits = [normal(rng, 2, 3, 4, 4).requires_grad_() for _ in range(2)]
    valid = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    found = divergence_from_mean(logits[0].softmax(1), logits[1].softmax(1), valid)
    mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    both = torch.cat([one.log_softmax(1) for one in logits])
    assert found.item() == pytest.approx(F.kl_div(both, torch.cat([mean, mean])).item(), rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda a, b: divergence_from_mean(a.softmax(1), b.softmax(1), valid), logits
    )
    half = valid.clone()
    half[0] = False
    rest = divergence_from_mean(logits[0].softmax(1), logits[1].softmax(1), half)
    own = [one.softmax(1)[1:] for one in logits]
    assert rest.item() == pytest.approx(divergence_from_mean(*own, valid[1:]).item(), rel=1e-9)


# MixStyle and DSU


def moments(maps):
    return maps.mean((2, 3)), maps.var((2, 3), correction=0).add(1e-6).sqrt()


def test_mixstyle_gives_an_image_the_mixture_of_two_statistics_and_keeps_its_pattern():
    maps = normal(generator(0), 3, 2, 8, 8) * 3 + 1
    ratio, partner = torch.tensor([0.25, 1.0, 0.0]), torch.tensor([2, 0, 1])
    mixed = mix_style(maps, ratio, partner)
    (mean, deviation), (new_mean, new_deviation) = moments(maps), moments(mixed)
    share = ratio.double()[:, None]
    expected = share * mean + (1 - share) * mean[partner]
    torch.testing.assert_close(new_mean, expected)
    expected = share * deviation + (1 - share) * deviation[partner]
    torch.testing.assert_close(new_deviation, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed[1], maps[1])
    for b in range(3):
        assert np.corrcoef(maps[b, 0].flatten(), mixed[b, 0].flatten())[0, 1] == pytest.approx(1)


def test_dsu_moves_statistics_by_multiples_of_their_spread_over_the_batch():
    maps = normal(generator(0), 4, 2, 8, 8) * torch.tensor([1.0, 2, 3, 4])[:, None, None, None]
    of_mean, of_deviation = normal(generator(1), 4, 2), normal(generator(2), 4, 2).abs()
    (mean, deviation), (new_mean, new_deviation) = (
        moments(maps),
        moments(draw_style(maps, of_mean, of_deviation)),
    )
    for found, old, noise in (
        (new_mean, mean, of_mean),
        (new_deviation, deviation, of_deviation),
    ):
        spread = (old - old.mean(0)).square().mean(0).add(1e-6).sqrt()
        torch.testing.assert_close(found, old + noise * spread, rtol=1e-5, atol=1e-6)
    zero = torch.zeros(4, 2)
    torch.testing.assert_close(draw_style(maps, zero, zero), maps)
    single = draw_style(maps[:1], of_mean[:1], zero[:1])
    torch.testing.assert_close(single, maps[:1], rtol=0, atol=1e-2)  # one image has no spread


# boundaries


@settings(max_examples=25, deadline=None)
@given(seed=seeds, width=st.integers(1, 6), density=st.sampled_from([0.05, 0.5, 0.95]))
def test_contour_and_ring_are_those_of_binary_morphology(seed, width, density):
    masks = np.random.default_rng(seed).random((2, 2, 9, 11)) < density
    contour, ring = contour_and_ring(torch.from_numpy(masks), width)
    for b in range(2):
        for s in range(2):
            one = masks[b, s]
            eroded = ndimage.binary_erosion(one)
            grown = ndimage.binary_dilation(one, iterations=width)
            assert np.array_equal(contour[b, s].numpy(), one & ~eroded)
            assert np.array_equal(ring[b, s].numpy(), grown & ~one)


def test_region_means_and_empty_regions():
    features = torch.arange(8.0).view(1, 2, 2, 2)
    regions = torch.zeros(1, 2, 2, 2)
    regions[0, 0, 0] = 1
    means, exists = region_means(features, regions)
    assert means[0, 0].tolist() == [0.5, 4.5]
    assert exists.tolist() == [[True, False]]
    assert means[0, 1].tolist() == [0, 0]


def pairs_of(inside, valid):
    n = len(inside)
    for i in range(n):
        for j in range(n):
            negatives = [k for k in range(n) if valid[k] and valid[i] and inside[k] != inside[i]]
            if i != j and valid[i] and valid[j] and inside[i] == inside[j] and negatives:
                yield i, j, negatives


@settings(max_examples=25, deadline=None)
@given(seed=seeds, temperature=st.sampled_from([0.05, 0.5]))
def test_the_boundary_contrast_is_nt_xent_over_pairs_of_one_label(seed, temperature):
    rng = generator(seed)
    q = normal(rng, 7, 3)
    inside, valid = (torch.rand(7, generator=rng) < share for share in (0.5, 0.7))
    unit, losses = q / q.norm(dim=1, keepdim=True), []
    for i, j, negatives in pairs_of(inside.tolist(), valid.tolist()):
        own = math.exp(unit[i] @ unit[j] / temperature)
        rest = sum(math.exp(unit[i] @ unit[k] / temperature) for k in negatives)
        losses.append(-math.log(own / (own + rest)))
    found = boundary_contrast(q, inside, valid, temperature)
    assert found.item() == pytest.approx(np.mean(losses) if losses else 0.0)
    assert torch.autograd.gradcheck(
        lambda z: boundary_contrast(z, inside, valid, temperature), q.requires_grad_()
    )


@settings(max_examples=25, deadline=None)
@given(seed=seeds, margin=st.sampled_from([0.5, 10.0]))
def test_the_triplet_loss_takes_semi_hard_negatives(seed, margin):
    rng = generator(seed)
    q = normal(rng, 7, 2)
    inside, valid = (torch.rand(7, generator=rng) < share for share in (0.5, 0.8))
    losses = []
    for i, j, negatives in pairs_of(inside.tolist(), valid.tolist()):
        own = (q[i] - q[j]).square().sum().item()
        others = [(q[i] - q[k]).square().sum().item() for k in negatives]
        farther = [d for d in others if d > own]
        losses.append(max(0.0, margin + own - (min(farther) if farther else max(others))))
    found = triplet_loss(q, inside, valid, margin)
    assert found.item() == pytest.approx(np.mean(losses) if losses else 0.0)


def test_compactness_by_hand_and_its_gradient():
    rng = generator(0)
    p = torch.rand(2, 1, 5, 6, generator=rng, dtype=torch.float64)
    values = []
    for b in range(2):
        length = 0.0
        for y in range(4):
            for x in range(5):
                rows, columns = p[b, 0, y + 1, x] - p[b, 0, y, x], p[b, 0, y, x + 1] - p[b, 0, y, x]
                length += math.sqrt(rows**2 + columns**2 + 1e-8)
        values.append((0.01 * length) ** 2 / (4 * math.pi * (p[b].sum().item() + 1e-5)))
    assert compactness_loss(p).item() == pytest.approx(np.mean(values))
    assert torch.autograd.gradcheck(compactness_loss, p.requires_grad_())


def test_a_disk_is_more_compact_than_a_bar_of_the_same_area():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    disk = ((y - 24) ** 2 + (x - 24) ** 2 <= 64).float()
    bar = torch.zeros(48, 48)
    bar[20:24, : int(disk.sum() / 4)] = 1
    both = [compactness_loss(one[None, None]).item() for one in (disk, bar)]
    assert both[0] < both[1]


# JiGen


@settings(max_examples=20, deadline=None)
@given(seed=seeds, side=st.sampled_from([9, 16, 32]))
def test_tiles_move_to_their_places_and_back(seed, side):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.random((2, 3, side, side)))
    orders = np.argsort(rng.random((2, 9)), axis=1)
    moved = permute_tiles(images, torch.from_numpy(orders))
    step = side // 3
    for b in range(2):
        for place in range(9):
            (r, c), (s, t) = divmod(place, 3), divmod(int(orders[b, place]), 3)
            there = moved[b, :, r * step : (r + 1) * step, c * step : (c + 1) * step]
            assert torch.equal(
                there, images[b, :, s * step : (s + 1) * step, t * step : (t + 1) * step]
            )
    back = permute_tiles(moved, torch.from_numpy(np.argsort(orders, axis=1)))
    assert torch.equal(back, images)


def test_permutations_are_distinct_and_far_apart_and_depend_on_the_seed_alone():
    orders = np.array(permutations(3))
    assert orders.shape == (31, 9)
    assert orders[0].tolist() == list(range(9))
    assert all(sorted(order) == list(range(9)) for order in orders.tolist())
    distance = (orders[:, None] != orders[None]).sum(2)
    assert distance[~np.eye(31, dtype=bool)].min() >= 6  # random ones have 4 or fewer
    assert permutations(3) != permutations(4)


# virtual steps: the gradient that the optimiser gets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("steps")


def method_of(folder, name, *overrides):
    plan = sites.plan_of(
        folder / "data", folder, f"method={name}", "network.norm=group", *overrides
    )
    network = build_trained(plan, 0).train()
    return METHODS[name](network, plan, 1, CPU), network, plan


def batch_of(seed=0, side=16):
    rng = np.random.default_rng(seed)
    images, mixed = (
        torch.from_numpy(rng.uniform(-1, 1, (2, 3, side, side)).astype(np.float32))
        for _ in range(2)
    )
    labels = torch.zeros(2, side, side, dtype=torch.long)
    labels[0, 3:9, 4:10] = 1
    labels[1, 6:12, 5:14] = 1
    return Batch(images, labels, (2,), mixed)


def stepped(network, step):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(step[name])
    return other


def gradient_of(loss, network):
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    named = zip(network.named_parameters(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in named}


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-6)


def test_harmofls_gradient_is_that_at_the_moved_weights(folder):
    method, network, plan = method_of(folder, "harmofl", "method.harmofl.radius=0.5")
    batch = batch_of()

    def both(net):
        views = [net(images)[0] for images in (batch.images, batch.mixed)]
        return sum(segmentation_loss(view, batch.labels, plan.data) for view in views) / 2

    step = ascent(gradient_of(both(network), network), 0.5)
    assert norm_of(step).item() == pytest.approx(0.5)
    other = stepped(network, step)
    expected = both(other)
    total, parts = method.loss(batch, None)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert parts["loss_supervised"].item() == pytest.approx(both(network).item(), rel=1e-4)
    assert total > parts["loss_supervised"]  # the step leads uphill
    assert_same(gradient_of(total, network), gradient_of(expected, other))


def test_elcfs_adds_the_gradients_at_both_weights(folder):
    options = ("method.elcfs.inner_rate=0.5", "method.elcfs.contrast=0", "method.elcfs.clip=0.01")
    method, network, plan = method_of(folder, "elcfs", *options)
    batch = batch_of()

    def dice(net, images):
        return mean_dice_loss(*targets(net(images)[0], batch.labels, plan.data))

    inner = gradient_of(dice(network, batch.images), network)
    step = clipped_descent(inner, 0.5, 0.01)
    assert max(part.abs().max() for part in step.values()) == pytest.approx(0.005)
    other = stepped(network, step)
    outer = dice(other, batch.mixed)
    total, parts = method.loss(batch, None)
    assert parts["loss_outer"].item() == pytest.approx(outer.item(), rel=1e-5)
    expected = gradient_of(outer, other)
    found = gradient_of(total, network)
    assert_same(found, {name: inner[name] + expected[name] for name in inner})


def test_elcfs_with_no_structure_in_sight_has_no_boundary_and_stays_finite(folder):
    method, _, _ = method_of(folder, "elcfs")
    batch = batch_of()
    empty = Batch(batch.images, torch.zeros_like(batch.labels), (2,), batch.mixed)
    total, parts = method.loss(empty, None)
    total.backward()
    assert parts["loss_boundary"] == 0
    assert math.isfinite(total.item())
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.network.parameters())


SHAPELESS = ("method.saml.compactness=0", "method.saml.smoothness=0")


def test_saml_of_first_order_adds_the_gradients_at_both_weights(folder):
    options = (*SHAPELESS, "method.saml.inner_rate=0.5", "method.saml.second_order=false")
    method, network, plan = method_of(folder, "saml", *options, "method.saml.clip=0.1")
    batch = batch_of()

    def dice(net, images):
        return mean_dice_loss(*targets(net(images)[0], batch.labels, plan.data))

    inner = gradient_of(dice(network, batch.images), network)
    step = bounded_descent(inner, 0.5, 0.1)
    assert norm_of(step).item() == pytest.approx(min(0.1, norm_of(inner).item()) * 0.5, rel=1e-4)
    other = stepped(network, step)
    total, _ = method.loss(batch, None)
    found, expected = gradient_of(total, network), gradient_of(dice(other, batch.mixed), other)
    assert_same(found, {name: inner[name] + expected[name] for name in inner})


class Smooth(torch.nn.Module):
    """A network without kinks, for finite differences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Conv2d(8, 2, 1)

    def forward(self, images):
        features = self.body(images).tanh()
        return self.head(features), features


def slope_along_the_gradient(folder, second):
    """Return the slope of the objective along its gradient, measured and as the gradient says."""
    options = (*SHAPELESS, "method.saml.inner_rate=1", f"method.saml.second_order={second}")
    method, _, _ = method_of(folder, "saml", *options, "method.saml.clip=1000")
    method.network = network = Smooth()
    gradient = gradient_of(method.loss(batch_of(), None)[0], network)
    size, found = norm_of(gradient).item(), []
    for sign in (1, -1):
        method.network = stepped(network, {n: sign * 0.02 * g / size for n, g in gradient.items()})
        found.append(method.loss(batch_of(), None)[0].item())
    return (found[0] - found[1]) / 0.04, size


def test_saml_of_second_order_is_the_gradient_of_the_objective(folder):
    """A step along the gradient changes the objective as the gradient says."""
    measured, size = slope_along_the_gradient(folder, "true")
    assert measured == pytest.approx(size, rel=0.005)
    measured, size = slope_along_the_gradient(folder, "false")
    assert measured != pytest.approx(size, rel=0.01)  # a missing second order would be noticed


def test_jigens_moved_slices_are_not_segmented(folder):
    method, network, plan = method_of(folder, "jigen")
    batch = batch_of()
    drawn = (torch.tensor([0.0, 5.0]),)
    total, parts = method.loss(Batch(batch.images, batch.labels, (2,), drawn=drawn), None)
    moved = permute_tiles(batch.images, torch.tensor(permutations(plan.seed))[[0, 5]])
    labels = batch.labels.clone()
    labels[1] = 255
    maps = network.encode(moved)
    supervised = segmentation_loss(network.decode(maps)[0], labels, plan.data)
    classes = network.training_heads["jigsaw"](maps[-1].mean((2, 3)))
    jigsaw = F.cross_entropy(classes, torch.tensor([0, 5]))
    assert parts["loss_supervised"].item() == pytest.approx(supervised.item(), rel=1e-5)
    assert parts["loss_jigsaw"].item() == pytest.approx(jigsaw.item(), rel=1e-5)
    assert total.item() == pytest.approx((supervised + 0.1 * jigsaw).item(), rel=1e-5)
