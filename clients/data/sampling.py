"""Reads slices and their labels at other places than their pixels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def sample(images: Tensor, labels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Read slices and labels at the places of a grid; images bilinear, labels nearest.

    Args:
        images: (B, C, S, S).
        labels: (B, S, S).
        grid: (B, S, S, 2), x and y in half sides from the centre; outside the border is repeated.
    """
    grid = grid.to(images.dtype)
    moved = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    as_image = labels[:, None].to(images.dtype)
    mapped = functional.grid_sample(
        as_image, grid, mode="nearest", padding_mode="border", align_corners=False
    )
    return moved, mapped[:, 0].to(labels.dtype)
