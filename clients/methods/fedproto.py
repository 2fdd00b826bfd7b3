"""FedProto: keeps the class means of a batch near the global class means.

Legend: K classes, A feature channels, N pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import Loss, Source
from fedsgcg.clients.methods.guidance import Guide, pixel_features
from fedsgcg.clients.methods.sgcg import labels_at


class FedProto(Source):
    """FedProto: squared distance between a batch's class means and the global class means.

    Formula: L = L_supervised + weight * mean over the batch's classes k and the channels of
        (m_k - mu_k)^2, with the batch's mean m_k and the global mean mu_k.
    Leaves: weights; count, mean and covariance of every class, of which the means are used.
    Defaults: weight 1 as published. The published method shares means alone and averages them over
        the clients that have the class; here weights are shared too, as in all methods, and
        `prototypes.weighting` decides, by default in proportion to the pixels.
    Source: Tan et al., FedProto, AAAI 2022, eqs. 4-7.
    """

    contrasts = True
    parts = ("loss_supervised", "loss_prototype")

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the loss; without class statistics it is the supervised one."""
        (view,) = self.forward(batch)
        total, parts = self.supervised(batch, [view])
        guidance = guide.after(view.features, batch.labels) if guide is not None else None
        if guidance is None:
            return total, parts
        features = pixel_features(view.features, self.plan.unit_features)
        classes = guidance.mean.shape[0]
        labels = labels_at(batch.labels, view.features.shape[-1], classes).reshape(-1)
        distance = prototype_distance(features, labels, guidance.mean, guidance.active)
        weight = self.plan.method.fedproto.weight
        return total + weight * distance, parts | {"loss_prototype": distance.detach()}


def prototype_distance(features: Tensor, labels: Tensor, mean: Tensor, active: Tensor) -> Tensor:
    """Return the mean squared difference between class means and prototypes.

    Args:
        features: (N, A).
        labels: (N,) class indices; pixels of other values do not count.
        mean: (K, A) prototypes.
        active: (K,) bool, classes with a prototype.

    Returns:
        Mean over the active classes that occur and over the channels; 0 without one.
    """
    classes = torch.arange(mean.shape[0], device=labels.device)
    member = (labels.unsqueeze(0) == classes.unsqueeze(1)).to(features.dtype)
    count = member.sum(1)
    found = (member @ features) / count.clamp(min=1).unsqueeze(1)
    counts = (count > 0) & active
    error = (found - mean.to(features.dtype)).square().mean(1)
    return (error * counts).sum() / counts.sum().clamp(min=1)
