"""The SgCG loss by hand, at its edges, and in what it refuses."""

import math

import numpy as np
import pytest
import torch

from fedsgcg.common.sgcg import moments
from fedsgcg.common.sgcg.loss import class_moments, reduce_labels, sgcg_loss

FEATURES = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
LABELS = torch.tensor([0, 1])
MEAN = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
COVARIANCE = torch.stack([torch.eye(2), 2 * torch.eye(2)])


def loss(
    features=FEATURES, labels=LABELS, mean=MEAN, covariance=COVARIANCE, temperature=1.0, **options
):
    return sgcg_loss(features, labels, mean, covariance, temperature=temperature, **options)


def test_two_pixels_by_hand():
    # pixel 0: z = (1 + 1/2, 0 + 1), positive 1; pixel 1: z = (0 + 4/2, 2 + 4), positive 2
    wanted = [math.log(math.exp(1.5) + math.exp(1.0)) - 1, math.log(math.exp(2) + math.exp(6)) - 2]
    torch.testing.assert_close(loss(reduction="none"), torch.tensor(wanted))
    torch.testing.assert_close(loss(), torch.tensor(sum(wanted) / 2))


def test_temperature_divides_the_linear_term_once_and_the_quadratic_twice():
    z = (1 / 2 + 1 / 8, 0 + 2 / 8)
    wanted = math.log(sum(math.exp(v) for v in z)) - 1 / 2
    assert loss(FEATURES[:1], LABELS[:1], temperature=2.0).item() == pytest.approx(wanted)


def test_gradient_by_hand():
    features = FEATURES[:1].clone().requires_grad_()
    loss(features, LABELS[:1]).backward()
    p = math.exp(1.5) / (math.exp(1.5) + math.exp(1.0))
    # p (mu_0 + q) + (1 - p) (mu_1 + 2 q) - mu_0 with q = (1, 0)
    torch.testing.assert_close(features.grad, torch.tensor([[2 * p + 2 * (1 - p) - 1, 1 - p]]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "active", [None, torch.tensor([True, False]), torch.tensor([False, False])]
)
def test_an_empty_selection_gives_zero_that_stays_connected(reduction, active):
    features = FEATURES.clone().requires_grad_()
    labels = torch.tensor([255, 255]) if active is None or active.any() else LABELS
    found = loss(features, labels, active=active, reduction=reduction)
    assert found.requires_grad
    assert (found == 0).all()
    found.sum().backward()
    assert (features.grad == 0).all()


def test_no_pixel_at_all_gives_zero_that_stays_connected():
    features = torch.zeros(0, 2, requires_grad=True)
    found = loss(features, torch.zeros(0, dtype=torch.long))
    found.backward()
    assert found == 0
    assert features.grad.shape == (0, 2)


def test_pixels_of_inactive_classes_are_dropped_and_give_no_gradient():
    features = FEATURES.clone().requires_grad_()
    found = loss(features, active=torch.tensor([True, False]))
    found.backward()
    assert found.item() == pytest.approx(0.5)  # K = 1 leaves q' Sigma q / 2 of pixel 0
    assert (features.grad[1] == 0).all()


def test_prototypes_receive_no_gradient():
    mean, covariance = MEAN.clone().requires_grad_(), COVARIANCE.clone().requires_grad_()
    features = FEATURES.clone().requires_grad_()
    loss(features, mean=mean, covariance=covariance).backward()
    assert mean.grad is None
    assert covariance.grad is None
    assert features.grad is not None
    assert not loss(mean=mean, covariance=covariance).requires_grad


def test_a_retained_graph_gives_the_same_gradient_again():
    features = FEATURES.clone().requires_grad_()
    found = 3 * loss(features)
    (first,) = torch.autograd.grad(found, features, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(found, features)
    torch.testing.assert_close(second, kept)
    torch.testing.assert_close(first, kept)


def test_bfloat16_features_and_autocast_compute_in_float32():
    features = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(64) % 2
    wanted = loss(features.float(), labels)
    half = features.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, single = loss(half, labels), loss(features.float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), wanted)
    assert torch.equal(single, wanted)
    found.backward()
    assert half.grad.dtype == torch.bfloat16
    full = features.float().requires_grad_()
    loss(full, labels).backward()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=2e-2, atol=1e-4)


