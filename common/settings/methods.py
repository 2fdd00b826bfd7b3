"""Settings of the local methods that have some: `method.moon.weight` and so on.

Formulas and sources are in the methods' own modules, `clients.methods`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fedsgcg.common.settings.base import Checks, Section, at_most, block_checks

JIGSAW_SIDE: Final = 3
"""Tiles of a side of JiGen's puzzles, as published."""
JIGSAW_PERMUTATIONS: Final = 30
"""JiGen's permutations besides the identity, as published."""


@dataclass(frozen=True)
class SgcgSettings(Section):
    """Variants of SgCG, each off by default (docs/explanation/sgcg.md, "Variants").

    Attributes:
        hard: Share of the contrastive term that hard pixels have: those next to another class and
            those that the network predicts wrongly. 0 weights every pixel alike; published 0.5
            (ContrastiveSeg).
        between: beta of the penalty beta q' B_y q, with the covariance B_y of the sites' means of
            the pixel's class; 0 = none.
        sites: Compare a feature with a mixture of every site's Gaussians instead of one Gaussian of
            all sites. Needs the consent `site_statistics` of every training site, because every
            site then receives the statistics of each other site.
        recalibration: Virtual features from which the coordinator fits the output layer of the
            selected model anew, drawn from the Gaussians of the classes (CCVR). The result is kept
            only if the sites' validation improves. 0 = none.
    """

    hard: float = 0.0
    between: float = 0.0
    sites: bool = False
    recalibration: int = at_most(100_000, 0)

    def checks(self) -> Checks:
        """Shares and weights are in their ranges."""
        yield 0 <= self.hard < 1, "hard", "a share in [0, 1)"
        yield 0 <= self.between <= 1e6, "between", "0 to 1e6"
        enough = self.recalibration == 0 or self.recalibration >= 100
        yield enough, "recalibration", "0 (none), or 100 or more virtual features"


@dataclass(frozen=True)
class IsdaSettings(Section):
    """ISDA: semantic augmentation of the features with the classes' covariances.

    Attributes:
        strength: lambda_0 of the last round; it grows in proportion to the round. 0.5 in the
            published classification experiments, 7.5 for Cityscapes, chosen from 1 to 10.
        covariance: The noise's covariance: that of the `class` over all pixels, as published, or
            the part of it `between` the sites' means alone, which is the shift between hospitals.
    """

    strength: float = 0.5
    covariance: Literal["class", "between"] = "class"

    def checks(self) -> Checks:
        """The strength is a variance and so is not negative."""
        yield 0 <= self.strength <= 100, "strength", "0 to 100"


@dataclass(frozen=True)
class MoonSettings(Section):
    """MOON: contrast between the received and the site's previous model.

    Attributes:
        weight: mu of the contrastive term; 1 in the published code, tuned from 0.1 to 10.
        temperature: tau of the cosines; 0.5 in the published code.
    """

    weight: float = 1.0
    temperature: float = 0.5

    def checks(self) -> Checks:
        """The temperature is positive."""
        yield 0 <= self.weight <= 1000, "weight", "0 to 1000"
        yield 0.01 <= self.temperature <= 100, "temperature", "0.01 to 100"


@dataclass(frozen=True)
class MixStyleSettings(Section):
    """MixStyle: mixes the channel means and deviations of two images of a batch.

    Attributes:
        probability: Share of the batches that are mixed, drawn for each layer; published 0.5.
        alpha: Parameter of the symmetric beta distribution of the mixing ratio; published 0.1.
        blocks: Encoder blocks after whose output statistics are mixed, 1 (full resolution) to 5.
    """

    probability: float = 0.5
    alpha: float = 0.1
    blocks: tuple[int, ...] = at_most(5, (1, 2))

    def checks(self) -> Checks:
        """The probability is one; the blocks exist."""
        yield 0 <= self.probability <= 1, "probability", "0 to 1"
        yield 0.001 <= self.alpha <= 100, "alpha", "0.001 to 100"
        yield from block_checks(self.blocks)


@dataclass(frozen=True)
class DsuSettings(Section):
    """DSU: draws channel means and deviations from their spread over the batch.

    Attributes:
        probability: Share of the batches that are perturbed, drawn for each layer; published 0.5.
        factor: Factor of the spread; published 1.
        blocks: Encoder blocks after whose output statistics are drawn, 1 (full resolution) to 5.
            The published code perturbs six places from the first convolution to the last block.
    """

    probability: float = 0.5
    factor: float = 1.0
    blocks: tuple[int, ...] = at_most(5, (1, 2, 3))

    def checks(self) -> Checks:
        """The probability is one; the blocks exist."""
        yield 0 <= self.probability <= 1, "probability", "0 to 1"
        yield 0 <= self.factor <= 100, "factor", "0 to 100"
        yield from block_checks(self.blocks)


