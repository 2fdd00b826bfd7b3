"""The supervised baseline: cross-entropy plus Dice, the segmentation loss of RAM-DSIR.

See "Loss" in docs/explanation/ram-dsir.md. `Source` is also the base class of all other methods: it
runs the network and defines the optimiser's parameter groups.

Sums over the pixels of a batch use torch's float32 sums, which are cascaded on a CPU and trees on a
GPU. Each of 16 million terms takes part in about a hundred additions, so the relative error of a
sum of positive terms is below 1e-5; tests check this for the losses, where a running float32 sum is
wrong by percents. Float64 would need a copy of every map.

Legend: B batch, C output channels, S structures, H, W height and width, D source domains of the
client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.device import autocast_for, precision
from fedsgcg.clients.methods.guidance import IGNORE, Guide
from fedsgcg.common.settings.plan import DataSettings, Plan

SMOOTH = 1e-5  # added to numerator and denominator, as in the published code
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class View:
    """The network's output for one view of a batch.

    Attributes:
        name: `source` or `ram`, as in `prototypes.views`.
        logits: (B, C, H, W) float32.
        features: (B, A, h, w) feature map.
    """

    name: str
    logits: Tensor
    features: Tensor


class Source:
    """Supervised training on the client's own slices.

    Formula: L = cross-entropy + Dice.
    Leaves: weights.
    Defaults: the rates of RAM-DSIR.
    Source: the segmentation loss of Zhou et al., RAM-DSIR, ECCV 2022.

    Args:
        network: Holds the received weights; trained in place.
        plan: Method, activation, structures.
        domains: D.
        device: Device of the network.

    Attributes:
        network: The network.
        plan: The plan.
        local: Networks that are used only in training and stay at the site; empty here.
        parts: Names of the loss's parts, in the order of the report. `loss_supervised` is the mean
            over the views, so that methods with one and two views are comparable.
        contrasts: Whether the method uses the global prototypes.
        mixes: Whether the method uses amplitude-mixed copies of the slices (`Batch.mixed`).
        pairs: Whether the method uses pairs of images without labels (`Batch.pairs`).
        raw: Whether its class statistics are those of features that are not normalised.
        captures: Whether a step may be captured as a CUDA graph; not for a method whose operations
            depend on values of tensors.
        round_number: Number of the round, from 1.
    """

    contrasts: bool = False
    mixes: bool = False
    pairs: bool = False
    raw: bool = False
    captures: bool = True
    round_number: int = 1

    parts: tuple[str, ...] = ("loss_supervised", "loss_contrast")

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        self.network = network
        self.plan = plan
        self.device = device
        self.local = nn.ModuleDict()
        self._dtype = precision(plan.method, device)

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups; `factor` scales a group's learning rate."""
        return [{"params": list(self.network.parameters()), "factor": 1.0}]

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw the random numbers of a step, which `loss` finds in `Batch.drawn`.

        Drawn before the step, they are the same on every device and for any number of its parts.

        Args:
            sizes: Number of slices of each domain, D numbers with sum B.
            rng: The generator of the client's round.

        Returns:
            Arrays (B, ...) float32; none here.
        """
        return ()

    def diagnose(self, batch: Batch, guide: Guide | None) -> dict[str, float]:
        """Return figures of the round's first batch before its step; nothing here.

        It must leave the network as it is. `guide` is a copy, which may change.
        """
        return {}

    def finish(self) -> None:
        """Update what stays at the site after the last step of a round; nothing here."""

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the loss of one batch and its unweighted parts by name, in float32.

        Args:
            batch: Slices on the device.
            guide: The prototypes; unused without a contrastive term.
        """
        return self.supervised(batch, self.forward(batch))

    def forward(self, batch: Batch) -> list[View]:
        """Run the network on the batch."""
        return [self.view("source", batch.images)]

    def view(self, name: str, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> View:
        """Run the network on one view (B, C, H, W), with other weights than its own if given."""
        with autocast_for(self._dtype, self.device):
            if weights is None:
                logits, features = self.network(images)
            else:
                logits, features = functional_call(self.network, dict(weights), (images,))
        return View(name, logits.float(), features)

    def supervised(self, batch: Batch, views: Sequence[View]) -> Loss:
        """Return the segmentation loss of the source view."""
        value = segmentation_loss(views[0].logits, batch.labels, self.plan.data)
        return value, {"loss_supervised": value.detach()}


def segmentation_loss(logits: Tensor, labels: Tensor, data: DataSettings) -> Tensor:
    """Return cross-entropy plus Dice of logits (B, C, H, W) against labels (B, H, W)."""
    if data.activation == "softmax":
        return softmax_loss(logits, labels)
    return sigmoid_loss(logits, labels, data.structure_classes())


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy over K exclusive classes plus Dice over the foreground classes.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
    """
    labels = labels.long()
    return softmax_entropy(logits, labels) + dice_loss(*softmax_targets(logits, labels))


def softmax_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, K, H, W) over the valid pixels of labels (B, H, W)."""
    # Torch's own mean would be 0/0 when every pixel is ignored.
    entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return entropy / (labels != IGNORE).sum().clamp(min=1)


def softmax_targets(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the foreground's probabilities, truth (both (B, K - 1, H, W)) and valid pixels."""
    valid = (labels != IGNORE).unsqueeze(1)
    classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    truth = (labels.unsqueeze(1) == classes).to(logits.dtype)
    return logits.softmax(1)[:, 1:], truth, valid


def sigmoid_loss(logits: Tensor, labels: Tensor, structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Return binary cross-entropy plus Dice, one channel per structure; structures may overlap.

    Args:
        logits: (B, S, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
        structures: The classes of each structure, in the order of the channels.
    """
    probability, truth, valid = sigmoid_targets(logits, labels, structures)
    return sigmoid_entropy(logits, truth, valid) + dice_loss(probability, truth, valid)


def sigmoid_entropy(logits: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits and truth (B, S, H, W) over the valid pixels."""
    entropy = F.binary_cross_entropy_with_logits(
        logits, truth, weight=valid.to(logits.dtype), reduction="sum"
    )
    return entropy / (valid.sum() * logits.shape[1]).clamp(min=1)


def sigmoid_targets(
    logits: Tensor, labels: Tensor, structures: Mapping[str, Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the structures' probabilities, truth (both (B, S, H, W)) and valid pixels."""
    truth = structure_targets(labels, structures).to(logits.dtype)
    return logits.sigmoid(), truth, (labels != IGNORE).unsqueeze(1)


def targets(logits: Tensor, labels: Tensor, data: DataSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, truth (both (B, F, H, W)) and valid pixels (B, 1, H, W).

    F are the foreground classes of a softmax or the structures of a sigmoid.
    """
    if data.activation == "softmax":
        return softmax_targets(logits, labels.long())
    return sigmoid_targets(logits, labels, data.structure_classes())


def structure_targets(labels: Tensor, structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Return (B, S, H, W) bool: whether a pixel's class belongs to the structure."""
    channels = [
        torch.stack([labels == index for index in classes]).any(0)
        for classes in structures.values()
    ]
    return torch.stack(channels, dim=1)


def dice_loss(probability: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return 1 - (2 sum(p t) + e) / (sum p^2 + sum t^2 + e).

    The sums run over the batch, the channels and the valid pixels.
    """
    probability, truth = probability * valid, truth * valid
    overlap = 2 * (probability * truth).sum() + SMOOTH
    return 1 - overlap / (probability.square().sum() + truth.square().sum() + SMOOTH)


def mean_dice_loss(probability: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over the channels of 1 - (2 sum(p t) + e) / (sum p + sum t + e).

    The Dice loss of FedDG-ELCFS and SAML; the sums run over the batch and the valid pixels.
    """
    probability, truth = probability * valid, truth * valid
    axes = (0, 2, 3)
    overlap = 2 * (probability * truth).sum(axes) + SMOOTH
    return (1 - overlap / (probability.sum(axes) + truth.sum(axes) + SMOOTH)).mean()
