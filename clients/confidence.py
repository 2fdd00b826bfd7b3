"""Confidence map: how close a pixel's feature is to the prototype of its predicted class.

For class k with mean mu_k and covariance Sigma_k over all training pixels of all hospitals,

    d_k^2 = (q - mu_k)^T S_k^-1 (q - mu_k),    S_k = (1 - a) Sigma_k + a (tr Sigma_k / A) I,    a =
    0.1

is the squared Mahalanobis distance of a feature q. The shrinkage a keeps S_k invertible if features
are constant or linearly dependent. Over the class's own pixels d^2 is about A on average, so the
map shows

    confidence = 1 / (1 + d^2 / A)

which is 1 at the prototype, about 0.5 for a typical training pixel, and close to 0 for features
that no hospital had in this class. It is not a probability and not calibrated; it shows where the
network sees something new.

Legend: K classes, A feature channels, B batch, h, w size of the feature map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.common.statistics import ClassStatistics

SHRINKAGE: Final = 0.1
SMALLEST: Final = 1e-8
"""Minimum variance of a class, so that distances stay finite if all its pixels are equal."""


@dataclass(frozen=True)
class Gaussians:
    """The class Gaussians, prepared for distances.

    Attributes:
        mean: (K, A) float32.
        whiten: (K, A, A) float32, W with W^T W = S_k^-1.
        seen: (K,) bool, classes with at least two training pixels.
    """

    mean: Tensor
    whiten: Tensor
    seen: Tensor

    @classmethod
    def of(cls, prototypes: ClassStatistics, device: torch.device) -> Gaussians:
        """Shrink and factor the covariances in float64."""
        size = prototypes.num_features
        variance = np.trace(prototypes.covariance, axis1=1, axis2=2) / size
        level = np.maximum(variance, SMALLEST)[:, None, None] * np.eye(size)
        shrunk = (1 - SHRINKAGE) * prototypes.covariance + SHRINKAGE * level
        # A summed covariance may have eigenvalues slightly below zero due to rounding.
        values, vectors = np.linalg.eigh(shrunk)
        floor = SHRINKAGE * np.maximum(variance, SMALLEST)[:, None]
        whiten = vectors.transpose(0, 2, 1) / np.sqrt(np.maximum(values, floor))[:, :, None]
        return cls(
            mean=torch.tensor(prototypes.mean, dtype=torch.float32, device=device),
            whiten=torch.tensor(whiten, dtype=torch.float32, device=device),
            seen=torch.tensor(prototypes.count >= 2, device=device),
        )

    def squared_distance(self, features: Tensor, *, normalize: bool) -> Tensor:
        """Return d_k^2 (B, K, h, w) of a feature map (B, A, h, w).

        It is infinite for a class without training pixels.
        """
        batch, _, height, width = features.shape
        pixels = pixel_features(features, normalize)
        squares = [
            ((pixels - mean) @ whiten.T).square().sum(1)
            if seen
            else torch.full_like(pixels[:, 0], torch.inf)
            for mean, whiten, seen in zip(self.mean, self.whiten, self.seen.tolist(), strict=True)
        ]
        return torch.stack(squares, 1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)

    def confidence(self, squared_distance: Tensor) -> Tensor:
        """Return 1 / (1 + d^2 / A) of squared distances of any shape."""
        return 1 / (1 + squared_distance / self.mean.shape[1])