def test_label_types_and_strides_do_not_matter():
    wanted = loss()
    assert torch.equal(loss(labels=LABELS.to(torch.uint8)), wanted)
    torch.testing.assert_close(loss(features=FEATURES.T.contiguous().T), wanted)
    torch.testing.assert_close(loss(mean=MEAN.double(), covariance=COVARIANCE.double()), wanted)


def test_another_ignore_index():
    assert loss(labels=torch.tensor([0, -100]), ignore_index=-100) == loss(FEATURES[:1], LABELS[:1])


def test_the_gradient_cannot_be_differentiated_again():
    features = FEATURES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss(features), features, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(2)}, r"features: found shape \(2,\), expected \(any, any\)"),
        ({"features": torch.ones(2, 3)}, r"mean: found shape \(2, 2\), expected \(any, 3\)"),
        (
            {"features": torch.ones(2, 2, dtype=torch.int64)},
            "features: found torch.int64, expected floats",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"labels: found shape \(3,\), expected \(2\)",
        ),
        ({"labels": torch.zeros(2)}, "labels: found torch.float32, expected integers"),
        ({"labels": torch.tensor([0, 2])}, "labels: found 2, expected 0 to 1 or 255"),
        ({"labels": torch.tensor([0, -1])}, "labels: found -1"),
        (
            {"covariance": torch.zeros(2, 2)},
            r"covariance: found shape \(2, 2\), expected \(2, 2, 2\)",
        ),
        (
            {"covariance": COVARIANCE.half()},
            "covariance: found torch.float16, expected float32 or float64",
        ),
        ({"mean": MEAN.bfloat16()}, "mean: found torch.bfloat16"),
        ({"active": torch.tensor([True])}, r"active: found shape \(1,\), expected \(2\)"),
        ({"active": torch.tensor([1, 0])}, "active: found torch.int64, expected bool"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"reduction": "sum"}, "reduction: found 'sum'"),
        ({"covariance_form": "low-rank"}, "covariance_form: found 'low-rank'"),
        (
            {"features": torch.tensor([[1.0, math.nan], [0.0, 1.0]])},
            "features: found values that are not finite",
        ),
        (
            {"features": torch.tensor([[1.0, math.inf], [0.0, 1.0]])},
            "features: found values that are not finite",
        ),
        ({"mean": torch.full((2, 2), math.nan)}, "mean: found values that are not finite"),
        (
            {"covariance": torch.full((2, 2, 2), math.nan)},
            "covariance: found values that are not finite",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        loss(**change)


def test_moments_by_hand():
    features = torch.tensor([[0.0, 0.0], [2.0, 4.0], [5.0, 5.0], [9.0, 9.0]])
    count, mean, scatter = class_moments(features, torch.tensor([0, 0, 2, 255]), 3)
    assert count.tolist() == [2, 0, 1]
    assert mean.tolist() == [[1, 2], [0, 0], [5, 5]]
    assert scatter.tolist() == [[[2, 4], [4, 8]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert (count.dtype, mean.dtype, scatter.dtype) == (torch.int64, torch.float64, torch.float64)


def test_moments_carry_no_gradient_and_keep_digits_far_from_the_origin():
    generator = torch.Generator().manual_seed(0)
    features = (1e3 + 1e-2 * torch.randn(20000, 4, generator=generator)).requires_grad_()
    _, mean, scatter = class_moments(features, torch.zeros(20000, dtype=torch.uint8), 1)
    assert not mean.requires_grad
    exact = features.detach().double() - features.detach().double().mean(0)
    exact = exact.T @ exact
    assert (scatter[0] - exact).norm() <= 1e-8 * exact.norm()


def add_one_after_the_other(first, second, block):
    """Add a block in the worst order: from the first to the last row, in the block's type."""
    rows = block.numpy()
    products = np.cumsum(rows[:, :, None] * rows[:, None, :], axis=0, dtype=rows.dtype)[-1]
    first += torch.from_numpy(np.cumsum(rows, axis=0, dtype=rows.dtype)[-1])
    second += torch.from_numpy(products)


@pytest.mark.parametrize("spread", ["normal", "two values", "shift far away"])
@pytest.mark.parametrize("centre", [0.0, 1e3, 1e6])
def test_moments_keep_their_digits_in_whatever_order_a_library_adds(monkeypatch, centre, spread):
    monkeypatch.setattr(moments, "_add_products", add_one_after_the_other)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40000, 4, generator=generator)
    if spread == "two values":  # the rounding of a running sum of equal terms goes one way for long
        features = 0.1 * features.sign()
    if spread == "shift far away":  # rows that give the shift, unlike all others
        features[: moments.SHIFT_ROWS] += 1e3
    features = centre + max(1e-2, 1e-5 * centre) * features
    _, mean, scatter = class_moments(features, torch.zeros(40000, dtype=torch.uint8), 1)
    rows = features.numpy().astype(np.longdouble)
    exact = rows - rows.mean(0)
    deviation = np.sqrt((exact**2).sum(0))
    errors = abs(scatter[0].numpy() - exact.T @ exact) / np.outer(deviation, deviation)
    assert errors.max() <= 1e-8
    assert (abs(mean[0].numpy() - rows.mean(0)) / deviation).max() <= 1e-8


def test_moments_of_half_precision_features_are_those_of_their_values():
    features = torch.full((5000, 1), 3.0, dtype=torch.bfloat16)
    count, mean, scatter = class_moments(features, torch.zeros(5000, dtype=torch.int64), 1)
    assert (count.item(), mean.item(), scatter.item()) == (5000, 3.0, 0.0)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(2, 2), torch.tensor([0, 3]), "labels: found 3, expected 0 to 2 or 255"),
        (torch.ones(2, 2), torch.tensor([0]), "labels: found shape"),
        (
            torch.tensor([[math.nan]]),
            torch.tensor([0]),
            "features: found values that are not finite",
        ),
    ],
)
def test_moments_refuse_bad_input_by_name(features, labels, message):
    with pytest.raises(ValueError, match=message):
        class_moments(features, labels, 3)


