"""SgCG: adds the weighted contrastive loss against the global prototypes to a method's loss.

total = L_method + lambda * sum over views of mean_i L_i, with the closed form L_i of SgCG eq. 11,
averaged over the pixels i of a view (eqs. 12-13). See "The closed form" in
docs/explanation/sgcg.md.

Legend: K classes, A feature channels, N pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import Loss, Source, View
from fedsgcg.clients.methods.guidance import IGNORE, Guidance, Guide, flat_pixels
from fedsgcg.common.settings.plan import Plan, PrototypeSettings
from fedsgcg.common.sgcg.loss import reduce_labels, sgcg_loss


class SgCG(Source):
    """SgCG: the supervised baseline plus the contrastive term with the global prototypes.

    Formula: L = L_supervised + lambda * mean over pixels of logsumexp_k (q' mu_k / tau + q' Sigma_k
        q / (2 tau^2)) - q' mu_y / tau.
    Leaves: weights; count, mean and covariance of every class.
    Defaults: tau and lambda chosen on source validation.
    Source: SgCG, eqs. 4-11; docs/explanation/sgcg.md.
    """

    contrasts = True

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the supervised loss plus `prototypes.weight` times the contrastive loss.

        Without prototypes it is the supervised loss alone.
        """
        views = self.forward(batch)
        total, parts = self.supervised(batch, views)
        # Called even if the term is off, because a guide may be updated with every batch.
        guidance = guide.after(views[0].features, batch.labels) if guide is not None else None
        if guidance is None or self.plan.prototypes.weight == 0:
            return total, parts
        contrast = contrast_of_views(views, batch.labels, guidance, self.plan)
        return total + self.plan.prototypes.weight * contrast, parts | {
            "loss_contrast": contrast.detach()
        }


def contrast_of_views(
    views: Sequence[View], labels: Tensor, guidance: Guidance, plan: Plan
) -> Tensor:
    """Return the sum of the contrastive loss over the views of `prototypes.views`.

    Statistics are always those of the source view.
    """
    chosen = [view for view in views if view.name in plan.prototypes.views]
    losses = [
        contrast_loss(view.features, labels, guidance, plan.prototypes, plan.data.num_classes)
        for view in chosen
    ]
    return torch.stack(losses).sum()


def contrast_loss(
    penultimate: Tensor,
    labels: Tensor,
    guidance: Guidance,
    settings: PrototypeSettings,
    num_classes: int,
) -> Tensor:
    """Return the contrastive loss: the mean over pixels, or the mean of per-class means."""
    labels = labels_at(labels, penultimate.shape[-1], num_classes).reshape(-1)
    balanced = settings.balance == "class"
    value = sgcg_loss(
        flat_pixels(penultimate),  # not normalised here; the GPU kernel does it on the fly
        labels,
        guidance.mean,
        guidance.covariance,
        temperature=settings.temperature,
        active=guidance.active,
        ignore_index=IGNORE,
        reduction="none" if balanced else "mean",
        covariance_form=settings.covariance,
        unit_norm=settings.normalize,
    )
    return class_balanced_mean(value, labels, guidance.active) if balanced else value


def class_balanced_mean(values: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """Return the mean over classes of the per-class means of `values` (N,).

    Only active classes that occur count; without any the result is 0.

    Sums are float64, because `index_add` adds sequentially: float32 loses 0.4 % of a sum of a
    million pixels.
    """
    num_classes = active.shape[0]
    labels = labels.long()
    known = labels < num_classes
    index = labels.where(known, 0)
    weight = (known & active[index]).double()
    totals = torch.zeros(num_classes, dtype=torch.float64, device=values.device).index_add(
        0, index, values * weight
    )
    counts = torch.zeros_like(totals).index_add(0, index, weight)
    return ((totals / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)).to(values.dtype)


def labels_at(labels: Tensor, width: int, num_classes: int) -> Tensor:
    """Return the labels (B, H, W) at the resolution of a feature map of this width."""
    factor = labels.shape[-1] // width
    return (
        labels.long()
        if factor == 1
        else reduce_labels(labels.long(), factor, num_classes, ignore_index=IGNORE)
    )
