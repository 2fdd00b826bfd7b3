"""The SgCG loss: every pixel feature against the Gaussians of all classes, in closed form (methods.md 1.3).

    z_k = q.mu_k / tau + q' Sigma_k q / (2 tau^2)            L = logsumexp_k z_k - q.mu_y / tau
    dL/dq = (sum_k p_k mu_k - mu_y) / tau + (sum_k p_k Sigma_k) q / tau^2,   p = softmax(z)

The positive quadratic term cancels (methods.md 1.7), so that one product q [Sigma_1 | ... | Sigma_K] serves loss and
gradient alike. Both are made chunk by chunk in the forward pass; only the gradient (N, A) is kept, whatever K.

Legend: K classes incl. background, A feature channels, N pixels, n pixels of a chunk, q features, tau temperature.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

CovarianceForm = Literal["full", "diagonal", "none"]
Reduction = Literal["mean", "none"]


def sgcg_loss(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    covariance: Tensor,
    *,
    temperature: float,
    active: Tensor | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    covariance_form: CovarianceForm = "full",
) -> Tensor:
    """Reference form, replaced below."""
    keep = labels != ignore_index
    q = features.float() if features.dtype != torch.float64 else features
    mu, sigma = mean.to(q) / temperature, covariance.to(q) / temperature**2
    z = q @ mu.T
    linear = z
    if covariance_form == "full":
        z = z + 0.5 * torch.einsum("na,kab,nb->nk", q, sigma, q)
    elif covariance_form == "diagonal":
        z = z + 0.5 * (q * q) @ sigma.diagonal(dim1=1, dim2=2).T
    on = torch.ones(mean.shape[0], dtype=torch.bool, device=q.device) if active is None else active.to(q.device)
    z = z.masked_fill(~on, torch.finfo(z.dtype).min / 2)
    safe = torch.where(keep, labels, 0).long()
    keep = keep & on[safe]
    loss = torch.where(keep, z.logsumexp(1) - linear.gather(1, safe[:, None])[:, 0], 0)
    return loss if reduction == "none" else loss.sum() / keep.sum().clamp(min=1)


def class_moments(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> tuple[Tensor, Tensor, Tensor]:
    """Reference form, replaced below."""
    x = features.detach().double()
    A = x.shape[1]
    count = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
    mean = torch.zeros(num_classes, A, dtype=torch.float64, device=x.device)
    scatter = torch.zeros(num_classes, A, A, dtype=torch.float64, device=x.device)
    for k in range(num_classes):
        rows = x[(labels == k) & (labels != ignore_index)]
        if len(rows):
            count[k], mean[k] = len(rows), rows.mean(0)
            scatter[k] = (rows - mean[k]).T @ (rows - mean[k])
    return count, mean, scatter


def reduce_labels(labels: Tensor, factor: int, num_classes: int, majority: float = 0.75, ignore_index: int = 255) -> Tensor:
    """Reference form, replaced below."""
    B, H, W = labels.shape
    onehot = torch.where(labels == ignore_index, num_classes, labels.long())
    onehot = torch.nn.functional.one_hot(onehot, num_classes + 1).permute(0, 3, 1, 2).float()
    share, winner = torch.nn.functional.avg_pool2d(onehot, factor).max(1)
    return torch.where((share < majority) | (winner == num_classes), ignore_index, winner).to(labels.dtype)
