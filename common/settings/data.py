"""Settings of the data: images, classes, and the way from a file to a training slice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from fedsgcg.common.names import MAX_CLASSES
from fedsgcg.common.settings.augmentation import IntensitySettings
from fedsgcg.common.settings.base import Checks, Section, at_most

SPLITS: Final = ("train", "validation", "test")

STACKS: Final = (1, 3, 5)

LABEL_TOLERANCE: Final = 1e-3
"""Default of `label_tolerance`: a hundred times the error of rescaled 16-bit labels."""


LARGEST_SPACING: Final = 100.0
"""Millimetres of a pixel above which a spacing is a wrong unit."""


@dataclass(frozen=True)
class AugmentationSettings(Section):
    """Random changes of a training slice, drawn anew each time; zero disables a change.

    Attributes:
        flip: Probability of a left-right flip.
        rotate_degrees: Largest angle of rotation, drawn uniformly from plus/minus this value.
        scale: Relative change of size, drawn uniformly from [1 - scale, 1 + scale].
        shift: Largest shift as a fraction of the image side, drawn uniformly from plus/minus this
            value.
        gamma: Contrast exponent, exp(uniform(-gamma, gamma)), of the image scaled to [0, 1].
        brightness: Largest offset on the scale [-1, 1], drawn uniformly from plus/minus this value.
        noise: Largest standard deviation of Gaussian noise on the scale [-1, 1], drawn uniformly
            per slice.
        zoom: RAM-DSIR's augmentation: with probability one half, each side is enlarged by its own
            factor, drawn uniformly from [1, 1 + zoom], and a random window of the image's size is
            kept.
        intensity: Changes of intensity after nnU-Net's DA5, for `augmentation=strong`.
    """

    flip: float = 0.0
    rotate_degrees: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    gamma: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0
    zoom: float = 0.0
    intensity: IntensitySettings = field(default_factory=IntensitySettings)

    def checks(self) -> Checks:
        """Every amount is zero or more; probabilities and relative amounts stay below one."""
        yield 0 <= self.flip <= 1, "flip", "a probability in [0, 1]"
        yield 0 <= self.rotate_degrees <= 180, "rotate_degrees", "degrees in [0, 180]"
        yield 0 <= self.scale < 1, "scale", "a fraction in [0, 1)"
        yield 0 <= self.shift < 1, "shift", "a fraction in [0, 1)"
        for name in ("gamma", "brightness", "noise", "zoom"):
            yield getattr(self, name) >= 0, name, "zero or more"


def channels_of(stack: int) -> int:
    """Return the channels of a training slice: three, or the slices of a larger stack."""
    return max(3, stack)


@dataclass(frozen=True)
class DataSettings(Section):
    """Which images, which classes, and how a file becomes a training slice.

    Attributes:
        name: Short name of the data set, for folders and reports.
        root: Folder with `manifest.csv` or one folder per hospital; "" creates the synthetic
            hospitals.
        sites: The hospitals that take part; empty = all in `root`.
        classes: Class name -> raw label values, background first. A value belongs to one class.
        structures: Reported structure -> the classes it consists of (nested structures share
            classes).
        image_size: Side in pixels of the square training slice (height = width).
        stack: Slices of a volume as channels: 3 = z-1, z, z+1; 5 = z-2 to z+2; 1 = one slice,
            repeated. Ignored for a picture, whose channels are its colours or its repeated grey
            values; 5 is only for volumes.
        aspect: `squeeze` fills the training slice, so that a slice that is not square changes its
            shape; `pad` keeps the shape, with a dark margin.
        spacing: Side of a training slice's pixel in millimetres, the same at all hospitals; a slice
            that is too large for `image_size` is made smaller. 0 = every slice fills the training
            slice.
        plan: `fixed` takes the settings as they are; `auto` derives image_size, spacing, aspect,
            intensity and stack from the source hospitals' images in each fold of a simulation, as
            far as the command line does not set them (docs/explanation/plan.md).
        intensity: Scaling of an image to [-1, 1]: `percentile` (1st to 99th), `minmax`, `zscore`
            (three standard deviations map to 1), `fixed` (0 to -1 and 255 to 1, only for
            pictures with 8 bits per channel), or `flat`: the logarithm of the values between the
            percentiles minus its Gaussian blur in each slice, then `percentile`. It removes slow
            changes of brightness such as those of a coil, and the size of the values.
        flat_sigma: Standard deviation of the blur of `intensity=flat`, in pixels of the training
            slice, so that it is the same share of a slice at every resolution.
        activation: `softmax` over exclusive classes, or one `sigmoid` per structure.
        threshold: Probability above which a sigmoid structure is predicted; unused with softmax,
            where the most probable class is predicted.
        spacing_unit: `mm` reports surface distances also in millimetres; `pixel` does not, for
            images whose spacing is not real.
        label_tolerance: Largest distance of a mask's value from a whole number; label maps that
            were rescaled when saved contain values such as 0.9999999.
        largest_component: Keep only the largest connected component of each predicted structure;
            not for structures of several parts.
        fill_holes: Fill holes of each predicted structure, slice by slice.
        train_slices: `all`, or `foreground` = only slices with a declared structure.
        validation_fraction: Share of a source hospital's patients that is kept for validation.
        split: Which patients validate, where the manifest does not say it. `share`: those with the
            smallest hashes, as near to the share as whole patients allow. `hash`: those whose hash
            is below the share, the rule of the published studies (docs/results.md); few patients
            may then have none or half in validation. A real hospital always uses `share`, with a
            secret of its own.
        augmentation: Random changes of training slices.
    """

    name: str
    root: str
    classes: dict[str, list[int]]
    structures: dict[str, list[str]]
    sites: list[str]
    image_size: int = at_most(2048, 128)
    aspect: Literal["squeeze", "pad"] = "squeeze"
    spacing: float = 0.0
    plan: Literal["fixed", "auto"] = "fixed"
    stack: int = 3
    intensity: Literal["percentile", "minmax", "zscore", "fixed", "flat"] = "percentile"
    flat_sigma: float = at_most(2048, 20.0)
    activation: Literal["softmax", "sigmoid"] = "softmax"
    threshold: float = 0.5
    spacing_unit: Literal["mm", "pixel"] = "mm"
    label_tolerance: float = LABEL_TOLERANCE
    largest_component: bool = False
    fill_holes: bool = False
    train_slices: Literal["all", "foreground"] = "all"
    validation_fraction: float = 0.2
    split: Literal["share", "hash"] = "share"
    augmentation: AugmentationSettings = AugmentationSettings()

    def checks(self) -> Checks:
        """Classes are exclusive, structures are made of classes, sizes fit the network."""
        values = [value for group in self.classes.values() for value in group]
        yield len(self.classes) >= 2, "classes", "background and at least one more class"
        yield len(self.classes) <= MAX_CLASSES, "classes", f"at most {MAX_CLASSES} classes"
        few = len(self.structures) <= MAX_CLASSES
        yield few, "structures", f"at most {MAX_CLASSES} structures"
        yield len(values) == len(set(values)), "classes", "every label value in one class only"
        yield bool(self.structures), "structures", "at least one structure"
        known = set(list(self.classes)[1:])
        used = [name for group in self.structures.values() for name in group]
        yield (
            set(used) <= known and all(self.structures.values()),
            "structures",
            f"made of {sorted(known)}",
        )
        yield (
            self.image_size >= 32 and self.image_size % 16 == 0,
            "image_size",
            "32 or more and a multiple of 16",
        )
        yield self.stack in STACKS, "stack", "1, 3 or 5"
        yield self.flat_sigma >= 1, "flat_sigma", "1 pixel or more"
        yield 0 <= self.spacing <= LARGEST_SPACING, "spacing", f"0 to {LARGEST_SPACING:g} mm"
        expected = "mm: data.spacing needs real millimetres"
        yield not self.spacing or self.spacing_unit == "mm", "spacing_unit", expected
        yield 0 < self.threshold < 1, "threshold", "a probability in (0, 1)"
        yield 0 <= self.label_tolerance < 0.5, "label_tolerance", "a distance in [0, 0.5)"
        yield 0 <= self.validation_fraction < 1, "validation_fraction", "a fraction in [0, 1)"

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels of a training slice."""
        return channels_of(self.stack)

    @property
    def out_channels(self) -> int:
        """Output channels of the network: K with softmax, one per structure with sigmoid."""
        return self.num_classes if self.activation == "softmax" else len(self.structures)

    def structure_classes(self) -> dict[str, list[int]]:
        """Return structure name -> indices of its classes."""
        index = {name: position for position, name in enumerate(self.classes)}
        return {name: [index[part] for part in parts] for name, parts in self.structures.items()}
