"""SgCG: a method's loss plus lambda times the contrastive loss against the global prototypes (methods.md 1.3-1.7).

Total loss = L_method + lambda * sum over views of mean_i L_i, L_i in closed form, over all pixels of the batch (paper
eq. 11-13; methods.md 1.6 on the views).
Legend: K classes, A feature channels, N pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.data.batches import Batch
from clients.methods.base import Loss, Source, View
from clients.methods.guidance import IGNORE, Guidance, Guide, flat_pixels
from common.settings.plan import Plan, PrototypeSettings
from common.sgcg.loss import reduce_labels, sgcg_loss


class SgCG(Source):
    """The supervised baseline plus the contrastive term."""

    contrasts = True

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Supervised loss plus `prototypes.weight` times the contrastive loss; without prototypes the first alone."""
        views = self.forward(batch)
        total, parts = self.supervised(batch, views)
        # Asked even where nothing is compared: a guide may follow the batches from the first one on.
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
    """Sum over the plan's views of the contrastive loss; statistics follow the source view alone (methods.md 1.6)."""
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
    """Contrastive loss of a batch: the mean over its pixels, or the mean of its per-class means (methods.md 1.4)."""
    labels = labels_at(labels, penultimate.shape[-1], num_classes).reshape(-1)
    balanced = settings.balance == "class"
    value = sgcg_loss(
        flat_pixels(penultimate),  # normalised inside: on a GPU the kernel does it on the way
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
    """Mean over the active classes present of the mean of `values` (N,) over their pixels; 0 when none is present.

    Sums in float64: `index_add` adds one pixel after the other, and float32 loses 0.4 % of a sum of a million that way.
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
