"""Settings of what is adapted to an unseen hospital's own images (`adapt.by`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedsgcg.common.settings.base import Checks, Section

BATCHNORM, PROTOTYPES, AMPLITUDE = "batchnorm", "prototypes", "amplitude"
WAYS: Final = (BATCHNORM, PROTOTYPES, AMPLITUDE)
TRANSDUCTIVE: Final = (BATCHNORM, PROTOTYPES)
"""Ways that use all images of the hospital at once; `amplitude` changes each image by itself."""


@dataclass(frozen=True)
class AdaptSettings(Section):
    """Further evaluations of the selected model, adapted to the unseen hospital's own images.

    They are reported apart and never select a model or a setting
    (docs/explanation/unseen-hospital.md).

    Attributes:
        by: What is adapted, one evaluation each: `batchnorm`, BatchNorm's moments, towards those of
            the hospital's images; `prototypes`, the classes of uncertain pixels, by prototypes that
            moved towards the hospital's confident pixels; `amplitude`, HarmoFL's normalisation of
            each image. Empty = none.
        share: Weight of the hospital's images in moments and prototypes, and of the prototypes in
            the class of an uncertain pixel.
        probability: Smallest probability of the predicted class of a confident pixel.
        distance: Largest squared Mahalanobis distance per feature channel of a pixel for which
            prototypes count; over the training pixels of a class its mean is about 1.
    """

    by: tuple[str, ...] = ()
    share: float = 0.5
    probability: float = 0.9
    distance: float = 1.0

    def checks(self) -> Checks:
        """The ways are known; shares and probabilities are such."""
        known = set(self.by) <= set(WAYS) and len(set(self.by)) == len(self.by)
        yield known, "by", f"some of {', '.join(WAYS)}, each once"
        yield 0 <= self.share <= 1, "share", "a share in [0, 1]"
        yield 0 < self.probability <= 1, "probability", "a probability in (0, 1]"
        yield 0 < self.distance <= 1e6, "distance", "more than 0, at most 1e6"
