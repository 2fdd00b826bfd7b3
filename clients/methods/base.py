"""The supervised baseline: cross-entropy plus Dice, as RAM-DSIR trains its segmentation branch (methods.md 2.6).

`Source` is also what every other method builds on: it owns the network's forward passes and the optimiser's groups.

Sums over the pixels of a batch are float32, as torch has them: it adds in cascades on a CPU and in trees on a GPU, so
that each of 16 million terms passes through about a hundred additions and a sum of positive terms errs by less than
1e-5. Tests hold that for the whole losses with equal terms, where a running sum of float32 errs by percents. Float64
would need a copy of every map.
Legend: B batch, C output channels, S structures, H, W height and width, D source domains of the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from clients.data.batches import Batch
from clients.device import autocast_for, precision
from clients.methods.guidance import IGNORE, Guide
from common.settings.plan import DataSettings, Plan

SMOOTH = 1e-5  # of numerator and denominator, as in the published code
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class View:
    """What the network gave for one view of a batch.

    Attributes:
        name: `source` or `ram`, as `prototypes.views` calls it.
        logits: (B, C, H, W) float32.
        features: (B, A, h, w) feature map.
    """

    name: str
    logits: Tensor
    features: Tensor


class Source:
    """Supervised training on a client's own slices.

    Args:
        network: Holds the received weights; trained in place.
        plan: Method, activation, structures.
        domains: D.
        device: Where to compute.

    Attributes:
        network: As given.
        plan: As given.
        local: Networks that exist in training alone and stay at the site; empty here.
        parts: Names of the loss's parts, in the order of the report. `loss_supervised` is the mean over the views, so
            that methods of one view and of two compare.
        contrasts: Whether the method learns from the global prototypes.
        mixes: Whether it wants amplitude-mixed copies of the slices (`Batch.mixed`).
    """

    contrasts: bool = False
    mixes: bool = False

    parts: tuple[str, ...] = ("loss_supervised", "loss_contrast")

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        self.network, self.plan, self.device = network, plan, device
        self.local = nn.ModuleDict()
        self._dtype = precision(plan.method, device)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; `factor` is a group's share of the learning rate."""
        return [{"params": list(self.network.parameters()), "factor": 1.0}]

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Loss of one batch and its parts by name (before they are weighted), in float32 outside autocast.

        Args:
            batch: Slices on the device.
            guide: The prototypes; unused without a contrastive term.
        """
        return self.supervised(batch, self.forward(batch))

    def forward(self, batch: Batch) -> list[View]:
        """Run the network on the batch."""
        return [self.view("source", batch.images)]

    def view(self, name: str, images: Tensor) -> View:
        """Run the network on one view (B, C, H, W)."""
        with autocast_for(self._dtype, self.device):
            logits, features = self.network(images)
        return View(name, logits.float(), features)

    def supervised(self, batch: Batch, views: Sequence[View]) -> Loss:
        """Segmentation loss of the source view."""
        value = segmentation_loss(views[0].logits, batch.labels, self.plan.data)
        return value, {"loss_supervised": value.detach()}


def segmentation_loss(logits: Tensor, labels: Tensor, data: DataSettings) -> Tensor:
    """Entropy plus Dice of logits (B, C, H, W) against labels (B, H, W), by the data's activation."""
    if data.activation == "softmax":
        return softmax_loss(logits, labels)
    return sigmoid_loss(logits, labels, data.structure_classes())


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the K exclusive classes plus Dice over the foreground classes.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
    """
    labels = labels.long()
    valid = labels != IGNORE
    # The sum over valid pixels divided by their number: the library's own mean is 0/0 when every pixel is ignored.
    entropy = F.cross_entropy(
        logits, labels, ignore_index=IGNORE, reduction="sum"
    ) / valid.sum().clamp(min=1)
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
    entropy = F.binary_cross_entropy_with_logits(
        logits, truth, weight=valid.to(logits.dtype), reduction="sum"
    )
    entropy = entropy / (valid.sum() * logits.shape[1]).clamp(min=1)
    return entropy + dice_loss(logits.sigmoid(), truth, valid)


def structure_targets(labels: Tensor, structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Return (B, S, H, W) bool: whether a pixel's class is one of the structure's classes."""
    channels = [
        torch.stack([labels == index for index in classes]).any(0)
        for classes in structures.values()
    ]
    return torch.stack(channels, dim=1)


def dice_loss(probability: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """1 - (2 sum(p t) + e) / (sum p^2 + sum t^2 + e), one sum over batch, channels and valid pixels."""
    probability, truth = probability * valid, truth * valid
    overlap = 2 * (probability * truth).sum() + SMOOTH
    return 1 - overlap / (probability.square().sum() + truth.square().sum() + SMOOTH)
