"""Class moments of a batch on its own device, and label maps at the size of a feature map (methods.md 1.2, 1.4, 1.9).

`common.statistics` pools what is counted here, in NumPy; this module is the part that runs where the features are.

Legend: K classes incl. background, A feature channels, N pixels, B batch, H, W height and width, f reduction factor.
"""

from __future__ import annotations

import importlib.util
from typing import Final

import torch
from torch import Tensor

BLOCK_ELEMENTS: Final = 1 << 17
"""Numbers of a block (1 MiB of float64) that is gathered, shifted and multiplied while it is in the cache."""

BLOCK_ROWS: Final = 8192
"""Most rows of a block, whatever their width."""

SHIFT_ROWS: Final = 256
"""Rows of a class whose mean serves as the class's shift."""

_TRITON: Final = importlib.util.find_spec("triton") is not None

MASK_ELEMENTS: Final = 1 << 23
"""Numbers of a chunk of features held in float64 on a GPU (64 MiB)."""


def class_moments(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute count, mean and scatter of every class of a batch, without gradient (methods.md 1.2 and 1.9).

    On a CPU the rows are visited class by class in blocks, about a shift near the class's mean, in float64 throughout.
    On a GPU, two passes without a host wait: Triton kernels (`common.sgcg.kernels`), or masked float64 products for
    float64 features and where there is no Triton.

    Promised in whatever order a library adds, with s_a^2 the class's scatter[a, a]:

    - in float64 (CPU and masked form) |error of scatter[a, b]| <= 1e-8 s_a s_b for a class of up to a million pixels,
      however far its mean is from zero. Sums of m terms err by at most m 2^-53 of the sum of absolute values; m is 8192
      within a block plus 123 blocks. The absolute values sum to at most (1 + n / SHIFT_ROWS) s_a s_b about a shift
      that is the mean of rows of the class. Together 8315 * 3907 * 2^-53 = 3.6e-9;
    - in the Triton kernels <= 1e-5 s_a s_b, derived in `common.sgcg.kernels.class_moments`.

    Args:
        features: (N, A) floats.
        labels: (N,) integers in [0, K), or `ignore_index`.
        num_classes: K.
        ignore_index: Label of pixels to leave out.

    Returns:
        count (K,) int64, mean (K, A) and scatter (K, A, A) float64, on the device of the features; zero where absent.

    Raises:
        ValueError: Shapes or types that do not fit; on a CPU also labels out of range and features that are not finite.
    """
    check_pixels(features, labels)
    check_labels(labels, num_classes, ignore_index)
    rows = features.detach()
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if triton_kernels(rows):
            moments = _moments_by_kernel
        else:
            moments = _moments_by_class if rows.device.type == "cpu" else _moments_by_mask
        count, mean, scatter = moments(rows, labels, num_classes, ignore_index)
        scatter = 0.5 * (scatter + scatter.mT)
    if rows.device.type == "cpu" and not bool(torch.isfinite(scatter).all()):
        check_finite(features=features)
    return count, mean, scatter


def reduce_labels(
    labels: Tensor, factor: int, num_classes: int, majority: float = 0.75, ignore_index: int = 255
) -> Tensor:
    """Bring a label map to the size of a feature map that is `factor` times smaller (methods.md 1.4).

    Args:
        labels: (B, H, W) integers in [0, K), or `ignore_index`; H and W multiples of `factor`.
        factor: Side of the square of pixels that becomes one.
        num_classes: K.
        majority: Share that the most frequent label must reach; "ignore" counts as a label of its own.
        ignore_index: Label of pixels to ignore, and of squares without a majority.

    Returns:
        (B, H / factor, W / factor) of the same type.

    Raises:
        ValueError: A map whose sides are not multiples of `factor`, a majority outside [0, 1], labels out of range.
    """
    if labels.ndim != 3 or factor < 1 or labels.shape[1] % factor or labels.shape[2] % factor:
        raise ValueError(
            f"labels: found shape {tuple(labels.shape)}, expected (B, H, W), multiples of factor={factor}"
        )
    if not 0 <= majority <= 1:
        raise ValueError(f"majority: found {majority}, expected a share in [0, 1]")
    check_labels(labels, num_classes, ignore_index)
    B, H, W = labels.shape
    squares = labels.reshape(B, H // factor, factor, W // factor, factor)
    ignored = squares == ignore_index
    most = ignored.sum((2, 4))
    winner = torch.full_like(most, ignore_index)
    # One class at a time keeps the memory at one map; of equals the first class wins, as an arg-max over classes would.
    for k in reversed(range(num_classes)):
        share = ((squares == k) & ~ignored).sum((2, 4))
        ahead = share >= most
        winner = torch.where(ahead, k, winner)
        most = torch.where(ahead, share, most)
    return winner.masked_fill_(most < majority * factor**2, ignore_index).to(labels.dtype)


def _moments_by_class(
    rows: Tensor, labels: Tensor, K: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.where(labels == ignore_index, K, labels).to(
        torch.uint8 if K < 256 else torch.int32
    )
    order = torch.argsort(keys, stable=True)  # 8-bit keys take torch's radix sort
    count = torch.bincount(keys, minlength=K + 1)[:K]
    mean, scatter = _zeros(rows, K)
    start = 0
    for k, size in enumerate(count.tolist()):
        if size:
            mean[k], scatter[k] = _shifted_moments(rows, order[start : start + size])
        start += size
    return count, mean, scatter


def _shifted_moments(rows: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (A,) and scatter (A, A) in float64 of the rows named by `members`, about the mean of the first of them."""
    shift = rows[members[:SHIFT_ROWS]].double().mean(0)
    A = shift.shape[0]
    first, second = shift.new_zeros(A), shift.new_zeros(A, A)
    size = min(len(members), max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // max(1, A))))
    gathered, shifted = rows.new_empty(size, A), shift.new_empty(size, A)
    for part in torch.split(members, size):
        block = (
            shifted[: len(part)]
            .copy_(torch.index_select(rows, 0, part, out=gathered[: len(part)]))
            .sub_(shift)
        )
        _add_products(first, second, block)
    offset = first / len(members)
    return shift + offset, second - len(members) * torch.outer(offset, offset)


def _add_products(first: Tensor, second: Tensor, block: Tensor) -> None:
    """Add the sums of a block (n, A) to `first` (A,) and those of its products to `second` (A, A), all float64."""
    first += block.sum(0)
    second.addmm_(block.T, block)


def _moments_by_mask(
    rows: Tensor, labels: Tensor, K: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = max(1, MASK_ELEMENTS // rows.shape[1])
    members = (
        (labels[:, None] == torch.arange(K, device=rows.device)) & (labels != ignore_index)[:, None]
    ).double()
    mean, scatter = _zeros(rows, K)
    for part, member in zip(torch.split(rows, n), torch.split(members, n), strict=True):
        mean.addmm_(member.T, part.double())
    count = members.sum(0)
    mean /= count.clamp(min=1)[:, None]
    for part, member in zip(torch.split(rows, n), torch.split(members, n), strict=True):
        for k in range(K):
            centred = (part.double() - mean[k]) * member[:, k : k + 1]
            scatter[k].addmm_(centred.T, centred)
    return count.long(), mean, scatter


def _moments_by_kernel(
    rows: Tensor, labels: Tensor, K: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    from common.sgcg import kernels

    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return kernels.class_moments(rows, labels.contiguous(), K, ignore_index)


def _zeros(rows: Tensor, K: int) -> tuple[Tensor, Tensor]:
    A = rows.shape[1]
    return rows.new_zeros(K, A, dtype=torch.float64), rows.new_zeros(K, A, A, dtype=torch.float64)


def triton_kernels(features: Tensor, widest: int | None = None) -> bool:
    """Whether the Triton kernels compute these features: on a GPU, with Triton, not float64, at most `widest` wide."""
    fits = features.dtype != torch.float64 and (widest is None or features.shape[1] <= widest)
    return fits and features.device.type == "cuda" and _TRITON and features.shape[1] > 0


def check_pixels(features: Tensor, labels: Tensor) -> None:
    """Refuse features that are not (N, A) floats or labels that are not (N,) integers."""
    check_shape("features", features, (None, None))
    check_shape("labels", labels, (features.shape[0],))
    if not features.dtype.is_floating_point:
        raise ValueError(f"features: found {features.dtype}, expected floats")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels: found {labels.dtype}, expected integers")


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels outside [0, K) that are not `ignore_index`; on a CPU only, a GPU would have to wait."""
    if labels.device.type != "cpu" or not labels.numel():
        return
    low, high = labels.aminmax()
    if int(low) >= 0 and int(high) < num_classes:
        return
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        found = int(labels[wrong][0])
        raise ValueError(
            f"labels: found {found}, expected 0 to {num_classes - 1} or {ignore_index} (ignore)"
        )


def check_finite(**tensors: Tensor) -> None:
    """Refuse tensors that hold values that are not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name}: found values that are not finite, shape {tuple(tensor.shape)}, expected finite numbers"
            )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Refuse a tensor of another shape; None stands for any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        want not in (None, got) for want, got in zip(expected, shape, strict=True)
    ):
        text = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected ({text})")
