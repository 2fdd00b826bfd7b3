"""GIN and IPA: consistent predictions for two randomly filtered views (`clients.data.gin`).

Legend: B batch, C channels of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.data.gin import Numbers, draw_numbers, gin_views
from fedsgcg.clients.methods.base import Loss, Source, View, segmentation_loss
from fedsgcg.clients.methods.guidance import IGNORE
from fedsgcg.clients.methods.ram import probability


class Gin(Source):
    """GIN: two views of a slice through random shallow networks, with consistent predictions.

    Formula: L = 1/2 (L_supervised(v) + L_supervised(w)) + 10/2 (KL(m, p_v) + KL(m, p_w)) with the
        mean prediction m = (p_v + p_w)/2 of views v and w of x, (a net(x) + (1 - a) x) scaled to
        the norm of x, a uniform in [0, 1), net of four random convolutions; with blend=true (IPA)
        b v + (1 - b) w and b w + (1 - b) v, b a smooth map.
    Leaves: weights.
    Defaults: weight 10, depth, widths, kernels and divergence, an average over pixels and channels,
        as published; the views are one batch, normalised together. The published code has a third
        view, whose prediction enters the divergence alone, and the supervised loss of one view.
        IPA's map is a cubic spline of 8 x 8 cells, the published one a quadratic one. The kernel's
        size is drawn for each slice instead of each batch.
    Source: Ouyang et al., Causality-inspired Single-source Domain Generalization for Medical Image
        Segmentation, IEEE TMI 2023, sections III-B and III-C.
    """

    parts = ("loss_supervised", "loss_consistency")

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw the networks and the map of each slice (`clients.data.gin.Numbers`)."""
        return draw_numbers(
            sum(sizes), self.plan.data.in_channels, self.plan.method.gin.strength, rng
        )

    def forward(self, batch: Batch) -> list[View]:
        """Run the network on the two views in one pass, so that BatchNorm sees both."""
        with torch.no_grad():
            views = gin_views(batch.images, Numbers(*batch.drawn), blend=self.plan.method.gin.blend)
            images = torch.cat(views).contiguous(memory_format=torch.channels_last)
        both = self.view("source", images)
        parts = zip(both.logits.chunk(2), both.features.chunk(2), strict=True)
        return [View(name, *part) for name, part in zip(("source", "filtered"), parts, strict=True)]

    def supervised(self, batch: Batch, views: Sequence[View]) -> Loss:
        """Return the loss of both segmentations and their weighted consistency."""
        data = self.plan.data
        losses = [segmentation_loss(view.logits, batch.labels, data) for view in views]
        both = (losses[0] + losses[1]) / 2
        first, second = (probability(view.logits, data.activation) for view in views)
        valid = (batch.labels != IGNORE).unsqueeze(1)
        consistency = divergence_from_mean(first, second, valid)
        if data.activation == "sigmoid":  # a channel is a Bernoulli variable
            consistency = consistency + divergence_from_mean(1 - first, 1 - second, valid)
        total = both + self.plan.method.gin.weight * consistency
        return total, {"loss_supervised": both.detach(), "loss_consistency": consistency.detach()}


def divergence_from_mean(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """Return 1/2 (KL(m, p) + KL(m, q)) with m = (p + q)/2, averaged over elements.

    For predictions that differ by d it is about d^2/(8 p) per element, an eighth of the symmetric
    divergence of p and q. With the weight 10 the latter would outweigh the supervised loss, and a
    network that predicts the same for every image minimises it.

    Args:
        first: (B, C, H, W) p in (0, 1).
        second: (B, C, H, W) q.
        valid: (B, 1, H, W) bool, pixels that are not ignored.
    """
    mean = (first + second) / 2
    value = mean * (mean.log() - (first.log() + second.log()) / 2)
    return (value * valid).sum() / (valid.sum() * first.shape[1]).clamp(min=1)
