"""Published alternatives, reimplemented here for comparison.

Legend: K classes, A feature channels, N pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsgcg.common.metrics import Metrics


def einsum_loss(
    features: Tensor, labels: Tensor, mean: Tensor, covariance: Tensor, temperature: float
) -> Tensor:
    """Compute the formula literally: einsum('na,kab,nb->nk'), with autograd for the gradient."""
    quadratic = torch.einsum("na,kab,nb->nk", features, covariance, features) / (2 * temperature**2)
    linear = features @ mean.T / temperature
    positive = linear.gather(1, labels[:, None])[:, 0]
    return ((linear + quadratic).logsumexp(1) - positive).mean()


def gather_loss(
    features: Tensor, labels: Tensor, mean: Tensor, covariance: Tensor, temperature: float
) -> Tensor:
    """Gather Sigma[y] for every pixel (N x A x A) as ISDA does, and compute the cancelling term."""
    own = covariance[labels]
    positive = (features * mean[labels]).sum(1) / temperature
    own_quadratic = torch.bmm(features[:, None], torch.bmm(own, features[:, :, None]))[:, 0, 0] / (
        2 * temperature**2
    )
    others = torch.stack([(features @ sigma * features).sum(1) for sigma in covariance], 1) / (
        2 * temperature**2
    )
    logits = features @ mean.T / temperature + others
    log_p = (positive + own_quadratic) - logits.logsumexp(1)
    return (own_quadratic - log_p).mean()


def diagonal_loss(
    features: Tensor, labels: Tensor, mean: Tensor, covariance: Tensor, temperature: float
) -> Tensor:
    """Use only the diagonal of the covariance, as SePiCo does: two N x A by A x K products."""
    variances = covariance.diagonal(dim1=1, dim2=2)
    linear = features @ mean.T / temperature
    quadratic = features.pow(2).mm(variances.T) / (2 * temperature**2)
    return ((linear + quadratic).logsumexp(1) - linear.gather(1, labels[:, None])[:, 0]).mean()


def onehot_moments(
    features: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand features and one-hot labels to N x K x A and use one batched product, as ISDA does."""
    N, A = features.shape
    onehot = torch.zeros(N, num_classes).scatter_(1, labels[:, None], 1)
    expanded = features[:, None].expand(N, num_classes, A)
    mask = onehot[:, :, None].expand(N, num_classes, A)
    members = expanded.mul(mask)
    amount = mask.sum(0)
    amount[amount == 0] = 1
    mean = members.sum(0) / amount
    centred = members - mean.expand(N, num_classes, A).mul(mask)
    centred = centred.permute(1, 2, 0)
    covariance = torch.matmul(centred, centred.permute(0, 2, 1)) / amount[:, 0, None, None]
    return amount[:, 0], mean, covariance


def medpy_dice_and_asd(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return Dice and one-directional ASD by medpy, as RAM-DSIR does."""
    from medpy.metric import binary

    return binary.dc(prediction, truth), binary.asd(prediction, truth)


def medpy_four(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float, float, float]:
    """Return Dice, ASD in both directions and ASSD by medpy."""
    from medpy.metric import binary

    back = binary.asd(truth, prediction)
    return *medpy_dice_and_asd(prediction, truth), back, binary.assd(prediction, truth)


def medpy_metrics(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None
) -> Metrics:
    """Return all metrics by medpy, one call each; neither mask may be empty."""
    from medpy.metric import binary

    pair = prediction, truth
    pooled = binary.hd95(*pair, spacing)
    return Metrics(
        dice=binary.dc(*pair),
        asd=binary.asd(*pair, spacing),
        assd=binary.assd(*pair, spacing),
        hd95=pooled,
        hd95_max=pooled,  # medpy has no such metric; only the time matters here
        asd_reverse=binary.asd(truth, prediction, spacing),
        dice_smooth1=binary.dc(*pair),
    )
