"""GIN and IPA: consistent predictions for two randomly filtered views (`clients.data.gin`).

Legend: B batch, C channels of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.data.gin import Numbers, draw_numbers, gin_views
from fedsgcg.clients.methods.base import Loss, Source, View, segmentation_loss
from fedsgcg.clients.methods.guidance import IGNORE
from fedsgcg.clients.methods.ram import consistency_loss, probability


class Gin(Source):
    """GIN: two views of a slice through random shallow networks, with consistent predictions.

    Formula: L = L_supervised(v) + L_supervised(w) + 10 KL(p_v, p_w) with views v and w of x,
        (a net(x) + (1 - a) x) scaled to the norm of x, a uniform in [0, 1), net of four random
        convolutions; with blend=true (IPA) b v + (1 - b) w and b w + (1 - b) v, b a smooth map.
    Leaves: weights.
    Defaults: weight 10, depth, widths and kernels as published. The divergence is that of `ram`,
        symmetric and averaged over pixels and channels; IPA's map is a cubic spline of 8 x 8 cells,
        the published one a quadratic one. The kernel's size is drawn for each slice instead of
        each batch.
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
        """Run the network on the two views, in separate passes."""
        with torch.no_grad():
            views = gin_views(batch.images, Numbers(*batch.drawn), blend=self.plan.method.gin.blend)
        names = ("source", "filtered")
        return [
            self.view(name, images.contiguous(memory_format=torch.channels_last))
            for name, images in zip(names, views, strict=True)
        ]

    def supervised(self, batch: Batch, views: Sequence[View]) -> Loss:
        """Return the loss of both segmentations and their weighted consistency."""
        data = self.plan.data
        losses = [segmentation_loss(view.logits, batch.labels, data) for view in views]
        both = losses[0] + losses[1]
        first, second = (probability(view.logits, data.activation) for view in views)
        valid = (batch.labels != IGNORE).unsqueeze(1)
        consistency = consistency_loss(first, second, valid, symmetric=data.activation == "sigmoid")
        total = both + self.plan.method.gin.weight * consistency
        # Reported as the mean of the views, for comparison with methods of one view.
        parts = {"loss_supervised": both.detach() / 2, "loss_consistency": consistency.detach()}
        return total, parts
