"""ISDA: the expected loss of features that vary as those of their class do.

A pixel's feature is augmented by noise N(0, lambda_t Sigma_y) of its class, without drawing any:
the cross-entropy with raised logits is an upper bound of its expected value.

The classifier of the U-Net is a 3 x 3 convolution, so the logits of pixel i depend on the features
of its neighbours i + o. With independent noise at each pixel, class j's logit is raised by

    lambda_t / 2 * sum over o of (w_jo - w_yo)' Sigma_(label of i + o) (w_jo - w_yo)

and for a 1 x 1 classifier this is the published formula. With sigmoid outputs, structure s competes
with a logit of zero, and its logit is shifted away from the truth by lambda_t / 2 * sum over o of
w_so' Sigma w_so. Pixels that are ignored or outside the image have no noise.

Legend: B batch, C output channels, K classes, A feature channels, H, W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import (
    Loss,
    Source,
    sigmoid_entropy,
    softmax_entropy,
    structure_targets,
)
from fedsgcg.clients.methods.guidance import IGNORE, Guide
from fedsgcg.common.errors import fail


class Isda(Source):
    """ISDA: augments features along the global covariance of their class, in closed form.

    Formula: L = cross-entropy of logits z_j + lambda_t/2 (w_j - w_y)' Sigma_y (w_j - w_y), + Dice;
        lambda_t = lambda_0 t/T with the round t.
    Leaves: weights; count, mean and covariance of every class.
    Defaults: lambda_0 = 0.5, the published value with full covariances. Dice is ours, as in all
        methods here. The covariance is that of all sites in the previous round, not a running one.
    Source: Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, eqs. 6-8.
    """

    contrasts = True
    raw = True
    parts = ("loss_supervised", "loss_augmentation")

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the loss; without class statistics it is the supervised one."""
        (view,) = self.forward(batch)
        total, parts = self.supervised(batch, [view])
        guidance = guide.after(view.features, batch.labels) if guide is not None else None
        if guidance is None:
            return total, parts
        noise = guidance.covariance
        if self.plan.method.isda.covariance == "between":
            if guidance.between is None:
                return total, parts
            noise = guidance.between
        covariance = noise * guidance.active[:, None, None]
        share = self.round_number / self.plan.federation.rounds
        surplus = augmentation_surplus(
            view.logits,
            batch.labels,
            classifier(self.network).weight.float(),
            covariance,
            self.plan.method.isda.strength * share,
            None if self.plan.data.activation == "softmax" else self._structures(),
        )
        return total + surplus, parts | {"loss_augmentation": surplus.detach()}

    def _structures(self) -> dict[str, list[int]]:
        return self.plan.data.structure_classes()


def classifier(network: nn.Module) -> nn.Conv2d:
    """Return the convolution from the penultimate map to the logits.

    Raises:
        FedsgcgError: TRN-320 for a network without one.
    """
    head = getattr(getattr(network, "decoder", None), "head", None)
    if not isinstance(head, nn.Conv2d):
        raise fail(
            "TRN-320",
            found=f"{type(network).__name__} without a convolution decoder.head",
            expected="a network whose logits are a convolution of its feature map",
            action="use network=unet or another method",
        )
    return head


def augmentation_surplus(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    covariance: Tensor,
    strength: float,
    structures: dict[str, list[int]] | None = None,
) -> Tensor:
    """Return the cross-entropy with raised logits minus the cross-entropy without; not negative.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) class indices, 255 = ignore.
        weight: (C, A, k, k) of the classifier, k odd; receives gradient.
        covariance: (K, A, A), zero for a class without noise.
        strength: lambda_t.
        structures: Classes of each structure for sigmoid outputs; None for softmax over K classes.
    """
    labels = labels.long()
    noise = class_maps(labels, covariance.shape[0], logits.dtype)
    if structures is not None:
        truth = structure_targets(labels, structures).to(logits.dtype)
        valid = (labels != IGNORE).unsqueeze(1)
        raised = quadratic_maps(noise, weight, covariance) * (strength / 2)
        entropy = sigmoid_entropy(logits - (2 * truth - 1) * raised, truth, valid)
        return entropy - sigmoid_entropy(logits, truth, valid)
    B, C, H, W = logits.shape
    difference = (weight[None] - weight[:, None]).flatten(0, 1)  # (C * C, A, k, k), from y to j
    quadratic = quadratic_maps(noise, difference, covariance).view(B, C, C, H, W)
    own = labels.where(labels != IGNORE, 0).view(B, 1, 1, H, W).expand(B, 1, C, H, W)
    raised = logits + strength / 2 * quadratic.gather(1, own).squeeze(1)
    return softmax_entropy(raised, labels) - softmax_entropy(logits, labels)


def class_maps(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return (B, K, H, W), 1 where a pixel has the class."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    return (labels.unsqueeze(1) == classes).to(dtype)


def quadratic_maps(noise: Tensor, vectors: Tensor, covariance: Tensor) -> Tensor:
    """Return the variance of a convolution of independent noise at each pixel, (B, V, H, W).

    Args:
        noise: (B, K, H, W), 1 where a pixel's noise is that of a class.
        vectors: (V, A, k, k), the convolution.
        covariance: (K, A, A) of the noise of each class.
    """
    kernel = torch.einsum("vahw,kab,vbhw->vkhw", vectors, covariance, vectors)
    return F.conv2d(noise, kernel, padding=kernel.shape[-1] // 2)
