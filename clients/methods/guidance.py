"""The coordinator's prototypes as constants on a site's device, and the pixel features.

Statistics and loss must use the same representation, so both get their pixels from `pixel_features`
("What the paper leaves open" in docs/explanation/sgcg.md).

Legend: K classes, A feature channels, B batch, H, W height and width, N = B*H*W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedsgcg.common.settings.plan import PrototypeSettings
from fedsgcg.common.statistics import ClassStatistics, between_covariance

IGNORE = 255  # label of ignored pixels


class Guide(Protocol):
    """Provides the prototypes for the contrastive loss of a batch."""

    def after(self, features: Tensor, labels: Tensor) -> Guidance | None:
        """Return the prototypes, given a batch's features (B, A, h, w) and labels (B, H, W).

        None in the warm-up, or with fewer than two classes.
        """

    def state(self) -> dict[str, Tensor]:
        """Return what the site keeps for its next round."""


@dataclass(frozen=True)
class SiteGaussians:
    """The Gaussians of every site, S sites, on a site's device.

    Attributes:
        weight: (S, K) share of a site's pixels in those of a class.
        mean: (S, K, A) float32.
        covariance: (S, K, A, A) float32.
    """

    weight: Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Guidance:
    """The global prototypes on a site's device; they are constants without gradient.

    Attributes:
        mean: (K, A) float32.
        covariance: (K, A, A) float32, population covariance.
        active: (K,) bool, classes with at least `prototypes.min_count` pixels over all sites.
        between: (K, A, A) float32, covariance of the sites' means, if the plan needs it.
        sites: The Gaussians of every site, if the plan needs them.
    """

    mean: Tensor
    covariance: Tensor
    active: Tensor
    between: Tensor | None = None
    sites: SiteGaussians | None = None

    @classmethod
    def from_prototypes(
        cls,
        prototypes: ClassStatistics | None,
        settings: PrototypeSettings,
        round_number: int,
        device: torch.device,
    ) -> Guidance | None:
        """Put the prototypes on the device; None if there are none and during the warm-up."""
        if prototypes is None or round_number <= settings.warmup_rounds:
            return None
        return cls.of(prototypes, settings, device)

    @classmethod
    def of(
        cls, prototypes: ClassStatistics, settings: PrototypeSettings, device: torch.device
    ) -> Guidance | None:
        """Put the prototypes on the device; None with fewer than two active classes.

        With one class the closed form reduces to q' Sigma q / (2 tau^2), which only shrinks the
        features.
        """
        active = prototypes.count >= settings.min_count
        if active.sum() < 2:
            return None
        return cls(
            mean=torch.tensor(prototypes.mean, dtype=torch.float32, device=device),
            covariance=torch.tensor(prototypes.covariance, dtype=torch.float32, device=device),
            active=torch.tensor(active, device=device),
        )

    @classmethod
    def of_projections(
        cls, others: ClassStatistics | None, device: torch.device
    ) -> Guidance | None:
        """Put the other sites' projections on the device, (1, d) and (1, d, d); None without any.

        They are negatives alone, so that one class is enough, from the first round that has them.
        """
        if others is None or not others.count.sum() > 0:
            return None
        return cls(
            mean=torch.tensor(others.mean, dtype=torch.float32, device=device),
            covariance=torch.tensor(others.covariance, dtype=torch.float32, device=device),
            active=torch.tensor(others.count > 0, device=device),
        )

    def with_shift(self, shift: ClassStatistics | None) -> Guidance:
        """Add what the coordinator sent of the differences between sites (`Plan.shift`).

        Args:
            shift: K classes with the covariances between sites, or the S K of all sites one after
                the other; None adds nothing.
        """
        if shift is None:
            return self
        (K, A), device = self.mean.shape, self.mean.device

        def on_device(array: npt.NDArray[np.float64]) -> Tensor:
            return torch.tensor(array, dtype=torch.float32, device=device)

        count = shift.count.reshape(-1, K)
        mean, covariance = shift.mean.reshape(-1, K, A), shift.covariance.reshape(-1, K, A, A)
        if len(count) == 1:
            return replace(self, between=on_device(covariance[0]))
        scatter = shift.scatter.reshape(-1, K, A, A)
        parts = [ClassStatistics(*part) for part in zip(count, mean, scatter, strict=True)]
        total = count.sum(0)
        weight = np.divide(count, total, out=np.zeros_like(count), where=total > 0)
        sites = SiteGaussians(on_device(weight), on_device(mean), on_device(covariance))
        return replace(self, between=on_device(between_covariance(parts)), sites=sites)

    def after(self, features: Tensor, labels: Tensor) -> Guidance:
        """Return these prototypes, which are constant during a round."""
        return self

    def state(self) -> dict[str, Tensor]:
        """Return nothing, because the coordinator sends the prototypes in every round."""
        return {}


def pixel_features(penultimate: Tensor, normalize: bool) -> Tensor:
    """Flatten a feature map (B, A, H, W) to float32 pixels (N, A), of unit length if `normalize`.

    A channels-last map is not copied before the normalisation.
    """
    pixels = flat_pixels(penultimate).float()
    return F.normalize(pixels, dim=1, eps=1e-12) if normalize else pixels


def flat_pixels(penultimate: Tensor) -> Tensor:
    """Flatten a feature map (B, A, H, W) to pixels (N, A) of the same type."""
    return penultimate.permute(0, 2, 3, 1).reshape(-1, penultimate.shape[1])