@dataclass(frozen=True)
class HarmoFLSettings(Section):
    """HarmoFL: amplitude normalisation and a flat minimum.

    Attributes:
        radius: alpha, length of the step towards higher loss at which the gradient is taken;
            published 0.05. 0 takes the gradient at the weights themselves.
    """

    radius: float = 0.05

    def checks(self) -> Checks:
        """The radius is not negative."""
        yield 0 <= self.radius <= 10, "radius", "0 to 10"


@dataclass(frozen=True)
class FedProtoSettings(Section):
    """FedProto: class means of a batch near the global class means.

    Attributes:
        weight: Weight of the squared distance; published 1.
    """

    weight: float = 1.0

    def checks(self) -> Checks:
        """The weight is not negative."""
        yield 0 <= self.weight <= 1000, "weight", "0 to 1000"


@dataclass(frozen=True)
class ElcfsSettings(Section):
    """FedDG-ELCFS: episodic learning in continuous frequency space.

    Attributes:
        inner_rate: Rate of the virtual step; published 1e-3.
        clip: Bound of each entry of the virtual step's gradient; published 100.
        contrast: Weight of the boundary contrast of each structure; published 0.1.
        temperature: tau of the boundary contrast; published 0.05.
        ring: Width in pixels of the ring around a structure; published 5.
    """

    inner_rate: float = 1e-3
    clip: float = 100.0
    contrast: float = 0.1
    temperature: float = 0.05
    ring: int = at_most(64, 5)

    def checks(self) -> Checks:
        """Rates and widths are positive."""
        yield 0 < self.inner_rate <= 1, "inner_rate", "more than 0, at most 1"
        yield 0 < self.clip <= 1e6, "clip", "more than 0, at most 1e6"
        yield 0 <= self.contrast <= 1000, "contrast", "0 to 1000"
        yield 0.01 <= self.temperature <= 100, "temperature", "0.01 to 100"
        yield self.ring >= 1, "ring", "1 or more"


@dataclass(frozen=True)
class SamlSettings(Section):
    """SAML: shape-aware meta-learning.

    Attributes:
        inner_rate: Rate of the virtual step; 1e-4 in the published code.
        clip: Largest norm of the virtual step's gradient; published 10.
        second_order: Differentiate through the virtual step, as the objective of the paper says;
            the published code stops the gradient there.
        compactness: Weight of the compactness of the predicted structures; published 1.
        smoothness: Weight of the triplet loss of the boundary's features; published 0.005.
        margin: Margin of the triplet loss; published 10.
        ring: Width in pixels of the ring around a structure.
    """

    inner_rate: float = 1e-4
    clip: float = 10.0
    second_order: bool = True
    compactness: float = 1.0
    smoothness: float = 0.005
    margin: float = 10.0
    ring: int = at_most(64, 5)

    def checks(self) -> Checks:
        """Rates and widths are positive."""
        yield 0 < self.inner_rate <= 1, "inner_rate", "more than 0, at most 1"
        yield 0 < self.clip <= 1e6, "clip", "more than 0, at most 1e6"
        yield 0 <= self.compactness <= 1000, "compactness", "0 to 1000"
        yield 0 <= self.smoothness <= 1000, "smoothness", "0 to 1000"
        yield 0 < self.margin <= 1e6, "margin", "more than 0, at most 1e6"
        yield self.ring >= 1, "ring", "1 or more"


@dataclass(frozen=True)
class JiGenSettings(Section):
    """JiGen: jigsaw puzzles of 3 x 3 tiles with 30 permutations.

    Attributes:
        weight: alpha of the jigsaw loss; our choice, 0.9 in the published classification.
        in_place: Share of the slices whose tiles stay in place, the only ones that are segmented;
            our choice, 0.7 in the published classification.
    """

    weight: float = 0.1
    in_place: float = 0.6

    def checks(self) -> Checks:
        """Some slices are segmented."""
        yield 0 <= self.weight <= 1000, "weight", "0 to 1000"
        yield 0 < self.in_place <= 1, "in_place", "more than 0, at most 1"
