"""Triton kernels of the SgCG loss and the class moments for a GPU.

Triton is optional: `common.sgcg.loss` and `common.sgcg.moments` import this module only for tensors
on a GPU and only if Triton is installed. Nothing here makes the host wait for the device, and no
sum depends on the order in which programs run. Tests run the same kernels on a CPU in Triton's
interpreter and compare them with the CPU implementation.

Legend: K classes incl. background, A feature channels, N pixels, WIDTH = A padded to a power of two
(at least 16, as a product of tiles requires), ROWS pixels per tile.
"""

# Triton reads annotations of kernels: no `from __future__ import annotations` here.
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

LOSS_ROWS: Final = {16: 128, 32: 128, 64: 64, 128: 64}
"""Pixels per tile by WIDTH."""

MOMENT_ROWS: Final = 64
"""Pixels per tile of moments."""

MOMENT_COLUMNS: Final = 64
"""Channels per tile of moments."""

PART_ROWS: Final = 4096
"""Pixels that one program sums up."""

PART_ELEMENTS: Final = 1 << 21
"""Largest number of elements of the partial scatters, in float64 (16 MiB)."""


def pixel_losses(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    covariance: Tensor,
    active: Tensor | None,
    *,
    temperature: float,
    ignore_index: int,
    unit_norm: bool,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient of every pixel in one pass over the features (SgCG eq. 11).

    The classes are visited one after the other with a running maximum, as in a streaming softmax,
    so that the products and logits of all classes are never held at once.

    Args:
        features: (N, A) float32, bfloat16 or float16, A at most 128; the channels of a pixel
            adjacent.
        labels: (N,) integers in [0, K), or `ignore_index`.
        mean: (K, A) float32, contiguous.
        covariance: (K, A, A) float32, contiguous and symmetric.
        active: (K,) bool, or None = all.
        temperature: tau.
        ignore_index: Label of pixels to drop.
        unit_norm: Whether each pixel's features are first divided by their length; the gradient is
            with respect to `features`.
        gradient: (N, A) contiguous, receives dL_i / df_i of every pixel (zero where dropped), or
            None.

    Returns:
        Losses (N,) float32, zero where dropped, and the number of pixels kept, () int64.
    """
    N, A = features.shape
    K = mean.shape[0]
    width = max(16, triton.next_power_of_2(A))
    programs = triton.cdiv(N, LOSS_ROWS[width])
    losses = features.new_empty(N, dtype=torch.float32)
    kept = torch.zeros(max(programs, 1), dtype=torch.int32, device=features.device)
    on = features.new_ones(K, dtype=torch.int8) if active is None else active.view(torch.int8)
    if N:
        _loss_kernel[(programs,)](
            features,
            labels,
            mean,
            covariance,
            on,
            losses,
            kept,
            losses if gradient is None else gradient,
            N,
            K,
            features.stride(0),
            1 / temperature,
            ignore_index,
            A=A,
            WIDTH=width,
            ROWS=LOSS_ROWS[width],
            UNIT_NORM=unit_norm,
            GRADIENT=gradient is not None,
            PRECISION=_product_precision(features.device),
            num_warps=8 if width >= 64 else 4,
        )
    return losses, kept.sum()


def class_moments(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute count, mean and scatter of every class in two passes: means, then centred products.

    Tiles of MOMENT_ROWS pixels are summed and multiplied in float32 and added up in float64.
    Whatever the order of additions within a tile, |error of scatter[a, b]| <= 1e-5 s_a s_b with
    s_a^2 = scatter[a, a], for a class whose mean is at most 1e4 standard deviations away from zero.
    The parts of the bound: 64 additions that tensor cores may truncate instead of round (64 *
    2^-23), products of three TF32 parts (3 * 2^-22), the subtraction of the shift (2 * 2^-24), and
    another 3e-7 for a float32 shift that misses the mean by 0.04 s_a; together 8.9e-6.

    Args:
        features: (N, A) float32, bfloat16 or float16; the channels of a pixel adjacent.
        labels: (N,) integers in [0, K), or `ignore_index`.
        num_classes: K.
        ignore_index: Label of pixels to leave out.

    Returns:
        count (K,) int64, mean (K, A) and scatter (K, A, A) float64; zero where absent.
    """
    N, A = features.shape
    K = num_classes
    parts = max(1, min(triton.cdiv(N, PART_ROWS), PART_ELEMENTS // (K * A * A)))
    columns = triton.cdiv(A, MOMENT_COLUMNS)
    first = features.new_empty(parts, K, A, dtype=torch.float64)
    second = features.new_empty(parts, K, A, A, dtype=torch.float64)
    counts = torch.empty(parts, K, dtype=torch.int64, device=features.device)
    sizes: dict[str, Any] = {
        "A": A,
        "ROWS": MOMENT_ROWS,
        "COLUMNS": MOMENT_COLUMNS if A > 32 else max(16, triton.next_power_of_2(A)),
    }
    shape = N, K, triton.cdiv(triton.cdiv(N, parts), MOMENT_ROWS), features.stride(0), ignore_index
    _sums_kernel[(parts, K, columns)](features, labels, first, counts, *shape, **sizes)
    count = counts.sum(0)
    number = count.clamp(min=1)[:, None].double()
    shift = (first.sum(0) / number).float()
    _scatter_kernel[(parts, K, columns * columns)](
        features,
        labels,
        shift,
        first,
        second,
        *shape,
        **sizes,
        PRECISION=_product_precision(features.device),
    )
    offset = first.sum(0) / number
    scatter = second.sum(0) - number[:, :, None] * offset[:, :, None] * offset[:, None, :]
    return count, shift + offset, scatter


def _product_precision(device: torch.device) -> str:
    """Return `tf32x3`, which keeps float32's precision on tensor cores, or `ieee` without them."""
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "tf32x3" if tensor_cores else "ieee"


@triton.jit
def _loss_kernel(
    features: tl.tensor,
    labels: tl.tensor,
    mean: tl.tensor,
    covariance: tl.tensor,
    active: tl.tensor,
    losses: tl.tensor,
    kept: tl.tensor,
    gradient: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    inverse: tl.tensor,
    ignore: tl.tensor,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < N)[:, None] & (column < A)[None, :]
    q = tl.load(features + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    label = tl.load(labels + row, mask=row < N, other=ignore).to(tl.int64)
    label = tl.where((row < N) & (label != ignore), label, -1)
    length = tl.sqrt(tl.sum(q * q, 1))
    if UNIT_NORM:
        q = q / tl.maximum(length, 1e-12)[:, None]

    top = tl.full([ROWS], -3.4e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # of exp(z_k - top)
    own = tl.zeros([ROWS], tl.float32)  # z_y
    half_own = tl.zeros([ROWS], tl.float32)  # q' Sigma_y q / (2 tau^2)
    weight = tl.zeros([ROWS], tl.float32)  # 1 for pixels that are kept
    pull = tl.zeros([ROWS, WIDTH], tl.float32)  # sum_k exp(z_k - top) dz_k/dq
    goal = tl.zeros([ROWS, WIDTH], tl.float32)  # mu_y / tau
    for k in range(K):
        if tl.load(active + k) != 0:
            mu = tl.load(mean + k * A + column, mask=column < A, other=0.0)[None, :] * inverse
            square = (column < A)[:, None] & (column < A)[None, :]
            sigma = tl.load(
                covariance + (k * A + column[:, None]) * A + column[None, :], mask=square, other=0.0
            )
            slope = tl.dot(q, sigma, input_precision=PRECISION) * (inverse * inverse)
            half = 0.5 * tl.sum(slope * q, 1)
            z = tl.sum(q * mu, 1) + half
            higher = tl.maximum(top, z)
            fade, share = tl.exp(top - higher), tl.exp(z - higher)
            total = total * fade + share
            top = higher
            mine = label == k
            own = tl.where(mine, z, own)
            half_own = tl.where(mine, half, half_own)
            weight = tl.where(mine, 1.0, weight)
            if GRADIENT:
                pull = pull * fade[:, None] + share[:, None] * (slope + mu)
                goal = tl.where(mine[:, None], mu, goal)

    total = tl.where(total == 0.0, 1.0, total)  # no class is active
    # A sum of two non-negative terms, so nothing cancels; multiplying by the weight keeps a NaN.
    tl.store(losses + row, (half_own + ((top - own) + tl.log(total))) * weight, mask=row < N)
    tl.store(kept + tl.program_id(0), tl.sum(weight, 0).to(tl.int32))
    if GRADIENT:
        g = (pull / total[:, None] - goal) * weight[:, None]
        if UNIT_NORM:
            along = tl.where(length > 1e-12, tl.sum(g * q, 1), 0.0)
            g = (g - along[:, None] * q) / tl.maximum(length, 1e-12)[:, None]
        tl.store(
            gradient + row[:, None] * A + column[None, :],
            g.to(gradient.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _sums_kernel(
    features: tl.tensor,
    labels: tl.tensor,
    first: tl.tensor,
    counts: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    steps: tl.tensor,
    stride: tl.tensor,
    ignore: tl.tensor,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    part, k = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    number = tl.zeros([ROWS], tl.int32)
    for step in range(steps):
        row = (part.to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        label = tl.load(labels + row, mask=row < N, other=ignore).to(tl.int64)
        mine = (label == k) & (label != ignore) & (row < N)
        wanted = mine[:, None] & (column < A)[None, :]
        x = tl.load(features + row[:, None] * stride + column[None, :], mask=wanted, other=0.0).to(
            tl.float32
        )
        total += tl.sum(x, 0).to(tl.float64)
        number += mine.to(tl.int32)
    place = part * K + k
    tl.store(first + place * A + column, total, mask=column < A)
    if tl.program_id(2) == 0:
        tl.store(counts + place, tl.sum(number.to(tl.int64), 0))


@triton.jit
def _scatter_kernel(
    features: tl.tensor,
    labels: tl.tensor,
    shift: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    steps: tl.tensor,
    stride: tl.tensor,
    ignore: tl.tensor,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    part, k = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(A, COLUMNS)
    upper = tl.program_id(2) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    lower = tl.program_id(2) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    upper_shift = tl.load(shift + k * A + upper, mask=upper < A, other=0.0)
    lower_shift = tl.load(shift + k * A + lower, mask=lower < A, other=0.0)
    total = tl.zeros([COLUMNS], tl.float64)
    products = tl.zeros([COLUMNS, COLUMNS], tl.float64)
    for step in range(steps):
        row = (part.to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        label = tl.load(labels + row, mask=row < N, other=ignore).to(tl.int64)
        mine = ((label == k) & (label != ignore) & (row < N))[:, None]
        left, right = mine & (upper < A)[None, :], mine & (lower < A)[None, :]
        x = tl.load(features + row[:, None] * stride + upper[None, :], mask=left, other=0.0).to(
            tl.float32
        )
        y = tl.load(features + row[:, None] * stride + lower[None, :], mask=right, other=0.0).to(
            tl.float32
        )
        x = tl.where(left, x - upper_shift[None, :], 0.0)
        y = tl.where(right, y - lower_shift[None, :], 0.0)
        products += tl.dot(tl.trans(x), y, input_precision=PRECISION).to(tl.float64)
        total += tl.sum(x, 0).to(tl.float64)
    place = part.to(tl.int64) * K + k
    square = (upper < A)[:, None] & (lower < A)[None, :]
    tl.store(second + (place * A + upper[:, None]) * A + lower[None, :], products, mask=square)
    if tl.program_id(2) % tiles == 0:
        tl.store(first + place * A + upper, total, mask=upper < A)
