"""Hard pixels of the contrastive term, and means in which they have a share of their own.

ContrastiveSeg (Wang et al., ICCV 2021) draws half of a batch's anchors from the pixels that the
network predicts wrongly. Nothing is drawn here: the mean over the hard pixels and that over the
others are weighted by `method.sgcg.hard` and the rest, which is what drawing would give on average.

Legend: B batch, C output channels, H, W height and width, h, w size of the feature map, N = B h w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedsgcg.clients.methods.base import structure_targets
from fedsgcg.clients.methods.guidance import IGNORE
from fedsgcg.common.settings.plan import DataSettings


def hard_pixels(logits: Tensor, labels: Tensor, width: int, data: DataSettings) -> Tensor:
    """Return (N,) bool, whether a pixel of the feature map is hard.

    A pixel is hard if one of its eight neighbours has another class, or if its predicted structures
    are not the true ones. A pixel of a smaller map is hard if one of its cell's is. Ignored pixels
    are no neighbours of another class.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
        width: w.
        data: Activation, threshold and structures.
    """
    known = (labels != IGNORE).unsqueeze(1)
    hard = ((boundary_pixels(labels) | wrong_pixels(logits, labels, data)) & known).float()
    factor = labels.shape[-1] // width
    if factor > 1:
        hard = F.max_pool2d(hard, factor)
    return hard.reshape(-1) > 0


def boundary_pixels(labels: Tensor) -> Tensor:
    """Return (B, 1, H, W) bool, whether one of a pixel's eight neighbours has another class."""
    values = labels.unsqueeze(1).float()
    known = values != IGNORE
    highest = F.max_pool2d(values.masked_fill(~known, -1), 3, stride=1, padding=1)
    lowest = -F.max_pool2d(-values, 3, stride=1, padding=1)  # IGNORE is the largest label
    return known & ((highest != values) | (lowest != values))


def wrong_pixels(logits: Tensor, labels: Tensor, data: DataSettings) -> Tensor:
    """Return (B, 1, H, W) bool, whether the predicted structures are not the true ones."""
    structures = data.structure_classes()
    if data.activation == "softmax":
        return logits.argmax(1, keepdim=True) != labels.long().unsqueeze(1)
    predicted = logits.sigmoid() > data.threshold
    return (predicted != structure_targets(labels, structures)).any(1, keepdim=True)


def weighted_mean(
    values: Tensor, labels: Tensor, active: Tensor, hard: Tensor, share: float, *, by_class: bool
) -> Tensor:
    """Return share * (mean over hard pixels) + (1 - share) * (mean over the others).

    Without pixels of one of the two kinds it is the mean over the other kind. Sums are float64,
    because `index_add` adds sequentially.

    Args:
        values: (N,).
        labels: (N,) class indices; only pixels of active classes count.
        active: (K,) bool.
        hard: (N,) bool.
        share: Of the hard pixels.
        by_class: Compute it for each class that occurs, and return the mean over these.
    """
    num_classes = active.shape[0]
    labels = labels.long()
    known = labels < num_classes
    index = labels.where(known, 0)
    weight = (known & active[index]).double()
    cell = hard.long() + 2 * (index if by_class else torch.zeros_like(index))
    empty = torch.zeros(2 * num_classes, dtype=torch.float64, device=values.device)
    totals = empty.index_add(0, cell, values.double() * weight).view(-1, 2)
    counts = empty.index_add(0, cell, weight).view(-1, 2)
    shares = torch.stack([torch.full_like(counts[:, 0], part) for part in (1 - share, share)], 1)
    shares = shares * (counts > 0)
    sums = shares.sum(1)
    means = (shares * totals / counts.clamp(min=1)).sum(1) / torch.where(sums > 0, sums, 1.0)
    return (means.sum() / (sums > 0).sum().clamp(min=1)).to(values.dtype)
