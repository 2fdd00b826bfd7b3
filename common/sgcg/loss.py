"""The SgCG loss: every pixel feature against the Gaussians of all classes (SgCG eq. 11).

    z_k = q.mu_k / tau + q' Sigma_k q / (2 tau^2)            L = logsumexp_k z_k - q.mu_y / tau
    dL/dq = (sum_k p_k mu_k - mu_y) / tau + (sum_k p_k Sigma_k) q / tau^2,   p = softmax(z)

The derivation is in docs/explanation/sgcg.md, "The closed form". The positive quadratic term
cancels in the gradient, so one product Sigma_k q serves both loss and gradient. Both are computed
in the forward pass, chunk by chunk, and only the gradient (N, A) is kept: memory does not grow with
K.

Legend: K classes incl. background, A feature channels, N pixels, n pixels of a chunk, q features,
tau temperature.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedsgcg.common.sgcg.moments import (
    check_finite,
    check_labels,
    check_pixels,
    check_shape,
    class_moments,
    reduce_labels,
    triton_kernels,
)
from fedsgcg.common.sgcg.quadratics import QUADRATICS

__all__ = ["class_moments", "reduce_labels", "sgcg_loss"]

CovarianceForm = Literal["full", "diagonal", "none"]
Reduction = Literal["mean", "none"]

CHUNK_ELEMENTS: Final = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of the products Sigma_k q held at a time: 4 MiB fit a CPU cache, 256 MiB fill a GPU."""

MAX_KERNEL_CHANNELS: Final = 128
"""Most channels of the Triton kernel: wider tiles of Sigma_k do not fit, and GEMMs are as fast."""

CHUNK_PIXELS: Final = (256, 4096)
"""Fewest and most pixels of a chunk on a CPU.

With fewer the matrix product is inefficient, with more the chunk exceeds the cache.
"""


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
    unit_norm: bool = False,
) -> Tensor:
    """Compute the SgCG loss of labelled features against constant class Gaussians (SgCG eq. 11).

    Computes in float32 (float64 for float64 features) regardless of autocast. The prototypes are
    constants, and the gradient cannot be differentiated again. On a GPU with Triton one kernel
    computes loss and gradient (`common.sgcg.kernels`), unless the features are float64 or have more
    than MAX_KERNEL_CHANNELS channels, or the covariance is not `full`.

    Args:
        features: (N, A) floats.
        labels: (N,) integers in [0, K), or `ignore_index`.
        mean: (K, A) float32 or float64, on the device of the features.
        covariance: (K, A, A) symmetric; `diagonal` reads only the diagonal, `none` nothing.
        temperature: tau, above zero.
        active: (K,) bool, the classes to compare with; None = all. Pixels of others are dropped.
        ignore_index: Label of pixels to drop.
        reduction: `mean` over the pixels that were not dropped, or `none`.
        covariance_form: `full`, `diagonal`, or `none` (prototype cross-entropy).
        unit_norm: First divide the features of each pixel by their length.

    Returns:
        A scalar, or (N,) with zeros at dropped pixels for `none`. Without any pixel: 0, connected
        to the graph.

    Raises:
        ValueError: Shapes, types or arguments that are not valid; on a CPU also labels out of range
            and values that are not finite. On a GPU, where this check would have to wait for the
            device, they give a loss that is not finite, or an index error.
    """
    _check_loss(features, labels, mean, covariance, temperature, active, reduction, covariance_form)
    check_labels(labels, mean.shape[0], ignore_index)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    centre, spread = mean.detach().to(dtype), covariance.detach().to(dtype)
    if active is not None:
        active = active.to(features.device, non_blocking=True)
    if covariance_form == "full" and triton_kernels(features, widest=MAX_KERNEL_CHANNELS):
        one_pass: Tensor = _KernelLoss.apply(  # type: ignore[no-untyped-call]
            features,
            labels,
            centre,
            spread,
            active,
            temperature,
            ignore_index,
            unit_norm,
            reduction,
        )
        return one_pass
    if unit_norm:
        features = functional.normalize(features.to(dtype), dim=1, eps=1e-12)
    classes = labels.long()
    kept = classes != ignore_index
    classes = torch.where(kept, classes, 0)
    if active is not None:
        kept = kept & active[classes]
    weight = kept.to(dtype)
    if reduction == "mean":
        weight /= kept.sum().clamp(min=1)
    losses: Tensor = _PixelLoss.apply(  # type: ignore[no-untyped-call]
        features, classes, weight, centre, spread, active, temperature, covariance_form, reduction
    )
    if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
        check_finite(features=features, mean=mean, covariance=covariance)
    return losses


