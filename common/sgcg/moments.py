"""Class moments of a batch on its device, and label maps at the size of a feature map.

`common.statistics` pools these moments, in NumPy.

Legend: K classes incl. background, A feature channels, N pixels, B batch, H, W height and width.
"""

from __future__ import annotations

import importlib.util
from typing import Final

import torch
from torch import Tensor

BLOCK_ELEMENTS: Final = 1 << 17
"""Elements of a block (1 MiB of float64) that is gathered, shifted and multiplied in the cache."""

BLOCK_ROWS: Final = 8192
"""Most rows of a block, whatever their width."""

SHIFT_ROWS: Final = 256
"""Number of a class's first rows whose mean is used as its shift."""

_TRITON: Final = importlib.util.find_spec("triton") is not None

MASK_ELEMENTS: Final = 1 << 23
"""Elements of a chunk of features held in float64 on a GPU (64 MiB)."""


def class_moments(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute count, mean and scatter of every class of a batch (SgCG eqs. 1-3), without gradient.

    On a CPU the rows are visited class by class in blocks, in float64 and relative to a shift near
    the class's mean. On a GPU there are two passes without a wait of the host: Triton kernels
    (`common.sgcg.kernels`), or masked float64 products for float64 features or without Triton.

    Error bounds for any order of additions, with s_a^2 the class's scatter[a, a]:

    - in float64 (CPU and masked products) |error of scatter[a, b]| <= 1e-8 s_a s_b for a class of
      up to a million pixels, however far its mean is from zero. The error of a sum of m terms is at
      most m 2^-53 of the sum of absolute values; m is 8192 within a block plus 123 blocks. Relative
      to a shift that is the mean of rows of the class, the absolute values sum to at most
      (1 + n / SHIFT_ROWS) s_a s_b. Together 8315 * 3907 * 2^-53 = 3.6e-9;
    - in the Triton kernels <= 1e-5 s_a s_b, derived in `common.sgcg.kernels.class_moments`.

    Args:
        features: (N, A) floats.
        labels: (N,) integers in [0, K), or `ignore_index`.
        num_classes: K.
        ignore_index: Label of pixels to leave out.

    Returns:
        count (K,) int64, mean (K, A) and scatter (K, A, A) float64, on the device of the features;
        zero where absent.

    Raises:
        ValueError: Shapes or types that are not valid; on a CPU also labels out of range and
            features that are not finite.
    """
    check_pixels(features, labels)
    check_labels(labels, num_classes, ignore_index)
    rows = features.detach()
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if triton_kernels(rows):
            moments = _moments_by_kernel
        elif rows.device.type == "cpu":
            moments = _moments_by_class
        else:
            moments = _moments_by_mask
        count, mean, scatter = moments(rows, labels, num_classes, ignore_index)
        scatter = 0.5 * (scatter + scatter.mT)
    if rows.device.type == "cpu" and not bool(torch.isfinite(scatter).all()):
        check_finite(features=features)
    return count, mean, scatter


def reduce_labels(
    labels: Tensor, factor: int, num_classes: int, majority: float = 0.75, ignore_index: int = 255
) -> Tensor:
    """Reduce a label map to the size of a feature map that is `factor` times smaller.

    A square of pixels gets its most frequent label if that reaches the majority, as in the code of
    SePiCo; else it is ignored.

    Args:
        labels: (B, H, W) integers in [0, K), or `ignore_index`; H and W multiples of `factor`.
        factor: Side of the square of pixels that becomes one.
        num_classes: K.
        majority: Share that the most frequent label must reach; "ignore" counts as a label.
        ignore_index: Label of pixels to ignore, and of squares without a majority.

    Returns:
        (B, H / factor, W / factor) of the same type.

    Raises:
        ValueError: Sides that are not multiples of `factor`, a majority outside [0, 1], or labels
            out of range.
    """
    if labels.ndim != 3 or factor < 1 or labels.shape[1] % factor or labels.shape[2] % factor:
        raise ValueError(
            f"labels: found shape {tuple(labels.shape)}, "
            f"expected (B, H, W) with H and W multiples of factor={factor}"
        )
    if not 0 <= majority <= 1:
        raise ValueError(f"majority: found {majority}, expected a share in [0, 1]")
    check_labels(labels, num_classes, ignore_index)
    B, H, W = labels.shape
    squares = labels.reshape(B, H // factor, factor, W // factor, factor)
    ignored = squares == ignore_index
    most = ignored.sum((2, 4))
    winner = torch.full_like(most, ignore_index)
    # One class at a time needs the memory of one map. Of equal shares the first class wins, as in
    # an arg-max over classes.
    for k in reversed(range(num_classes)):
        share = ((squares == k) & ~ignored).sum((2, 4))
        ahead = share >= most
        winner = torch.where(ahead, k, winner)
        most = torch.where(ahead, share, most)
    return winner.masked_fill_(most < majority * factor**2, ignore_index).to(labels.dtype)


def _moments_by_class(
    rows: Tensor, labels: Tensor, K: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.uint8 if K < 256 else torch.int32  # torch sorts 8-bit keys by radix
    keys = torch.where(labels == ignore_index, K, labels).to(dtype)
    order = torch.argsort(keys, stable=True)
    count = torch.bincount(keys, minlength=K + 1)[:K]
    mean, scatter = _zeros(rows, K)
    start = 0
    for k, size in enumerate(count.tolist()):
        if size:
            mean[k], scatter[k] = _shifted_moments(rows, order[start : start + size])
        start += size
    return count, mean, scatter


def _shifted_moments(rows: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (A,) and scatter (A, A) of the rows `members`, in float64.

    Sums are taken relative to the mean of the first SHIFT_ROWS members.
    """
    shift = rows[members[:SHIFT_ROWS]].double().mean(0)
    A = shift.shape[0]
    first = shift.new_zeros(A)
    second = shift.new_zeros(A, A)
    size = min(len(members), max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // max(1, A))))
    gathered = rows.new_empty(size, A)
    shifted = shift.new_empty(size, A)
    for part in torch.split(members, size):
        selected = torch.index_select(rows, 0, part, out=gathered[: len(part)])
        block = shifted[: len(part)].copy_(selected).sub_(shift)
        _add_products(first, second, block)
    offset = first / len(members)
    return shift + offset, second - len(members) * torch.outer(offset, offset)


def _add_products(first: Tensor, second: Tensor, block: Tensor) -> None:
    """Add the sums of a float64 block (n, A) to `first` (A,), those of its products to `second`."""
    first += block.sum(0)
    second.addmm_(block.T, block)


def _moments_by_mask(
    rows: Tensor, labels: Tensor, K: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = max(1, MASK_ELEMENTS // rows.shape[1])
    own = labels[:, None] == torch.arange(K, device=rows.device)
    members = (own & (labels != ignore_index)[:, None]).double()
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
    from fedsgcg.common.sgcg import kernels

    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return kernels.class_moments(rows, labels.contiguous(), K, ignore_index)


def _zeros(rows: Tensor, K: int) -> tuple[Tensor, Tensor]:
    A = rows.shape[1]
    return rows.new_zeros(K, A, dtype=torch.float64), rows.new_zeros(K, A, A, dtype=torch.float64)


def triton_kernels(features: Tensor, widest: int | None = None) -> bool:
    """Whether to use Triton: on a GPU, if installed, not for float64, at most `widest` channels."""
    fits = features.dtype != torch.float64 and (widest is None or features.shape[1] <= widest)
    return fits and features.device.type == "cuda" and _TRITON and features.shape[1] > 0


def check_pixels(features: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless features are (N, A) floats and labels (N,) integers."""
    check_shape("features", features, (None, None))
    check_shape("labels", labels, (features.shape[0],))
    if not features.dtype.is_floating_point:
        raise ValueError(f"features: found {features.dtype}, expected floats")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels: found {labels.dtype}, expected integers")


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise a ValueError for labels outside [0, K) that are not `ignore_index`.

    Only on a CPU: on a GPU the host would have to wait for the device.
    """
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
    """Raise a ValueError for a tensor with values that are not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name}: found values that are not finite in shape {tuple(tensor.shape)}, "
                "expected finite numbers"
            )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise a ValueError for a tensor of another shape; None stands for any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        want not in (None, got) for want, got in zip(expected, shape, strict=True)
    ):
        text = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected ({text})")
