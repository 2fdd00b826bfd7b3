"""Batches of training slices, and random changes of them on the device.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from clients.cases import SliceTable
from common.errors import fail
from common.plan import AugmentationSettings, MethodSettings


def batches(
    table: SliceTable,
    settings: MethodSettings,
    rng: np.random.Generator,
    *,
    epochs: int | None = None,
    steps: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of shuffled slices; every slice comes exactly once an epoch.

    Args:
        table: Slices to draw from.
        settings: `batch_size`; and, when neither `epochs` nor `steps` is given, `steps_per_round` or `local_epochs`.
        rng: Source of the shuffles; equal generators give equal batches.
        epochs: Passes over the table.
        steps: Batches, over as many passes as it takes; the last pass may end early.

    Yields:
        Images (B, C, S, S) float32 in [-1, 1] and labels (B, S, S) int64 class indices, 255 = ignore, on the CPU.

    Raises:
        FedsgcgError: TRN-302 when the table is empty.
    """
    for chosen in _order(table, settings, rng, epochs, steps):
        images, labels = table.stack(chosen)
        yield torch.from_numpy(images), torch.from_numpy(labels).long()


def batch_indices(size: int, batch_size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return one epoch: a shuffle of `size` slices cut into batches.

    A single slice that would be left over joins the batch before it, because BatchNorm at the coarsest level needs
    more than one slice; a table smaller than a batch is used whole.
    """
    order = rng.permutation(size)
    cuts = list(range(batch_size, size, batch_size))
    if cuts and size - cuts[-1] == 1:
        cuts.pop()
    return [np.asarray(part, dtype=np.int64) for part in np.split(order, cuts)]


def steps_of(table: SliceTable, settings: MethodSettings) -> int:
    """Return how many batches a round has."""
    if settings.steps_per_round:
        return settings.steps_per_round
    full, rest = divmod(len(table), settings.batch_size)
    return settings.local_epochs * max(full + (rest > 1), 1)


def _order(
    table: SliceTable, settings: MethodSettings, rng: np.random.Generator, epochs: int | None, steps: int | None
) -> Iterator[NDArray[np.int64]]:
    """Yield the slice numbers of each batch."""
    if len(table) == 0:
        raise fail(
            "TRN-302", found="no slice", expected="at least one training slice", action="See the site's problems."
        )
    if epochs is None and steps is None:
        steps = settings.steps_per_round or None
        epochs = settings.local_epochs
    done = passes = 0
    while (done < steps) if steps is not None else (passes < (epochs or 0)):
        for chosen in batch_indices(len(table), settings.batch_size, rng):
            if steps is not None and done >= steps:
                return
            yield chosen
            done += 1
        passes += 1


def augment(
    images: Tensor, labels: Tensor, settings: AugmentationSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Change each slice at random: flip, rotation, size, shift, then contrast, brightness and noise.

    Runs on the device of the tensors without waiting for it. What comes into view from outside the image repeats the
    image's border, in images and labels alike, so that no artificial edge is learned.

    Args:
        images: (B, C, H, W) float in [-1, 1].
        labels: (B, H, W) class indices of any integer type.
        settings: How much of each; zero switches one off.
        generator: Random generator on the tensors' device.

    Returns:
        New images, again in [-1, 1], and new labels of the same type.
    """
    draw = _Draw(images.shape[0], images.device, generator)
    if settings.flip:
        flipped = draw.uniform(0, 1) < settings.flip
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        labels = torch.where(flipped[:, None, None], labels.flip(-1), labels)
    if settings.rotate_degrees or settings.scale or settings.shift:
        images, labels = _move(images, labels, settings, draw)
    return _recolour(images, settings, draw), labels


class _Draw:
    """Draws one number a slice from a generator."""

    def __init__(self, count: int, device: torch.device, generator: torch.Generator) -> None:
        self.count, self.device, self.generator = count, device, generator

    def uniform(self, low: float, high: float) -> Tensor:
        """Return (B,) numbers in [low, high)."""
        return torch.rand(self.count, device=self.device, generator=self.generator) * (high - low) + low


def _move(images: Tensor, labels: Tensor, settings: AugmentationSettings, draw: _Draw) -> tuple[Tensor, Tensor]:
    """Rotate, resize and shift; images bilinear, labels nearest."""
    angle = draw.uniform(-1, 1) * math.radians(settings.rotate_degrees)
    size = 1 + draw.uniform(-1, 1) * settings.scale
    # affine_grid counts half sides: a shift of one whole side is 2.
    shift_x, shift_y = (draw.uniform(-2, 2) * settings.shift for _ in range(2))
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    rows = [torch.stack([cosine, -sine, shift_x], 1), torch.stack([sine, cosine, shift_y], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False).to(images.dtype)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    as_image = labels[:, None].to(images.dtype)
    mapped = functional.grid_sample(as_image, grid, mode="nearest", padding_mode="border", align_corners=False)
    return moved, mapped[:, 0].to(labels.dtype)


def _recolour(images: Tensor, settings: AugmentationSettings, draw: _Draw) -> Tensor:
    """Change contrast and brightness and add noise; the result stays in [-1, 1]."""
    if settings.gamma:
        exponent = torch.exp(draw.uniform(-1, 1) * settings.gamma)[:, None, None, None]
        images = ((images + 1) / 2).clamp(0, 1).pow(exponent) * 2 - 1
    if settings.brightness:
        images = images + (draw.uniform(-1, 1) * settings.brightness)[:, None, None, None]
    if settings.noise:
        strength = (draw.uniform(0, 1) * settings.noise)[:, None, None, None]
        noise = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=draw.generator)
        images = images + strength * noise
    return images.clamp(-1, 1)
