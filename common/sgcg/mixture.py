"""The SgCG loss against a mixture of every site's Gaussians in place of one Gaussian of a class.

    z_k = logsumexp_s [ log w_sk + q.mu_sk / tau + q' Sigma_sk q / (2 tau^2) ]
    L   = logsumexp_k z_k - q.mu_y / tau,    mu_y = sum_s w_sy mu_sy

The derivation is that of `common.sgcg.loss` with the moment generating function of a mixture. With
equal Gaussians at all sites, or one site, both losses agree. The gradient, with p the softmax over
all S K components, is sum_c p_c (mu_c / tau + Sigma_c q / tau^2) - mu_y / tau.

Legend: S sites, K classes incl. background, A feature channels, N pixels, tau temperature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedsgcg.common.sgcg.loss import CHUNK_ELEMENTS, CHUNK_PIXELS, CovarianceForm
from fedsgcg.common.sgcg.moments import check_labels, check_pixels, check_shape
from fedsgcg.common.sgcg.quadratics import QUADRATICS


def mixture_losses(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    *,
    temperature: float,
    active: Tensor,
    ignore_index: int = 255,
    covariance_form: CovarianceForm = "full",
    unit_norm: bool = False,
) -> Tensor:
    """Compute the loss of every pixel against constant mixtures.

    Args:
        features: (N, A) floats.
        labels: (N,) integers in [0, K), or `ignore_index`.
        weight: (S, K) share of each site in a class, not negative, with sum 1 over the sites of an
            active class.
        mean: (S, K, A).
        covariance: (S, K, A, A) symmetric.
        temperature: tau, above zero.
        active: (K,) bool, the classes to compare with; pixels of others are dropped.
        ignore_index: Label of pixels to drop.
        covariance_form: `full`, `diagonal`, or `none`.
        unit_norm: First divide the features of each pixel by their length.

    Returns:
        (N,) with zeros at dropped pixels, in float32, or float64 for float64 features. Its gradient
        cannot be differentiated again.

    Raises:
        ValueError: Shapes or values that are not valid.
    """
    check_pixels(features, labels)
    S, K, A = mean.shape
    check_shape("features", features, (None, A))
    check_shape("weight", weight, (S, K))
    check_shape("covariance", covariance, (S, K, A, A))
    check_shape("active", active, (K,))
    check_labels(labels, K, ignore_index)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: found {temperature}, expected a finite number above zero")
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    q = features.to(dtype)
    if unit_norm:
        q = functional.normalize(q, dim=1, eps=1e-12)
    known = labels != ignore_index
    classes = torch.where(known, labels.long(), 0)
    kept = (known & active[classes]).to(dtype)
    share = weight.to(dtype)
    components = mean.to(dtype).flatten(0, 1)
    # A component without weight or of an inactive class is left out of the sum.
    present = (share > 0) & active
    log_share = torch.where(present, share, 1.0).log()
    log_share = log_share.masked_fill(~present, torch.finfo(dtype).min / 2).flatten()
    centre = torch.einsum("sk,ska->ka", share, mean.to(dtype))
    losses: Tensor = _MixtureLosses.apply(  # type: ignore[no-untyped-call]
        q,
        classes,
        kept,
        log_share,
        components,
        covariance.to(dtype).flatten(0, 1),
        centre,
        temperature,
        covariance_form,
    )
    return losses


class _MixtureLosses(torch.autograd.Function):
    """Loss of every pixel; the forward pass also computes the gradient, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        classes: Tensor,
        kept: Tensor,
        log_share: Tensor,
        mean: Tensor,
        covariance: Tensor,
        centre: Tensor,
        temperature: float,
        form: CovarianceForm,
    ) -> Tensor:
        losses, gradient = torch.empty_like(kept), torch.empty_like(q)
        quadratic = QUADRATICS[form](covariance, temperature)
        near, goal = mean / temperature, centre / temperature
        n = _chunk_pixels(q.device.type, mean.shape)
        with torch.autocast(q.device.type, enabled=False):
            for start in range(0, len(q), n):
                part = slice(start, start + n)
                pixels, own, weight = q[part], goal[classes[part]], kept[part]
                logits = torch.addmm(quadratic.evaluate(pixels), near, pixels.T)
                logits += log_share[:, None]
                top = logits.logsumexp(0)
                losses[part] = (top - (pixels * own).sum(1)) * weight
                p = (logits - top).exp_() * weight
                pull = quadratic.gradient(p / temperature**2, pixels, torch.empty_like(pixels))
                gradient[part] = pull + p.T @ near - own * weight[:, None]
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True, which would silently give zero
            raise RuntimeError(
                "the gradient of mixture_losses cannot be differentiated again (create_graph=True)"
            )
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None], *[None] * 8


def _chunk_pixels(device: str, components: torch.Size) -> int:
    pixels = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // max(math.prod(components), 1)
    fewest, most = CHUNK_PIXELS
    return max(pixels, 1) if device != "cpu" else min(max(pixels, fewest), most)
