"""SegCLR's contrastive losses against brute force and finite differences, and its pairs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsgcg.clients.data.pairs import contrast_view, make_pairs, partner_slices
from fedsgcg.clients.methods.segclr import global_nt_xent, nt_xent, simsiam
from fedsgcg.common.settings.plan import SegClrSettings


def vectors(seed: int, count: int, length: int) -> list[Tensor]:
    """Four sets of random projections in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, length, dtype=torch.float64, generator=generator) for _ in range(4)]


def cosine(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def nt_xent_by_hand(first: Tensor, second: Tensor, temperature: float) -> float:
    """The definition, image by image and in plain Python."""
    views = [*first.tolist(), *second.tolist()]
    count = len(first)
    losses = []
    for i, own in enumerate(views):
        others = [math.exp(cosine(own, views[a]) / temperature) for a in range(2 * count) if a != i]
        positive = cosine(own, views[(i + count) % (2 * count)]) / temperature
        losses.append(math.log(math.fsum(others)) - positive)
    return math.fsum(losses) / len(losses)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 6),
    length=st.integers(2, 8),
    temperature=st.sampled_from([0.05, 0.1, 0.5, 2.0]),
)
def test_nt_xent_is_its_definition(seed: int, count: int, length: int, temperature: float) -> None:
    first, second, _, _ = vectors(seed, count, length)
    found = float(nt_xent(first, second, temperature))
    assert found == pytest.approx(nt_xent_by_hand(first, second, temperature), rel=1e-10, abs=1e-12)


def test_nt_xent_of_two_orthogonal_pairs_has_the_value_computed_by_hand() -> None:
    # Each image: its partner has cosine 1, the two of the other pair 0.
    views = torch.eye(2, dtype=torch.float64)
    expected = math.log(math.e + 2) - 1
    assert float(nt_xent(views, views, 1.0)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), length=st.integers(2, 8))
def test_simsiam_is_its_definition(seed: int, count: int, length: int) -> None:
    p1, p2, z1, z2 = vectors(seed, count, length)
    pairs = zip(*(part.tolist() for part in (p1, p2, z1, z2)), strict=True)
    expected = [-(cosine(a, d) + cosine(b, c)) / 2 for a, b, c, d in pairs]
    assert float(simsiam(p1, p2, z1, z2)) == pytest.approx(sum(expected) / count, rel=1e-10)


def test_gradients_agree_with_finite_differences_in_float64() -> None:
    first, second, third, fourth = (part.requires_grad_() for part in vectors(3, 4, 5))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (first, second))
    constants = third.detach(), fourth.detach()
    assert torch.autograd.gradcheck(lambda a, b: simsiam(a, b, *constants), (first, second))


