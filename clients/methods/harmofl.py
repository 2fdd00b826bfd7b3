"""HarmoFL: amplitudes normalised to a mean amplitude, and a minimum that is flat.

A slice's harmonised copy has the mean low-frequency amplitude of the client's slices or, with
`method.ram.sharing=summary`, of all sites', and its own phase. The mean is that of the logarithms
(`common.wire.amplitudes.AmplitudeSummary`), taken once over all training slices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import Loss, Source, View, segmentation_loss
from fedsgcg.clients.methods.guidance import Guide
from fedsgcg.clients.methods.steps import (
    frozen_moments,
    gradients,
    moved,
    norm_of,
    trained_weights,
)


class HarmoFL(Source):
    """HarmoFL: normalises amplitudes and takes the gradient a step towards higher loss.

    Formula: w <- w - rate * grad L(w + d), d = alpha * grad L(w) / |grad L(w)|, with
        L = mean of L_supervised over the slice and its harmonised copy.
    Leaves: weights; with `method.ram.sharing=summary` the moments of the log amplitudes, by the
        site's consent.
    Defaults: alpha = 0.05 as published. The published code replaces only the frequency zero and,
        because its momentum is rounded to an integer, by the amplitude of the first batch; here
        the whole window of RAM-DSIR gets the mean of all slices. An unseen hospital's images are
        normalised only in the evaluation of `adapt.by=[amplitude]`, so the network also learns from
        the slices as they are.
    Source: Jiang et al., HarmoFL, AAAI 2022, eqs. 2-4 and 9.
    """

    mixes = True
    parts = ("loss_supervised", "loss_flat")

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the loss at the moved weights; its gradient there is the step's gradient.

        `loss_supervised` is the loss at the weights themselves, `loss_flat` at the moved ones. Both
        passes normalise by the batch; only the first updates BatchNorm's running moments.
        """
        weights = trained_weights(self.network)
        at_weights = self._both(batch, None)
        if self.plan.method.harmofl.radius == 0:
            return at_weights, {"loss_supervised": at_weights.detach()}
        direction = gradients(at_weights, weights, keep=False)
        step = ascent(direction, self.plan.method.harmofl.radius)
        with frozen_moments(self.network):
            flat = self._both(batch, moved(weights, step))
        return flat, {"loss_supervised": at_weights.detach(), "loss_flat": flat.detach()}

    def _both(self, batch: Batch, weights: Mapping[str, Tensor] | None) -> Tensor:
        if batch.mixed is None:
            raise ValueError("batch.mixed: found None, expected the harmonised copies")
        views: list[View] = [
            self.view(name, images, weights)
            for name, images in (("source", batch.images), ("harmonised", batch.mixed))
        ]
        losses = [segmentation_loss(view.logits, batch.labels, self.plan.data) for view in views]
        return torch.stack(losses).mean()


def ascent(gradient: Mapping[str, Tensor], radius: float) -> dict[str, Tensor]:
    """Return the step of length `radius` along a gradient, as constants."""
    factor = radius / norm_of(gradient)
    return {name: (factor * part).detach() for name, part in gradient.items()}
