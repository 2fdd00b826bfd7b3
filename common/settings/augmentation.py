"""Settings of the augmentations that are more than the plain changes of `data.augmentation`.

Ranges are pairs, smallest and largest value. Deviations are in units of the standard deviation of
the slice, because the published ranges are those of images scaled to mean 0 and deviation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedsgcg.common.settings.base import Checks, Section, at_most, block_checks

PROBABILITIES: Final = (
    "blur",
    "noise",
    "brightness",
    "contrast",
    "low_resolution",
    "inverted_gamma",
    "gamma",
    "bias_field",
)
"""The changes of `IntensitySettings` in the order in which they are applied."""


@dataclass(frozen=True)
class IntensitySettings(Section):
    """Changes of intensity after nnU-Net's DA5, each drawn for a slice with its own probability.

    Attributes:
        blur: Probability of a Gaussian blur; 0.2 in DA5.
        noise: Probability of Gaussian noise; 0.1 in DA5.
        brightness: Probability of an offset; 0.1 in DA5.
        contrast: Probability of a factor of the contrast about the mean; 0.2 in DA5.
        low_resolution: Probability of a lower resolution; 0.15 in DA5.
        inverted_gamma: Probability of an exponent of the inverted slice; 0.1 in DA5.
        gamma: Probability of an exponent of the slice scaled to [0, 1] by its own range; 0.1 in
            DA5.
        bias_field: Probability of a smooth additive field, a Gaussian bump or hollow; 0.3 in DA5.
        blur_pixels: Range of the blur's standard deviation in pixels.
        noise_deviation: Largest deviation of the noise.
        brightness_deviation: Deviation of the normal distribution of the offset.
        contrast_factors: Range of the factor; half of the factors are below 1.
        resolutions: Range of the resolution relative to that of the slice.
        exponents: Range of both exponents; half of them are below 1.
        bias_deviations: Range of the field's largest value in deviations; it is as often negative.
    """

    blur: float = 0.0
    noise: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    low_resolution: float = 0.0
    inverted_gamma: float = 0.0
    gamma: float = 0.0
    bias_field: float = 0.0
    blur_pixels: tuple[float, ...] = (0.3, 1.5)
    noise_deviation: float = 0.1
    brightness_deviation: float = 0.5
    contrast_factors: tuple[float, ...] = (0.5, 2.0)
    resolutions: tuple[float, ...] = (0.25, 1.0)
    exponents: tuple[float, ...] = (0.7, 1.5)
    bias_deviations: tuple[float, ...] = (1.0, 5.0)

    def checks(self) -> Checks:
        """Probabilities are such; ranges are ordered and within sensible limits."""
        for name in PROBABILITIES:
            yield 0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]"
        for name in ("noise_deviation", "brightness_deviation"):
            yield 0 <= getattr(self, name) <= 10, name, "0 to 10"
        yield _is_range(self.blur_pixels, 0, 1.5), "blur_pixels", "a range [a,b] within 0 to 1.5"
        for name in ("contrast_factors", "exponents"):
            given = getattr(self, name)
            around = _is_range(given, 0.1, 10) and given[0] <= 1 <= given[1]
            yield around, name, "a range [a,b] around 1, within 0.1 to 10"
        yield _is_range(self.resolutions, 0.05, 1), "resolutions", "a range [a,b] in 0.05 to 1"
        yield _is_range(self.bias_deviations, 0, 10), "bias_deviations", "a range [a,b] in 0 to 10"

    @property
    def is_on(self) -> bool:
        """Whether any change has a positive probability."""
        return any(getattr(self, name) for name in PROBABILITIES)


@dataclass(frozen=True)
class BigAugSettings(Section):
    """BigAug: nine stacked transforms.

    Attributes:
        probability: Probability of each transform for a slice; published 0.5. 0 is `source`.
        elastic: Largest displacement of the elastic deformation as a share of the side. At 0.05 a
            deformation of 5 x 5 cells may fold.
    """

    probability: float = 0.5
    elastic: float = 0.03

    def checks(self) -> Checks:
        """The probability is one; the deformation does not fold."""
        yield 0 <= self.probability <= 1, "probability", "0 to 1"
        yield 0 <= self.elastic < 0.05, "elastic", "0 or more, less than 0.05, which may fold"


@dataclass(frozen=True)
class GinSettings(Section):
    """GIN: two views of a slice through random shallow networks.

    Attributes:
        blend: Blend the two views by a smooth random map (IPA), so that neighbouring structures
            change their intensities independently.
        weight: Weight of the consistency of the two views' predictions; published 10.
        strength: Largest share of the random network in a view, drawn uniformly; published 1. At 0
            both views are the slice itself.
    """

    blend: bool = True
    weight: float = 10.0
    strength: float = 1.0

    def checks(self) -> Checks:
        """The weight is not negative, the strength a share."""
        yield 0 <= self.weight <= 1000, "weight", "0 to 1000"
        yield 0 <= self.strength <= 1, "strength", "a share in [0, 1]"


@dataclass(frozen=True)
class TridSettings(Section):
    """TriD: feature statistics drawn from a uniform distribution.

    Attributes:
        probability: Share of the batches that are changed, drawn for each layer; published 0.5.
        share: Probability that a channel of an image gets drawn statistics; published 0.5.
        blocks: Encoder blocks after whose output statistics are drawn, 1 (full resolution) to 5.
    """

    probability: float = 0.5
    share: float = 0.5
    blocks: tuple[int, ...] = at_most(5, (1, 2))

    def checks(self) -> Checks:
        """Probabilities are such; the blocks exist."""
        yield 0 <= self.probability <= 1, "probability", "0 to 1"
        yield 0 <= self.share <= 1, "share", "0 to 1"
        yield from block_checks(self.blocks)


def _is_range(given: tuple[float, ...], least: float, most: float) -> bool:
    """Whether a setting is a pair of ordered numbers within limits."""
    return len(given) == 2 and least <= given[0] <= given[1] <= most