def gaussian(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """A mean and a covariance of vectors shorter than one."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(length, length, dtype=torch.float64, generator=generator)
    mean = torch.randn(length, dtype=torch.float64, generator=generator)
    return 0.5 * mean / mean.norm(), 0.1 * root @ root.T / length


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_global_negatives_are_the_expectation_over_drawn_ones(temperature: float) -> None:
    first, second, _, _ = vectors(5, 3, 4)
    mean, covariance = gaussian(6, 4)
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(400_000, 4, dtype=torch.float64, generator=generator)
    negatives = mean + drawn @ torch.linalg.cholesky(covariance).T
    unit = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    positive = (unit * unit.roll(3, 0)).sum(1) / temperature
    weights = (unit @ negatives.T / temperature).exp()
    total = positive.exp() + 6 * weights.mean(1)
    expected = (total.log() - positive).mean()
    found = global_nt_xent(first, second, mean, covariance, temperature, 6)
    assert float(found) == pytest.approx(float(expected), rel=0.01)
    # Jensen: the mean loss over batches of six drawn negatives is not larger.
    batches = weights[:, :399_996].reshape(6, -1, 6).sum(2)
    finite = ((positive.exp()[:, None] + batches).log() - positive[:, None]).mean()
    assert float(finite) < float(found)


def test_a_point_of_negatives_has_the_value_computed_by_hand() -> None:
    # Partners agree, and two negatives are orthogonal to each image's own direction.
    views = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    mean, none = torch.tensor([0, 0, 1.0]), torch.zeros(3, 3)
    found = global_nt_xent(views, views, mean, none, 1.0, 2)
    assert float(found) == pytest.approx(math.log(math.e + 2) - 1, rel=1e-12)
    # A variance of 0.5 along the first axis multiplies the first image's term by e^(1/4).
    wide = torch.diag(torch.tensor([0.5, 0, 0], dtype=torch.float64))
    first = math.log(math.e + 2 * math.exp(0.25)) - 1
    expected = (first + math.log(math.e + 2) - 1) / 2
    found = global_nt_xent(views, views, mean, wide, 1.0, 2)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_global_negatives_agrees_with_finite_differences() -> None:
    first, second = (part.requires_grad_() for part in vectors(8, 3, 4)[:2])
    mean, covariance = gaussian(9, 4)
    assert torch.autograd.gradcheck(
        lambda a, b: global_nt_xent(a, b, mean, covariance, 0.2, 14), (first, second)
    )


def test_simsiam_sends_no_gradient_into_the_projections_that_it_predicts() -> None:
    parts = [part.requires_grad_() for part in vectors(4, 3, 5)]
    simsiam(*parts).backward()
    assert all(part.grad is not None for part in parts[:2])
    assert all(part.grad is None for part in parts[2:])


@settings(max_examples=60, deadline=None)
@given(
    depths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    distance=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_a_partner_is_another_slice_of_the_volume_within_the_distance(
    depths: list[int], distance: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.array(depths)
    z = rng.integers(0, sizes)
    other = partner_slices(z, sizes, distance, rng)
    assert ((other >= 0) & (other < sizes)).all()
    gap = np.abs(other - z)
    assert (gap <= distance).all()
    assert ((gap > 0) == (sizes > 1)).all()


def test_every_partner_within_the_distance_is_equally_likely() -> None:
    count = 30_000
    z, depths = np.full(count, 4), np.full(count, 6)
    found = partner_slices(z, depths, 3, np.random.default_rng(0))
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [1, 2, 3, 5]
    assert np.abs(counts / count - 0.25).max() < 0.02


def images(count: int = 6, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator) * 2 - 1


def test_views_are_reproducible_stay_in_range_and_differ_from_each_other() -> None:
    plain, options = images(), SegClrSettings()
    first, again = (
        make_pairs(plain, None, options, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.shape == (6, 2, 3, 32, 32)
    assert first.abs().max() <= 1
    assert ((first[:, 0] - first[:, 1]).abs().amax((1, 2, 3)) > 0.01).all()


def test_slices_alone_are_pairs_without_augmentation() -> None:
    plain, partners = images(), images().flip(0)
    options = SegClrSettings(pairs="slices")
    pairs = make_pairs(plain, partners, options, torch.Generator())
    assert torch.equal(pairs[:, 0], plain)
    assert torch.equal(pairs[:, 1], partners)
    both = make_pairs(plain, partners, SegClrSettings(pairs="slices+augment"), torch.Generator())
    assert not torch.equal(both[:, 1], partners)


def test_every_change_of_a_view_can_be_switched_off() -> None:
    plain = images()
    off = SegClrSettings(flip=0, crop=1, jitter=0, blur=0)
    same = contrast_view(plain, off, torch.Generator().manual_seed(0))
    assert torch.allclose(same, plain, atol=1e-5)
    mirrored = SegClrSettings(flip=1, crop=1, jitter=0, blur=0)
    found = contrast_view(plain, mirrored, torch.Generator().manual_seed(0))
    assert torch.allclose(found, plain.flip(-1), atol=1e-5)
    blurred = contrast_view(
        plain, SegClrSettings(flip=0, crop=1, jitter=0, blur=1), torch.Generator().manual_seed(0)
    )
    assert blurred.std() < plain.std()
    assert torch.allclose(
        contrast_view(
            torch.full_like(plain, 0.25), SegClrSettings(jitter=0), torch.Generator().manual_seed(0)
        ),
        torch.tensor(0.25),
        atol=1e-5,
    )
