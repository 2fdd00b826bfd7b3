"""BigAug's nine stacked transforms, each applied to a slice with the same probability.

Sharpness, blur, noise; brightness, contrast, perturbation of the intensities; rotation, scale,
elastic deformation. Published ranges are those of images of deviation 1; here they are multiplied
by the deviation of the slice. The last three are one movement, with one interpolation, and move the
labels too.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fedsgcg.clients.data.draws import Draw
from fedsgcg.clients.data.intensity import deviation_of, raised
from fedsgcg.clients.data.sampling import sample
from fedsgcg.clients.data.smooth import gaussian_blur, spline_field
from fedsgcg.common.settings.augmentation import BigAugSettings

BLUR_PIXELS: Final = (0.25, 1.5)
SHARPNESS: Final = (10.0, 30.0)
NOISE: Final = (0.1, 1.0)
BRIGHTNESS: Final = (-0.1, 0.1)
EXPONENTS: Final = (0.5, 4.5)
PERTURBATION: Final = (-0.1, 0.1)
ROTATION_DEGREES: Final = (-20.0, 20.0)
SCALE: Final = (0.4, 1.6)
CELLS: Final = 5
"""Cells of a side of the elastic deformation; a displacement below 1 / (4 CELLS) cannot fold."""


def big_augment(
    images: Tensor, labels: Tensor, settings: BigAugSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Apply the nine transforms to each slice.

    Runs on the tensors' device without synchronising. Areas from outside the slice repeat its
    border, in images and labels.

    Args:
        images: (B, C, S, S) float in [-1, 1].
        labels: (B, S, S) class indices of any integer type.
        settings: The probability, and the size of the elastic deformation.
        generator: Random generator on the tensors' device.

    Returns:
        New images in [-1, 1] and new labels of the same type.
    """
    if settings.probability == 0:
        return images, labels
    draw = _Chooser(images, settings.probability, generator)
    spread = deviation_of(images)
    changed = _appearance(_quality(images, spread, draw), spread, draw)
    return sample(changed, labels, _grid(images, settings.elastic, draw))


class _Chooser(Draw):
    """Draws amounts of transforms, `still` for slices that a transform leaves as they are."""

    def __init__(self, images: Tensor, probability: float, generator: torch.Generator) -> None:
        super().__init__(len(images), images.device, generator)
        self.probability = probability
        self.dtype = images.dtype

    def amount(self, low: float, high: float, still: float) -> Tensor:
        """Return (B, 1, 1, 1) numbers in [low, high), or `still`."""
        chosen = self.chosen()
        return torch.where(chosen, self.range(low, high), still)

    def chosen(self) -> Tensor:
        """Return which slices a transform changes, (B, 1, 1, 1)."""
        return self.uniform(0, 1).view(-1, 1, 1, 1) < self.probability

    def range(self, low: float, high: float) -> Tensor:
        """Return (B, 1, 1, 1) numbers in [low, high)."""
        return self.uniform(low, high).to(self.dtype).view(-1, 1, 1, 1)


def _quality(images: Tensor, spread: Tensor, draw: _Chooser) -> Tensor:
    """Sharpen by an unsharp mask, blur, add noise."""
    once = gaussian_blur(images, draw.range(*BLUR_PIXELS))
    twice = gaussian_blur(once, draw.range(*BLUR_PIXELS))
    sharp = once + draw.range(*SHARPNESS) * (once - twice)
    # An edge that overshoots by far would leave nothing of the rest of the slice's range.
    images = torch.where(draw.chosen(), sharp.clamp(-1, 1), images)
    images = torch.where(draw.chosen(), gaussian_blur(images, draw.range(*BLUR_PIXELS)), images)
    noise = draw.normal(*images.shape[1:]).to(images.dtype)
    return (images + draw.amount(*NOISE, still=0.0) * spread * noise).clamp(-1, 1)


def _appearance(images: Tensor, spread: Tensor, draw: _Chooser) -> Tensor:
    """Shift the brightness, bend the contrast, perturb scale and shift of the intensities."""
    images = images + draw.amount(*BRIGHTNESS, still=0.0) * spread
    images = torch.where(draw.chosen(), raised(images, draw.range(*EXPONENTS)), images)
    factor, offset = (draw.range(*PERTURBATION) for _ in range(2))
    perturbed = images * (1 + factor) + offset * spread
    return torch.where(draw.chosen(), perturbed, images).clamp(-1, 1)


def _grid(images: Tensor, elastic: float, draw: _Chooser) -> Tensor:
    """Return the places (B, S, S, 2) that rotation, scale and deformation read.

    The deformation is applied first, so that whether it folds does not depend on the scale.
    """
    angle = draw.amount(*ROTATION_DEGREES, still=0.0) * (math.pi / 180)
    size = draw.amount(*SCALE, still=1.0)
    cosine, sine = (turn[:, 0] / size[:, 0] for turn in (torch.cos(angle), torch.sin(angle)))
    x, y = places(images, elastic, draw).unbind(1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], 3)


def places(images: Tensor, elastic: float, draw: _Chooser) -> Tensor:
    """Return the elastically displaced x and y of every pixel in half sides, (B, 2, S, S)."""
    side = images.shape[-1]
    points = draw.uniform(-2 * elastic, 2 * elastic, 2, CELLS + 3, CELLS + 3).to(images.dtype)
    field = spline_field(torch.where(draw.chosen(), points, 0.0), side)
    centres = (torch.arange(side, device=images.device, dtype=images.dtype) * 2 + 1) / side - 1
    still = torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])
    return still + field
