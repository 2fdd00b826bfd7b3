"""The supervised baseline: cross-entropy plus Dice, as RAM-DSIR trains its segmentation branch (methods.md 2.6).

Legend: B batch, C output channels, S structures, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from clients.methods.guidance import IGNORE, Guidance
from common.plan import Plan

SMOOTH = 1e-5  # of numerator and denominator, as in the published code


def loss(
    logits: Tensor, penultimate: Tensor, labels: Tensor, guidance: Guidance | None, plan: Plan
) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised loss of one batch; the penultimate map and the prototypes are not used.

    Args:
        logits: (B, C, H, W) float32.
        penultimate: (B, A, H, W), unused.
        labels: (B, H, W) class indices, 255 = ignore.
        guidance: Unused.
        plan: Names the activation and the structures.

    Returns:
        The loss, and its parts by name.
    """
    if plan.data.activation == "softmax":
        value = softmax_loss(logits, labels)
    else:
        value = sigmoid_loss(logits, labels, plan.data.structure_classes())
    return value, {"loss_supervised": value.detach(), "loss_contrast": torch.zeros_like(value)}


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the K exclusive classes plus Dice over the foreground classes.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
    """
    labels = labels.long()
    valid = labels != IGNORE
    # The sum over valid pixels divided by their number: the library's own mean is 0/0 when every pixel is ignored.
    entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / valid.sum().clamp(min=1)
    classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    truth = (labels.unsqueeze(1) == classes).to(logits.dtype)
    return entropy + dice_loss(logits.softmax(1)[:, 1:], truth, valid.unsqueeze(1))


def sigmoid_loss(logits: Tensor, labels: Tensor, structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Binary cross-entropy plus Dice, one channel a structure; structures may overlap.

    Args:
        logits: (B, S, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
        structures: The classes that make up each structure, in the order of the channels.
    """
    valid = (labels != IGNORE).unsqueeze(1)
    truth = structure_targets(labels, structures).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weight=valid.to(logits.dtype), reduction="sum")
    entropy = entropy / (valid.sum() * logits.shape[1]).clamp(min=1)
    return entropy + dice_loss(logits.sigmoid(), truth, valid)


def structure_targets(labels: Tensor, structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Return (B, S, H, W) bool: whether a pixel's class is one of the structure's classes."""
    channels = [torch.stack([labels == index for index in classes]).any(0) for classes in structures.values()]
    return torch.stack(channels, dim=1)


def dice_loss(probability: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """1 - (2 sum(p t) + e) / (sum p^2 + sum t^2 + e), one sum over batch, channels and valid pixels."""
    probability, truth = probability * valid, truth * valid
    overlap = 2 * (probability * truth).sum() + SMOOTH
    return 1 - overlap / (probability.square().sum() + truth.square().sum() + SMOOTH)
