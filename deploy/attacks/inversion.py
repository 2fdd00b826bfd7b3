"""Reconstruction: from few pixels' statistics, from the difference of two rounds, from a gradient.

Legend: A feature channels, K classes, n pixels of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedsgcg.clients.methods.base import segmentation_loss
from fedsgcg.clients.methods.private_statistics import contribution, noisy_statistics
from fedsgcg.common.differential_privacy.noise import Noise
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.deploy.attacks.patients import Patient, statistics_of

TOLERANCE: Final = 1e-6
"""Eigenvalues below this share of the largest count as zero."""
STEPS: Final = 300
"""Steps of the reconstruction of a slice."""
RATE: Final = 0.05
"""Its learning rate; it falls to zero."""
SMOOTHNESS: Final = 1e-2
"""Weight of the total variation."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """What the scatter of a class shows about its pixels.

    Attributes:
        pixels: n.
        rank: Rank of the scatter; n pixels give at most n - 1.
        outside: Largest share of a pixel's feature, about the mean, outside of the scatter's span:
            0 means that the features are known up to a rotation inside the span.
        chance: The same for features of other patients: what the span says about anybody.
    """

    pixels: int
    rank: int
    outside: float
    chance: float


def span_of(statistics: ClassStatistics, index: int, pixels: Array, others: Array) -> Span:
    """Test whether the sent statistics of a class span its pixels' features.

    Args:
        statistics: What was sent.
        index: The class.
        pixels: (n, A) features that the statistics describe.
        others: (m, A) features of pixels of other patients.
    """
    values, vectors = np.linalg.eigh(statistics.scatter[index])
    kept = values > TOLERANCE * max(float(values[-1]), 1e-300)
    basis = vectors[:, kept]

    def outside(rows: Array) -> float:
        offset = rows - statistics.mean[index]
        rest = offset - offset @ basis @ basis.T
        length = np.linalg.norm(offset, axis=1)
        shares = np.linalg.norm(rest, axis=1) / np.where(length > 0, length, 1.0)
        return float(shares.max(initial=0.0))

    return Span(len(pixels), int(kept.sum()), outside(pixels), outside(others))


@dataclass(frozen=True)
class Difference:
    """What two releases that differ by one patient show about the patient.

    Attributes:
        error: Median over the patients of |found - true| / |true - mean of the others| for the mean
            features of all classes: 0 is exact, 1 is what is known without the patient.
        exact: Share of the patients with an error below 0.1.
        patients: How many patients were tried.
    """

    error: float
    exact: float
    patients: int


def subtract_rounds(network: nn.Module, patients: Sequence[Patient], plan: Plan) -> Difference:
    """Subtract the releases of a hospital with and without each of its patients.

    Both are computed as the hospital computes them for the plan, with noise of their own if the
    plan has it, for the same model. A hospital with a `site.yaml` refuses the second (POL-720).
    Needs two patients or more.
    """
    own = [statistics_of(network, each, plan) for each in patients]
    errors = []
    for place, target in enumerate(own):
        rest = [one for other, one in enumerate(own) if other != place]
        found = _without(_release(own, plan), _release(rest, plan), plan)
        usual = np.mean([one.mean for one in rest], axis=0)
        seen = (target.count > 0) & (found.count > 0)
        if not seen.any():
            errors.append(1.0)  # nothing was released about the classes of this patient
            continue
        scale = float(np.linalg.norm((target.mean - usual)[seen]))
        errors.append(float(np.linalg.norm((found.mean - target.mean)[seen]) / max(scale, 1e-12)))
    return Difference(float(np.median(errors)), float(np.mean(np.array(errors) < 0.1)), len(errors))


def _release(patients: Sequence[ClassStatistics], plan: Plan) -> ClassStatistics:
    if plan.privacy.dp.statistics:
        shape = (plan.data.num_classes, plan.network.num_features)
        sums = np.sum([contribution(one) for one in patients], axis=0)
        multiplier = plan.privacy.dp.statistics_noise
        return noisy_statistics(sums, shape, multiplier, Noise.from_entropy(), 1)
    total = patients[0]
    for one in patients[1:]:
        total = total + one
    return total


def _without(more: ClassStatistics, less: ClassStatistics, plan: Plan) -> ClassStatistics:
    """Subtract two releases; counts of noisy patients may even fall."""
    count = more.count - less.count
    first = more.count[:, None] * more.mean - less.count[:, None] * less.mean
    known = np.abs(count) >= 1
    mean = first / np.where(known, count, 1.0)[:, None]
    return ClassStatistics(np.where(known, np.abs(count), 0.0), mean, np.zeros_like(more.scatter))


@dataclass(frozen=True)
class Inverted:
    """Reconstruction of a slice from the gradient of one step.

    Attributes:
        correlation: Correlation of the reconstruction with the slice.
        chance: Largest correlation with a slice of another patient.
        image: (S, S) the reconstruction.
        truth: (S, S) the slice.
    """

    correlation: float
    chance: float
    image: Array
    truth: Array


def invert_gradient(
    network: nn.Module, target: Patient, others: Sequence[Patient], plan: Plan
) -> Inverted:
    """Reconstruct one slice from the gradient that a training step with it alone would send.

    The strongest case: one slice in the batch, a known mask and an unpacked gradient (Geiping et
    al., NeurIPS 2020: cosine distance of gradients plus total variation). With
    `privacy.dp.channels=[weights]` the gradient is shortened and has noise, as in a step of DP-SGD.
    """
    place = int(np.argmax((target.labels > 0).sum(dim=(1, 2))))
    truth, labels = target.images[place : place + 1], target.labels[place : place + 1]
    parameters = [each for each in network.parameters() if each.requires_grad]
    wanted = _gradient(network, truth, labels, parameters, plan, keep=False)
    flat = torch.cat([each.reshape(-1) for each in wanted]).detach()
    if plan.privacy.dp.weights:
        clip = plan.privacy.dp.clip
        flat = flat * min(1.0, clip / float(flat.norm()))
        noisy = Noise.from_entropy().rounded(
            flat.double().numpy(), clip * plan.privacy.dp.weights_noise
        )
        flat = torch.from_numpy(noisy).float()
    generator = torch.Generator().manual_seed(0)
    guess = (0.1 * torch.randn(truth.shape, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        found = _gradient(network, guess, labels, parameters, plan, keep=True)
        own = torch.cat([each.reshape(-1) for each in found])
        distance = 1 - nn.functional.cosine_similarity(own, flat, dim=0)
        rough = guess.diff(dim=-1).abs().mean() + guess.diff(dim=-2).abs().mean()
        (distance + SMOOTHNESS * rough).backward()  # type: ignore[no-untyped-call]
        if guess.grad is not None:
            guess.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            guess.clamp_(-1, 1)
    image, middle = guess.detach()[0], truth[0]
    chance = [_correlation(image, one) for other in others for one in other.images[::6]]
    return Inverted(
        _correlation(image, middle),
        max(chance, default=0.0),
        image[1].numpy(),
        middle[1].numpy(),
    )


def _gradient(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    parameters: list[nn.Parameter],
    plan: Plan,
    *,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    value = segmentation_loss(network(images)[0], labels, plan.data)
    found = torch.autograd.grad(value, parameters, create_graph=keep, allow_unused=True)
    return tuple(
        torch.zeros_like(parameter) if each is None else each
        for each, parameter in zip(found, parameters, strict=True)
    )


def _correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    both = torch.stack([left.reshape(-1), right.reshape(-1)]).double()
    value = float(torch.corrcoef(both)[0, 1])
    return value if np.isfinite(value) else 0.0
