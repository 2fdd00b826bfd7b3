"""FedDG-ELCFS: episodes of own slices and of copies with amplitudes of other sites.

See `clients.methods.boundary` for the boundary's features.

Legend: B batch, A feature channels, S structures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import (
    Loss,
    Source,
    View,
    mean_dice_loss,
    segmentation_loss,
    structure_targets,
    targets,
)
from fedsgcg.clients.methods.boundary import boundary_contrast, contour_and_ring, region_means
from fedsgcg.clients.methods.guidance import Guide
from fedsgcg.clients.methods.steps import frozen_moments, gradients, moved, trained_weights


class Elcfs(Source):
    """FedDG-ELCFS: a virtual step on the slices must also help on copies with other amplitudes.

    Formula: L = L_in(w) + L_out(w - r clip(grad L_in(w))), L_in = Dice(x), L_out = Dice(x_f) +
        0.1 * sum over structures of the contrast between contours and rings, in x and x_f.
    Leaves: weights; with `method.ram.sharing=summary` or `bank` amplitudes, by the site's consent.
    Defaults: r = 1e-3, clip 100, contrast 0.1, temperature 0.05, ring 5 as published; the virtual
        step's gradient is a constant (first order), as in the published code. x_f is RAM-DSIR's
        mixture inside a window; the published code replaces only the frequency zero. The published
        bank of single images is `sharing=bank`.
    Source: Liu et al., FedDG, CVPR 2021, eqs. 2-8.
    """

    mixes = True
    parts = ("loss_supervised", "loss_inner", "loss_outer", "loss_boundary")

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the sum of the inner and the outer loss.

        `loss_supervised` is cross-entropy plus Dice of the slices, for comparison with other
        methods. Only the pass over the slices updates BatchNorm's running moments.
        """
        if batch.mixed is None:
            raise ValueError("batch.mixed: found None, expected the amplitude-mixed copies")
        data, settings = self.plan.data, self.plan.method.elcfs
        plain = self.view("source", batch.images)
        inner = mean_dice_loss(*targets(plain.logits, batch.labels, data))
        weights = trained_weights(self.network)
        step = clipped_descent(gradients(inner, weights), settings.inner_rate, settings.clip)
        with frozen_moments(self.network):
            altered = self.view("ram", batch.mixed, moved(weights, step))
        outer = mean_dice_loss(*targets(altered.logits, batch.labels, data))
        boundary = self._contrast([plain, altered], batch.labels)
        parts = {
            "loss_supervised": segmentation_loss(plain.logits.detach(), batch.labels, data),
            "loss_inner": inner.detach(),
            "loss_outer": outer.detach(),
            "loss_boundary": boundary.detach(),
        }
        return inner + outer + settings.contrast * boundary, parts

    def _contrast(self, views: Sequence[View], labels: Tensor) -> Tensor:
        """Return the sum over the structures of the boundary contrast over all views."""
        settings = self.plan.method.elcfs
        masks = structure_targets(labels, self.plan.data.structure_classes())
        found = boundary_embeddings([view.features for view in views], masks, settings.ring)
        embeddings, inside, valid = found
        losses = [
            boundary_contrast(embeddings[:, s], inside, valid[:, s], settings.temperature)
            for s in range(masks.shape[1])
        ]
        return torch.stack(losses).sum()


def clipped_descent(gradient: Mapping[str, Tensor], rate: float, clip: float) -> dict[str, Tensor]:
    """Return -rate times a gradient whose entries are at most `clip`, as constants."""
    return {name: -rate * part.detach().clamp(-clip, clip) for name, part in gradient.items()}


def boundary_embeddings(
    features: Sequence[Tensor], masks: Tensor, ring: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean features of contours and rings in several views of the same slices.

    Args:
        features: Maps (B, A, H, W), one per view.
        masks: (B, S, H, W) bool.
        ring: Width of the ring.

    Returns:
        Embeddings (N, S, A) with N = 2 B times the views, (N,) bool whether one is of a contour,
        and (N, S) bool whether it exists.
    """
    regions = contour_and_ring(masks, ring)
    means, exists, inside = [], [], []
    for number, region in enumerate(regions):
        for view in features:
            mean, found = region_means(view, region)
            means.append(mean)
            exists.append(found)
            inside.append(torch.full(found.shape[:1], number == 0, device=found.device))
    return torch.cat(means), torch.cat(inside), torch.cat(exists)
