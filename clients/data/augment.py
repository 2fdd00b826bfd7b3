"""Random augmentation of a batch on its device; images and labels are moved together.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fedsgcg.clients.data.bigaug import big_augment
from fedsgcg.clients.data.draws import Draw
from fedsgcg.clients.data.intensity import change_intensities
from fedsgcg.clients.data.sampling import sample
from fedsgcg.common.settings.plan import AugmentationSettings, Plan


def augment_batch(
    images: Tensor, labels: Tensor, plan: Plan, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Augment a batch as training does: as `data.augmentation` says, then as the method does.

    Arguments and results are those of `augment`.
    """
    images, labels = augment(images, labels, plan.data.augmentation, generator)
    if plan.method.name == "bigaug":
        return big_augment(images, labels, plan.method.bigaug, generator)
    return images, labels


def augment(
    images: Tensor, labels: Tensor, settings: AugmentationSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Augment each slice: flip, rotation, scale, shift, then its intensities.

    Runs on the tensors' device without synchronising. Areas from outside the image repeat its
    border, in images and labels, so that no artificial edge is learned.

    Args:
        images: (B, C, H, W) float in [-1, 1].
        labels: (B, H, W) class indices of any integer type.
        settings: Strength of each change; zero disables it.
        generator: Random generator on the tensors' device.

    Returns:
        New images in [-1, 1] and new labels of the same type.
    """
    draw = Draw(images.shape[0], images.device, generator)
    if settings.flip:
        flipped = draw.uniform(0, 1) < settings.flip
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        labels = torch.where(flipped[:, None, None], labels.flip(-1), labels)
    if settings.rotate_degrees or settings.scale or settings.shift or settings.zoom:
        images, labels = _move(images, labels, settings, draw)
    images = _recolour(images, settings, draw)
    if settings.intensity.is_on:
        images = change_intensities(images, settings.intensity, draw)
    return images, labels


def _move(
    images: Tensor, labels: Tensor, settings: AugmentationSettings, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Rotate, scale and shift; images bilinear, labels nearest."""
    angle = draw.uniform(-1, 1) * math.radians(settings.rotate_degrees)
    size = 1 + draw.uniform(-1, 1) * settings.scale
    # affine_grid measures in half sides: a shift by a full side is 2.
    shift_x, shift_y = (draw.uniform(-2, 2) * settings.shift for _ in range(2))
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    rows = [torch.stack([cosine, -sine, shift_x], 1), torch.stack([sine, cosine, shift_y], 1)]
    if settings.zoom:
        rows = _zoomed(rows, settings.zoom, draw)
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return sample(images, labels, grid)


def _zoomed(rows: list[Tensor], zoom: float, draw: Draw) -> list[Tensor]:
    """Zoom into a random window of the slice, 1 / factor of a side wide.

    `rows` are the x and y rows of the affine map, (B, 3) each.
    """
    enlarged = draw.uniform(0, 1) < 0.5
    for axis, row in enumerate(rows):
        factor = torch.where(enlarged, 1 + draw.uniform(0, 1) * zoom, 1.0)
        offset = draw.uniform(-1, 1) * (1 - 1 / factor)
        window = row / factor[:, None]
        window[:, 2] += offset
        rows[axis] = window
    return rows


def _recolour(images: Tensor, settings: AugmentationSettings, draw: Draw) -> Tensor:
    """Change contrast and brightness and add noise; the result stays in [-1, 1]."""
    if settings.gamma:
        exponent = torch.exp(draw.uniform(-1, 1) * settings.gamma)[:, None, None, None]
        images = ((images + 1) / 2).clamp(0, 1).pow(exponent) * 2 - 1
    if settings.brightness:
        images = images + (draw.uniform(-1, 1) * settings.brightness)[:, None, None, None]
    if settings.noise:
        strength = (draw.uniform(0, 1) * settings.noise)[:, None, None, None]
        noise = torch.randn(
            images.shape, device=images.device, dtype=images.dtype, generator=draw.generator
        )
        images = images + strength * noise
    return images.clamp(-1, 1)