class _PixelLoss(torch.autograd.Function):
    """Weighted loss of every pixel, or their sum; the forward pass also computes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        mean: Tensor,
        covariance: Tensor,
        active: Tensor | None,
        temperature: float,
        form: CovarianceForm,
        reduction: Reduction,
    ) -> Tensor:
        gradient = _make_gradient(ctx, features)
        losses = torch.empty_like(weight)
        with torch.autocast(features.device.type, enabled=False):
            _fill(
                losses,
                gradient,
                features,
                labels,
                weight,
                mean,
                covariance,
                active,
                temperature,
                form,
            )
        return losses if reduction == "none" else losses.sum(dtype=torch.float64).to(losses.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, outputs[0]), *[None] * 8


class _KernelLoss(torch.autograd.Function):
    """As `_PixelLoss`, by one Triton kernel.

    The number of pixels is known only after the kernel, so the backward pass divides by it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        mean: Tensor,
        covariance: Tensor,
        active: Tensor | None,
        temperature: float,
        ignore_index: int,
        unit_norm: bool,
        reduction: Reduction,
    ) -> Tensor:
        from fedsgcg.common.sgcg import kernels

        gradient = _make_gradient(ctx, features)
        losses, number = kernels.pixel_losses(
            features if features.stride(1) == 1 else features.contiguous(),
            labels.contiguous(),
            mean.contiguous(),
            covariance.contiguous(),
            active,
            temperature=temperature,
            ignore_index=ignore_index,
            unit_norm=unit_norm,
            gradient=gradient,
        )
        ctx.number = None
        if reduction == "none":
            return losses
        ctx.number = number.clamp(min=1)
        total: Tensor = losses.sum(dtype=torch.float64) / ctx.number
        return total.to(losses.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0] if ctx.number is None else outputs[0] / ctx.number
        return _scaled(ctx, scale), *[None] * 8


def _make_gradient(ctx: Any, features: Tensor) -> Tensor | None:
    """Allocate the gradient and save it for the backward pass; None if it is not needed."""
    ctx.dtype = features.dtype
    if not ctx.needs_input_grad[0]:
        return None
    # In float16, 1 / N of a gradient underflows before the loss scale is applied.
    dtype = torch.float32 if features.dtype == torch.float16 else features.dtype
    gradient = torch.empty(features.shape, dtype=dtype, device=features.device)
    ctx.save_for_backward(gradient)
    return gradient


def _scaled(ctx: Any, scale: Tensor) -> Tensor:
    """Multiply the saved gradient by the incoming one, () or (N,), in place unless kept."""
    if torch.is_grad_enabled():  # only with create_graph=True, which would silently give zero
        raise RuntimeError(
            "the gradient of sgcg_loss cannot be differentiated again (create_graph=True)"
        )
    gradient: Tensor = ctx.saved_tensors[0]
    scale = scale[:, None] if scale.ndim else scale
    if _graph_is_kept():
        gradient = gradient * scale
    elif scale.ndim or scale.device.type != "cpu" or scale.item() != 1:
        gradient.mul_(scale)
    return gradient.to(ctx.dtype)


def _graph_is_kept() -> bool:
    """Whether the backward pass retains its graph; True if this torch cannot tell."""
    answer = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if answer is None else bool(answer())


def _fill(
    losses: Tensor,
    gradient: Tensor | None,
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    active: Tensor | None,
    temperature: float,
    form: CovarianceForm,
) -> None:
    """Write the losses of all pixels to `losses` (N,) and their gradients to `gradient`."""
    n = _chunk_pixels(features.device.type, mean.shape)
    near = mean / temperature
    far = mean * temperature
    share = weight / temperature**2
    pull = share.neg()[None]
    hidden = None
    if active is not None:
        hidden = mean.new_zeros(active.shape).masked_fill_(
            ~active, torch.finfo(mean.dtype).min / 2
        )[:, None]
    quadratic = QUADRATICS[form](covariance, temperature)
    chunks = max(1, -(-features.shape[0] // n))
    targets = [None] * chunks if gradient is None else torch.split(gradient, n)
    # The views of all chunks are made at once: one by one they would cost as much as the arithmetic
    # of a small chunk.
    rows = (torch.split(tensor, n) for tensor in (features, weight, share, losses))
    columns = (torch.split(tensor, n, 1) for tensor in (labels[None], pull))
    for pixels, kept, scale, loss, label, minus, target in zip(
        *rows, *columns, targets, strict=True
    ):
        q = pixels.to(mean.dtype)
        half = quadratic.evaluate(q)  # (K, n): q' Sigma_k q / (2 tau^2)
        logits = torch.addmm(half, near, q.T)
        log_p = (logits if hidden is None else logits.add_(hidden)).log_softmax(0)
        # logsumexp z - q.mu_y / tau as a sum of two non-negative terms, so that nothing cancels.
        torch.mul(half.sub_(log_p).gather(0, label)[0], kept, out=loss)
        if target is not None:
            p = log_p.exp_().mul_(scale)
            out = target if target.dtype == q.dtype else torch.empty_like(q)
            g = quadratic.gradient(p, q, out)
            g.addmm_(p.scatter_add_(0, label, minus).T, far)
            if g is not target:
                target.copy_(g)


def _chunk_pixels(device: str, shape: torch.Size) -> int:
    pixels = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // math.prod(shape)
    if device != "cpu":
        return max(pixels, 1)
    fewest, most = CHUNK_PIXELS
    return min(max(pixels, fewest), most)


def _check_loss(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    covariance: Tensor,
    temperature: float,
    active: Tensor | None,
    reduction: str,
    form: str,
) -> None:
    check_pixels(features, labels)
    A = features.shape[1]
    check_shape("mean", mean, (None, A))
    check_shape("covariance", covariance, (mean.shape[0], A, A))
    for name, tensor in (("mean", mean), ("covariance", covariance)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: found {tensor.dtype}, expected float32 or float64")
    if active is not None:
        check_shape("active", active, (mean.shape[0],))
        if active.dtype != torch.bool:
            raise ValueError(f"active: found {active.dtype}, expected bool")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: found {temperature}, expected a finite number above zero")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: found {reduction!r}, expected 'mean' or 'none'")
    if form not in QUADRATICS:
        raise ValueError(f"covariance_form: found {form!r}, expected one of {sorted(QUADRATICS)}")
