"""DoFE's pool of domain knowledge: what the feature maps of each training hospital look like.

The pool is part of the network's state, so that training, evaluation and prediction use the same
one. The coordinator fills it from the hospitals' class statistics
(`server.aggregation.domain_pool`); nothing trains it. Before that the feature map is unchanged.

Legend: B images, A channels of the feature map, D places of the pool.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

UNUSED: Final = -1e30
"""Score of a place without a hospital."""


class DomainPool(nn.Module):
    """Gaussians of the pixel features of D hospitals.

    Args:
        places: D.
        channels: A.
    """

    used: Tensor
    mean: Tensor
    whitening: Tensor
    offset: Tensor

    def __init__(self, places: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("used", torch.zeros(places))
        self.register_buffer("mean", torch.zeros(places, channels))
        self.register_buffer("whitening", torch.zeros(places, channels, channels))
        self.register_buffer("offset", torch.zeros(places))

    def forward(self, codes: Tensor) -> Tensor:
        """Return the similarity (B, D) of codes (B, A) to each hospital, with sum 1, or 0 if empty.

        It is the softmax of the log-likelihood of a code under each hospital's Gaussian.
        """
        distance = codes[:, None] - self.mean
        white = torch.einsum("dij,bdj->bdi", self.whitening, distance)
        score = self.offset - white.square().sum(2) / 2
        return score.masked_fill(self.used == 0, UNUSED).softmax(1) * self.used


class DomainKnowledge(nn.Module):
    """Adds to a feature map what is known of similar domains.

    h' = h + (s(m) @ mean) * tanh(conv1x1(h)), m = mean of h over space, s as in `DomainPool`

    Source: Wang et al., DoFE, IEEE TMI 2020, section III-B. The published similarities come from a
    classifier of the domains, which cannot be trained where a client has one domain.

    Args:
        places: D.
        channels: A.
    """

    def __init__(self, places: int, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)
        self.pool = DomainPool(places, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return the map (B, A, H, W) with domain knowledge; unchanged while the pool is empty."""
        codes = features.detach().float().mean((2, 3))
        known = (self.pool(codes) @ self.pool.mean).to(features.dtype)
        enriched: Tensor = features + known[:, :, None, None] * self.gate(features).tanh()
        return enriched
