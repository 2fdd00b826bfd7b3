"""Properties of the SgCG loss, the class moments and the label reduction; against brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.sgcg import loss as sgcg
from fedsgcg.common.sgcg import moments
from fedsgcg.common.sgcg.loss import class_moments, reduce_labels, sgcg_loss
from fedsgcg.common.statistics import ClassStatistics

IGNORE = 255
FORMS = ("full", "diagonal", "none")


@st.composite
def problems(draw, dtype=torch.float64, min_pixels=1):
    """Features, labels with ignored pixels, mean, covariance, temperature, active classes."""
    N, A, K = draw(st.integers(min_pixels, 30)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    labels = torch.randint(0, K, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = IGNORE
    root = torch.randn(K, A, A, generator=generator, dtype=dtype)
    active = draw(st.none() | st.lists(st.booleans(), min_size=K, max_size=K).map(torch.tensor))
    features, mean = (
        torch.randn(N, A, generator=generator, dtype=dtype),
        torch.randn(K, A, generator=generator, dtype=dtype),
    )
    return (
        features,
        labels,
        mean,
        root @ root.mT / A,
        draw(st.sampled_from([0.3, 1.0, 5.0])),
        active,
    )


def brute_force(features, labels, mean, covariance, temperature, active=None, form="full"):
    """Loss (N,) and gradient (N, A) by the formulas, pixel by pixel; zero for dropped pixels."""
    K, losses, gradients = len(mean), [], []
    on = [k for k in range(K) if active is None or bool(active[k])]
    for q, y in zip(features.double(), labels.tolist(), strict=True):
        if y == IGNORE or y not in on:
            losses.append(0.0)
            gradients.append(torch.zeros_like(q))
            continue
        sigma = {k: form_of(covariance[k].double(), form) for k in on}
        z = torch.stack(
            [
                q @ mean[k].double() / temperature + q @ sigma[k] @ q / (2 * temperature**2)
                for k in on
            ]
        )
        p = torch.softmax(z, 0)
        losses.append(float(torch.logsumexp(z, 0) - q @ mean[y].double() / temperature))
        pulled = sum(
            share * (mean[k].double() / temperature + sigma[k] @ q / temperature**2)
            for share, k in zip(p, on, strict=True)
        )
        gradients.append(pulled - mean[y].double() / temperature)
    return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients)


def form_of(sigma, form):
    return {
        "full": sigma,
        "diagonal": torch.diag(sigma.diagonal()),
        "none": torch.zeros_like(sigma),
    }[form]


def kept(labels, active):
    return torch.tensor(
        [y != IGNORE and (active is None or bool(active[y])) for y in labels.tolist()]
    )


def pixel_losses(problem, **options):
    features, labels, mean, covariance, temperature, active = problem
    return sgcg_loss(
        features,
        labels,
        mean,
        covariance,
        temperature=temperature,
        active=active,
        reduction="none",
        **options,
    )


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from(FORMS), st.integers(0, 99))
def test_loss_and_gradient_equal_the_formulas_in_float64(problem, form, seed):
    features, labels, mean, covariance, temperature, active = problem
    features.requires_grad_()
    losses = pixel_losses(problem, covariance_form=form)
    wanted, slopes = brute_force(
        features.detach(), labels, mean, covariance, temperature, active, form
    )
    torch.testing.assert_close(losses.detach(), wanted, rtol=1e-12, atol=1e-12)
    weight = torch.rand(
        len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    (gradient,) = torch.autograd.grad((losses * weight).sum(), features)
    torch.testing.assert_close(gradient, slopes * weight[:, None], rtol=1e-12, atol=1e-11)


@settings(deadline=None)
@given(problems(dtype=torch.float32), st.sampled_from(FORMS))
def test_float32_keeps_six_digits(problem, form):
    features, labels, mean, covariance, temperature, active = problem
    features.requires_grad_()
    loss = sgcg_loss(
        features,
        labels,
        mean,
        covariance,
        temperature=temperature,
        active=active,
        covariance_form=form,
    )
    assert loss.dtype == torch.float32
    wanted, slopes = brute_force(
        features.detach(), labels, mean, covariance, temperature, active, form
    )
    number = max(1, int(kept(labels, active).sum()))
    scale = 1 + float(wanted.abs().max())
    assert abs(float(loss.detach()) - float(wanted.sum()) / number) <= 1e-6 * scale
    (gradient,) = torch.autograd.grad(loss, features)
    size = scale * (
        1 + float(slopes.abs().max()) + float(mean.abs().max()) / temperature
    )  # before anything cancels
    assert float((number * gradient - slopes).abs().max()) <= 2e-6 * size


@settings(deadline=None)
@given(problems())
def test_the_mean_is_over_the_pixels_that_were_kept(problem):
    features, labels, mean, covariance, temperature, active = problem
    losses, keep = pixel_losses(problem), kept(labels, active)
    loss = sgcg_loss(features, labels, mean, covariance, temperature=temperature, active=active)
    wanted = losses[keep].mean() if keep.any() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    assert (losses[~keep] == 0).all()


@settings(deadline=None)
@given(problems())
def test_the_loss_is_at_least_the_positive_quadratic_term_which_is_not_negative(problem):
    features, labels, _, covariance, temperature, active = problem
    losses, keep = pixel_losses(problem), kept(labels, active)
    own = covariance[torch.where(keep, labels, 0)]
    quadratic = torch.einsum("na,nab,nb->n", features, own, features) / (2 * temperature**2)
    assert (quadratic >= -1e-12).all()
    assert (losses[keep] >= quadratic[keep] - 1e-10 * (1 + quadratic[keep])).all()


@settings(deadline=None)
@given(problems(), st.floats(0, 1))
def test_the_loss_is_convex_in_the_features(problem, share):
    features, *rest = problem
    other = features.flip(0) + 0.5
    between = pixel_losses((share * features + (1 - share) * other, *rest))
    chord = share * pixel_losses(problem) + (1 - share) * pixel_losses((other, *rest))
    assert (between <= chord + 1e-9 * (1 + chord.abs())).all()


@settings(deadline=None)
@given(problems())
def test_one_class_leaves_the_quadratic_term(problem):
    features, labels, mean, covariance, temperature, _ = problem
    only = torch.where(labels == IGNORE, IGNORE, 0)
    losses = pixel_losses((features, only, mean[:1], covariance[:1], temperature, None))
    quadratic = torch.einsum("na,ab,nb->n", features, covariance[0], features) / (
        2 * temperature**2
    )
    torch.testing.assert_close(
        losses, torch.where(only == IGNORE, 0.0, quadratic), rtol=1e-11, atol=1e-11
    )


@settings(deadline=None)
@given(problems())
def test_no_covariance_is_prototype_cross_entropy(problem):
    features, labels, mean, covariance, temperature, _ = problem
    problem = (features, labels, mean, torch.zeros_like(covariance), temperature, None)
    wanted = torch.nn.functional.cross_entropy(
        features @ mean.T / temperature, labels, ignore_index=IGNORE, reduction="none"
    )
    torch.testing.assert_close(pixel_losses(problem), wanted, rtol=1e-11, atol=1e-11)
    without = pixel_losses(
        (features, labels, mean, covariance, temperature, None), covariance_form="none"
    )
    torch.testing.assert_close(without, wanted, rtol=1e-11, atol=1e-11)


@settings(deadline=None)
@given(problems())
def test_the_diagonal_form_equals_a_diagonal_covariance(problem):
    features, labels, mean, covariance, temperature, active = problem
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    full = pixel_losses((features, labels, mean, diagonal, temperature, active))
    torch.testing.assert_close(
        pixel_losses(problem, covariance_form="diagonal"), full, rtol=1e-11, atol=1e-11
    )


@settings(deadline=None)
@given(problems())
def test_inactive_classes_are_as_if_they_did_not_exist(problem):
    features, labels, mean, covariance, temperature, active = problem
    if active is None or not active.any():
        return
    number = torch.cumsum(active, 0) - 1
    keep = kept(labels, active)
    renamed = torch.where(keep, number[torch.where(keep, labels, 0)], IGNORE)
    alone = pixel_losses((features, renamed, mean[active], covariance[active], temperature, None))
    torch.testing.assert_close(pixel_losses(problem), alone, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(problems(), st.permutations(range(5)))
def test_the_order_of_the_classes_does_not_matter(problem, order):
    features, labels, mean, covariance, temperature, _ = problem
    order = torch.tensor([k for k in order if k < len(mean)])
    place = torch.argsort(order)
    renamed = torch.where(labels == IGNORE, IGNORE, place[torch.where(labels == IGNORE, 0, labels)])
    moved = pixel_losses((features, renamed, mean[order], covariance[order], temperature, None))
    torch.testing.assert_close(
        pixel_losses((features, labels, mean, covariance, temperature, None)),
        moved,
        rtol=1e-11,
        atol=1e-11,
    )


@settings(deadline=None, max_examples=30)
@given(problems(), st.sampled_from(FORMS), st.sampled_from(["mean", "none"]))
def test_gradcheck(problem, form, reduction):
    features, labels, mean, covariance, temperature, active = problem
    features.requires_grad_()

    def loss(q):
        options = {
            "temperature": temperature,
            "active": active,
            "reduction": reduction,
            "covariance_form": form,
        }
        return sgcg_loss(q, labels, mean, covariance, **options)

    assert torch.autograd.gradcheck(loss, features, atol=1e-4, rtol=1e-3)


@settings(deadline=None)
@given(problems(min_pixels=8), st.integers(1, 7), st.sampled_from(FORMS))
def test_chunks_do_not_change_the_result(problem, pixels, form):
    features, labels, mean, covariance, temperature, active = problem
    features.requires_grad_()
    whole = pixel_losses(problem, covariance_form=form)
    (slope,) = torch.autograd.grad(whole.sum(), features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgcg, "CHUNK_PIXELS", (pixels, pixels))
        parts = pixel_losses(problem, covariance_form=form)
        (slope_of_parts,) = torch.autograd.grad(parts.sum(), features)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(slope_of_parts, slope, rtol=1e-11, atol=1e-12)


@settings(deadline=None)
@given(problems(), st.sampled_from([1e2, 1e3]))
def test_logits_far_above_1e4_stay_finite(problem, size):
    features, labels, mean, covariance, _, active = problem
    features = (size * features).float().requires_grad_()
    loss = sgcg_loss(
        features, labels, size * mean.float(), covariance.float(), temperature=0.1, active=active
    )
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert features.grad.isfinite().all()


@st.composite
def labelled(draw):
    """Features (N, A), labels with ignored pixels, K."""
    N, A, K = draw(st.integers(0, 60)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    features = draw(st.sampled_from([0.0, 100.0])) + torch.randn(
        N, A, generator=generator, dtype=dtype
    )
    labels = torch.randint(0, draw(st.integers(1, K)), (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.2] = IGNORE
    return features, labels.to(draw(st.sampled_from([torch.uint8, torch.int64]))), K


@settings(deadline=None)
@given(labelled(), st.sampled_from([10, 1 << 18]))
def test_moments_equal_pooled_statistics_on_either_path(data, block):
    features, labels, K = data
    wanted = ClassStatistics.from_features(features.double().numpy(), labels.numpy(), K, IGNORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "BLOCK_ELEMENTS", block)
        patch.setattr(moments, "MASK_ELEMENTS", block)
        for found in (
            class_moments(features, labels, K),
            moments._moments_by_mask(features, labels, K, IGNORE),
        ):
            count, mean, scatter = (tensor.numpy() for tensor in found)
            np.testing.assert_array_equal(count, wanted.count)
            np.testing.assert_allclose(mean, wanted.mean, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(
                scatter, wanted.scatter, rtol=2e-6, atol=2e-6 * (1 + wanted.scatter.max(initial=0))
            )


@settings(deadline=None)
@given(labelled())
def test_moments_are_symmetric_to_the_bit(data):
    scatter = class_moments(*data)[2]
    assert torch.equal(scatter, scatter.mT)


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    st.sampled_from([torch.uint8, torch.int64]),
)
def test_reduced_labels_are_the_majority_of_each_square(seed, factor, K, majority, dtype):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K + 1, (2, 2 * factor, 3 * factor), generator=generator)
    labels = torch.where(labels == K, IGNORE, labels).to(dtype)
    found = reduce_labels(labels, factor, K, majority)
    assert found.dtype == dtype
    for b, i, j in np.ndindex(2, 2, 3):
        square = (
            labels[b, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
            .flatten()
            .tolist()
        )
        counts = [square.count(k) for k in range(K)] + [square.count(IGNORE)]
        best = int(np.argmax(counts))
        share = counts[best] / factor**2
        assert found[b, i, j] == (IGNORE if share < majority or best == K else best)
