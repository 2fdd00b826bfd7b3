"""GIN: views of a slice through random shallow networks; IPA: views blended by a random map.

A network has four convolutions with 2, 2, 2 and C output channels, each of 1 x 1 or 3 x 3 pixels,
with random biases and leaky rectifiers in between. The slice is first scaled to mean 0 and
deviation 1, as in the published experiments, and scaled back after.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedsgcg.clients.data.intensity import TINY, WHOLE, deviation_of
from fedsgcg.clients.data.smooth import spline_field

LAYERS: Final = 4
HIDDEN: Final = 2
"""Channels between the convolutions."""
CELLS: Final = 8
"""Cells of a side of IPA's map: 24 of 192 pixels in the published code."""


class Numbers(NamedTuple):
    """The random numbers of the two views of B slices.

    Attributes:
        weights: (B, 2, n) weights and biases of the networks (`widths`), standard normal.
        small: (B, 2, 4), 1 where a convolution has 1 x 1 pixels.
        share: (B, 2) share of the network in a view.
        control: (B, k, k) control points of IPA's map.
    """

    weights: Tensor
    small: Tensor
    share: Tensor
    control: Tensor


def widths(channels: int) -> list[tuple[int, int]]:
    """Return (input, output) channels of the convolutions."""
    inner = [HIDDEN] * (LAYERS - 1)
    return list(zip([channels, *inner], [*inner, channels], strict=True))


def draw_numbers(
    count: int, channels: int, strength: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], ...]:
    """Draw the fields of `Numbers` for `count` slices; `strength` is the largest share."""
    numbers = sum(9 * before * after + after for before, after in widths(channels))
    drawn = (
        rng.standard_normal((count, 2, numbers)),
        rng.random((count, 2, LAYERS)) < 0.5,
        strength * rng.random((count, 2)),
        rng.standard_normal((count, CELLS + 3, CELLS + 3)),
    )
    return tuple(one.astype(np.float32) for one in drawn)


def gin_views(images: Tensor, numbers: Numbers, *, blend: bool) -> tuple[Tensor, Tensor]:
    """Return two views of every slice, in [-1, 1].

    A view of slice x is (a net(x) + (1 - a) x), scaled to the norm of x. With `blend` the views v
    and w become b v + (1 - b) w and b w + (1 - b) v, with a smooth map b in [0, 1].

    Args:
        images: (B, C, S, S) float in [-1, 1].
        numbers: Random numbers on the same device.
        blend: Whether views are blended.
    """
    mean, spread = images.mean(WHOLE, keepdim=True), deviation_of(images)
    plain = (images - mean) / spread.clamp(min=TINY)
    first, second = (
        _view(plain, numbers.weights[:, k], numbers.small[:, k], numbers.share[:, k])
        for k in range(2)
    )
    if blend:
        share = blending_map(numbers.control, images.shape[-1])
        difference = share * (first - second)
        first, second = second + difference, first - difference
    return (first * spread + mean).clamp(-1, 1), (second * spread + mean).clamp(-1, 1)


def blending_map(control: Tensor, side: int) -> Tensor:
    """Return smooth maps (B, 1, S, S) from 0 to 1, given control points (B, k, k)."""
    field = spline_field(control, side)[:, None]
    low, high = field.amin(WHOLE, keepdim=True), field.amax(WHOLE, keepdim=True)
    return (field - low) / (high - low).clamp(min=TINY)


def _view(plain: Tensor, weights: Tensor, small: Tensor, share: Tensor) -> Tensor:
    """Return slices of mean 0 and deviation 1 mixed with a network's output, of the same norm."""
    a = share.view(-1, 1, 1, 1)
    mixed = a * random_network(plain, weights, small) + (1 - a) * plain
    norms = [torch.linalg.vector_norm(one, dim=WHOLE, keepdim=True) for one in (plain, mixed)]
    view: Tensor = mixed * (norms[0] / norms[1].clamp(min=TINY))
    return view


def random_network(images: Tensor, weights: Tensor, small: Tensor) -> Tensor:
    """Run each slice through its own network.

    Args:
        images: (B, C, S, S).
        weights: (B, n).
        small: (B, 4), 1 for convolutions of 1 x 1 pixels: only the kernel's centre counts.
    """
    B, C, S, _ = images.shape
    centre = torch.zeros(3, 3, device=images.device, dtype=images.dtype)
    centre[1, 1] = 1
    start, maps = 0, images
    for layer, (before, after) in enumerate(widths(C)):
        size = 9 * before * after
        kernel = weights[:, start : start + size].reshape(B * after, before, 3, 3)
        alone = small[:, layer].repeat_interleave(after).view(-1, 1, 1, 1)
        kernel = kernel * (1 - alone) + kernel * centre * alone
        bias = weights[:, start + size : start + size + after].reshape(-1)
        start += size + after
        flat = functional.conv2d(
            maps.reshape(1, B * before, S, S), kernel, bias, padding=1, groups=B
        )
        maps = flat.reshape(B, after, S, S)
        if layer < LAYERS - 1:
            maps = functional.leaky_relu(maps)
    return maps
