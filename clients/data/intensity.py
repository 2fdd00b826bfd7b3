"""Changes of intensity after nnU-Net's DA5, for `augmentation=strong`.

Facts are those of `nnUNetTrainerDA5` and of batchgenerators, in their order. What differs: a change
is the same in all channels of a slice, because they are neighbouring slices or colours of one
image, and is drawn once, not again for each channel; of DA5's two exponents one is of the inverted
and one of the plain image, where its code inverts twice; its median filter, rectangles, local
exponents and sharpening are left out. The result is scaled linearly into [-1, 1] where it leaves
this range; cutting it off would erase what is under a strong bias field.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from fedsgcg.clients.data.draws import Draw
from fedsgcg.clients.data.smooth import gaussian_blur
from fedsgcg.common.settings.augmentation import PROBABILITIES, IntensitySettings

TINY: Final = 1e-8
WHOLE: Final = (1, 2, 3)

Change = Callable[[Tensor, IntensitySettings, Draw], Tensor]


def change_intensities(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    """Change the intensities of each slice, each change with its probability.

    Runs on the images' device without synchronising.

    Args:
        images: (B, C, S, S) float in [-1, 1].
        settings: Probabilities and ranges.
        draw: Draws the numbers of each slice.

    Returns:
        New images in [-1, 1].
    """
    for name in PROBABILITIES:
        if probability := getattr(settings, name):
            chosen = (draw.uniform(0, 1) < probability).view(-1, 1, 1, 1)
            images = torch.where(chosen, CHANGES[name](images, settings, draw), images)
    return into_range(images)


def into_range(images: Tensor) -> Tensor:
    """Scale each slice (B, C, S, S) linearly into [-1, 1]; one within it stays as it is."""
    low = images.amin(WHOLE, keepdim=True).clamp(max=-1)
    high = images.amax(WHOLE, keepdim=True).clamp(min=1)
    scaled = (images - low) / (high - low) * 2 - 1
    return torch.where((low < -1) | (high > 1), scaled, images).clamp(-1, 1)


def deviation_of(images: Tensor) -> Tensor:
    """Return the standard deviation (B, 1, 1, 1) of each slice over all its pixels."""
    return images.std(WHOLE, correction=0, keepdim=True)


def raised(images: Tensor, exponent: Tensor) -> Tensor:
    """Raise slices (B, C, S, S), scaled to [0, 1] by their own range, to exponents (B, 1, 1, 1)."""
    low, high = images.amin(WHOLE, keepdim=True), images.amax(WHOLE, keepdim=True)
    share = ((images - low) / (high - low).clamp(min=TINY)).clamp(0, 1)
    return share.pow(exponent) * (high - low) + low


def low_resolution(images: Tensor, count: Tensor) -> Tensor:
    """Sample the nearest of `count` pixels per side, and interpolate these with cubic polynomials.

    Args:
        images: (B, C, S, S).
        count: (B,) whole numbers from 1 to S; S changes nothing.
    """
    for dim in (2, 3):
        images = _resampled(images, count.view(-1, 1).long(), dim)
    return images


def _resampled(images: Tensor, count: Tensor, dim: int) -> Tensor:
    # Places are whole numbers of half pixels: some centres are exactly on the border of two pixels,
    # and which of the two a rounded quotient takes depends on the processor.
    side = images.shape[dim]
    pixels = torch.arange(side, device=images.device)
    place = (2 * pixels + 1) * count - side  # in 1 / (2 side) coarse pixels
    first = place.div(2 * side, rounding_mode="floor")
    share = (place - first * (2 * side)).to(images.dtype) / (2 * side)
    total = torch.zeros_like(images)
    for tap in (-1, 0, 1, 2):
        weight = _cubic((share - tap).abs())
        inside = torch.minimum((first + tap).clamp(min=0), count - 1)
        index = ((2 * inside + 1) * side).div(2 * count, rounding_mode="floor")
        shape = (-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side)
        total = total + weight.view(shape) * images.gather(dim, index.view(shape).expand_as(images))
    return total


def _cubic(distance: Tensor) -> Tensor:
    """Return the weights of cubic convolution with a = -1/2 (Keys 1981, eq. 15)."""
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far.where(distance < 2, 0.0))


def _per_slice(numbers: Tensor, images: Tensor) -> Tensor:
    return numbers.to(images.dtype).view(-1, 1, 1, 1)


def _blur(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    return gaussian_blur(images, _per_slice(draw.uniform(*_pair(settings.blur_pixels)), images))


def _noise(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    strength = _per_slice(draw.uniform(0, settings.noise_deviation), images)
    noise = draw.normal(*images.shape[1:]).to(images.dtype)
    return images + strength * deviation_of(images) * noise


def _brightness(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    offset = _per_slice(draw.normal() * settings.brightness_deviation, images)
    return images + offset * deviation_of(images)


def _contrast(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    """Spread a slice about its mean; half of the slices keep their range."""
    mean = images.mean(WHOLE, keepdim=True)
    factor = _per_slice(draw.around_one(*_pair(settings.contrast_factors)), images)
    changed = mean + (images - mean) * factor
    low, high = images.amin(WHOLE, keepdim=True), images.amax(WHOLE, keepdim=True)
    keeps = _per_slice(draw.uniform(0, 1), images) < 0.5
    return torch.where(keeps, changed.clamp(low, high), changed)


def _low_resolution(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    share = draw.uniform(*_pair(settings.resolutions))
    return low_resolution(images, (share * images.shape[-1]).round().clamp(min=1))


def _inverted_gamma(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    return -_gamma(-images, settings, draw)


def _gamma(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    """Raise a slice to an exponent, and give it its old mean and deviation."""
    changed = raised(images, _per_slice(draw.around_one(*_pair(settings.exponents)), images))
    centred = changed - changed.mean(WHOLE, keepdim=True)
    factor = deviation_of(images) / deviation_of(changed).clamp(min=TINY)
    return centred * factor + images.mean(WHOLE, keepdim=True)


def _bias_field(images: Tensor, settings: IntensitySettings, draw: Draw) -> Tensor:
    """Add a Gaussian whose centre is in the slice or up to half a side outside it.

    Its width is log-uniform from a sixth of a side to a side; its largest value in the slice is the
    drawn one.
    """
    side = images.shape[-1]
    width = torch.exp(draw.uniform(0, math.log(6))) * side / 6
    pixels = torch.arange(side, device=images.device)
    exponents = []
    for _ in range(2):
        centre = draw.uniform(-0.5, 1.5) * side
        exponents.append(-0.5 * ((pixels - centre[:, None]) / width[:, None]).square())
    exponent = exponents[0][:, :, None] + exponents[1][:, None, :]
    # Relative to the largest value in the slice, also where every value would underflow.
    bump = torch.exp(exponent - exponent.amax((1, 2), keepdim=True))[:, None].to(images.dtype)
    sign = torch.where(draw.uniform(0, 1) < 0.5, -1.0, 1.0)
    strength = _per_slice(sign * draw.uniform(*_pair(settings.bias_deviations)), images)
    return images + strength * deviation_of(images) * bump


def _pair(given: tuple[float, ...]) -> tuple[float, float]:
    low, high = given
    return low, high


CHANGES: Final[dict[str, Change]] = {
    "blur": _blur,
    "noise": _noise,
    "brightness": _brightness,
    "contrast": _contrast,
    "low_resolution": _low_resolution,
    "inverted_gamma": _inverted_gamma,
    "gamma": _gamma,
    "bias_field": _bias_field,
}
