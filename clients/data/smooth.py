"""Smoothing of images and smooth random fields, with a strength for each slice of a batch.

Everything runs on the device of its arguments without synchronising.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

RADIUS: Final = 4
"""Radius of the blur's kernel: two standard deviations of the strongest blur, 2 pixels."""
SHARPEST: Final = 1e-3
"""Standard deviation in pixels below which a blur changes nothing."""


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur images (B, C, S, S) by Gaussians of standard deviation sigma (B, 1, 1, 1) pixels."""
    B, C, H, W = images.shape
    steps = torch.arange(-RADIUS, RADIUS + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=SHARPEST).view(-1, 1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)
    padded = functional.pad(images, [RADIUS] * 4, mode="replicate")
    flat = padded.reshape(1, B * C, H + 2 * RADIUS, W + 2 * RADIUS)
    flat = functional.conv2d(flat, kernel[:, None, :, None], groups=B * C)
    flat = functional.conv2d(flat, kernel[:, None, None, :], groups=B * C)
    return flat.reshape(B, C, H, W)


def spline_field(control: Tensor, side: int) -> Tensor:
    """Return fields of uniform cubic B-splines, within the range of their control points.

    Args:
        control: (..., n + 3, n + 3) values for n x n cells that cover the slice.
        side: S.

    Returns:
        (..., S, S).
    """
    # Made on the device each time: a copy from the CPU would wait for the device.
    cells = control.shape[-1] - 3
    basis = _basis(cells, side, control.device).to(control.dtype)
    return basis @ control @ basis.mT


def _basis(cells: int, side: int, device: torch.device) -> Tensor:
    """Return the weights (S, cells + 3) of the control points at the centres of the pixels."""
    place = (torch.arange(side, dtype=torch.float64, device=device) + 0.5) * cells / side
    points = torch.arange(-1, cells + 2, dtype=torch.float64, device=device)
    distance = (place[:, None] - points).abs()
    near = 2 / 3 - distance.square() + distance.pow(3) / 2
    far = (2 - distance).clamp(min=0).pow(3) / 6
    return torch.where(distance < 1, near, far)