def test_reduced_labels_by_hand():
    labels = torch.tensor([[[0, 0, 1, 1, 255, 255], [0, 2, 1, 0, 255, 1]]])
    assert reduce_labels(labels, 2, 3).tolist() == [[[0, 1, 255]]]
    assert reduce_labels(labels, 2, 3, majority=0.8).tolist() == [[[255, 255, 255]]]
    assert torch.equal(reduce_labels(labels, 1, 3), labels)


@pytest.mark.parametrize(
    ("labels", "factor", "majority", "message"),
    [
        (
            torch.zeros(1, 4, 6, dtype=torch.int64),
            4,
            0.75,
            r"labels: found shape \(1, 4, 6\).*factor=4",
        ),
        (torch.zeros(4, 4, dtype=torch.int64), 2, 0.75, "labels: found shape"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), 2, 1.5, "majority: found 1.5"),
        (torch.full((1, 4, 4), 9), 2, 0.75, "labels: found 9"),
    ],
)
def test_label_reduction_refuses_bad_input_by_name(labels, factor, majority, message):
    with pytest.raises(ValueError, match=message):
        reduce_labels(labels, factor, 3, majority)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
def test_a_gpu_gives_the_same_without_making_the_host_wait(form):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(5000, 8, generator=generator))
    labels = torch.randint(0, 3, (5000,), generator=generator)
    labels[::9] = 255
    root, active = (
        torch.randn(4, 8, 8, generator=generator),
        torch.tensor([True, True, False, True]),
    )
    arguments = (labels, torch.randn(4, 8, generator=generator), root @ root.mT / 8)
    here = features.clone().requires_grad_()
    wanted = sgcg_loss(here, *arguments, temperature=0.5, active=active, covariance_form=form)
    wanted.backward()
    there = features.cuda().requires_grad_()
    moved, on = [tensor.cuda() for tensor in arguments], active.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sgcg_loss(there, *moved, temperature=0.5, active=on, covariance_form=form)
        found.backward()
        moments = class_moments(there, moved[0], 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-8)
    for one, other in zip(moments, class_moments(features, labels, 4), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
