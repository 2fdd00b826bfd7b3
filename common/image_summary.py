"""What hospitals state about their images, and the preprocessing that follows from it.

The idea is nnU-Net's: fingerprints of the data decide spacing, size and intensity by fixed rules
(Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z). Here a hospital states medians
and quartiles of its images, never a single image's values, and the rules merge them, so that the
images need not be in one place. Masks are not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import KINDS, PICTURE

IMAGE_SUMMARY: Final = "image_summary"
"""Name of the summary in an enrolment, and in `sharing` of a `site.yaml` that allows it."""

STEP: Final = 16
"""Sides of a training slice are multiples of it: the U-Net halves it four times."""

LEAST_SIDE: Final = 64
MOST_SIDE: Final = 384
"""Largest side that is planned, that of the published prostate data; beyond it spacing grows."""

UPPER: Final = 0.75
"""Quantile of the extents that fits into the training slice without being made smaller."""

FEWEST_NEIGHBOURS: Final = 3
"""Slices of a volume from which on the neighbours of a slice are channels."""

PLANNED: Final = ("image_size", "spacing", "aspect", "intensity", "stack")
"""Settings of the data that a plan decides."""


@dataclass(frozen=True)
class Facts:
    """Properties of one image; they do not leave the hospital.

    Attributes:
        patient: Its patient.
        kind: One of `common.images.read.KINDS`.
        colour: Whether it is a picture with colours.
        eight_bit: Whether its values are 0 to 255 by definition.
        shape: Slices, rows, columns.
        spacing: (sz, sy, sx) in mm, None if unknown.
        values: 1st, 50th and 99th percentile.
    """

    patient: str
    kind: str
    colour: bool
    eight_bit: bool
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    values: tuple[float, float, float]


@dataclass(frozen=True)
class HospitalSummary:
    """What one hospital states about its images.

    Attributes:
        patients: Number of patients; the weight of the hospital.
        kind: Kind of its images.
        colour: Whether most of its pictures have colours.
        eight_bit: Whether all its images are pictures with 8 bits per channel.
        shape: Medians of slices, rows and columns.
        longest: Upper quartile of the longer side of a slice in pixels.
        spacing: Medians of (sz, sy, sx) in mm, None if any image has no voxel size.
        extent: Upper quartile of the longer side of a slice in mm, None without spacing.
        values: Medians of the 1st, 50th and 99th percentile of the images' values.
    """

    patients: int
    kind: str
    colour: bool
    eight_bit: bool
    shape: tuple[int, int, int]
    longest: float
    spacing: tuple[float, float, float] | None
    extent: float | None
    values: tuple[float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stated: object, most_patients: int) -> HospitalSummary | None:
        """Return the summary that a hospital states in a message, None if it is not one.

        Args:
            stated: Content of the message.
            most_patients: Most patients that count: those with which the hospital enrolled.
        """
        if not isinstance(stated, Mapping):
            return None
        spacing, shape, values = (
            _numbers(stated.get(name), least, most)
            for name, least, most in (
                ("spacing", 1e-3, 1e3),
                ("shape", 1, 1e5),
                ("values", -1e12, 1e12),
            )
        )
        longest, extent, patients = (
            _numbers([stated.get(name)] * 3, least, most)
            for name, least, most in (
                ("longest", 1, 1e5),
                ("extent", 1e-3, 1e5),
                ("patients", 1, 1e9),
            )
        )
        kind = stated.get("kind")
        if (
            kind not in KINDS
            or not (shape and values and longest and patients)
            or most_patients < 1
        ):
            return None
        known = spacing is not None and extent is not None
        return cls(
            patients=min(most_patients, int(patients[0])),
            kind=str(kind),
            colour=stated.get("colour") is True,
            eight_bit=stated.get("eight_bit") is True,
            shape=(int(shape[0]), int(shape[1]), int(shape[2])),
            longest=longest[0],
            spacing=spacing if known else None,
            extent=extent[0] if known and extent else None,
            values=values,
        )


def summarise(facts: Sequence[Facts], floor: int = 1) -> HospitalSummary | None:
    """Return the summary of a hospital, None if it would cover fewer patients than the floor.

    Images of another kind than most are left out, as in training.

    Args:
        facts: Its images.
        floor: Fewest patients that a number covers.
    """
    if not facts:
        return None
    count = {kind: sum(one.kind == kind for one in facts) for kind in KINDS}
    kind = max(KINDS, key=lambda one: (count[one], -KINDS.index(one)))
    used = [one for one in facts if one.kind == kind]
    patients = len({one.patient for one in used})
    if patients < max(1, floor):
        return None
    sizes = [one.spacing for one in used if one.spacing is not None]
    known = len(sizes) == len(used)
    extents = [
        max(rows * one.spacing[1], columns * one.spacing[2])
        for one in used
        if one.spacing is not None
        for _, rows, columns in (one.shape,)
    ]
    colours = sum(one.colour for one in used)
    return HospitalSummary(
        patients=patients,
        kind=kind,
        colour=2 * colours > len(used),
        eight_bit=all(one.eight_bit for one in used),
        shape=_medians([one.shape for one in used], int),
        longest=_quantile([max(one.shape[1:]) for one in used]),
        spacing=_medians(sizes, _digits) if known else None,
        extent=_quantile(extents) if known else None,
        values=_medians([one.values for one in used], _digits),
    )


def merge_summaries(
    summaries: Mapping[str, HospitalSummary],
    *,
    millimetres: bool = True,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings of `PLANNED` that follow from the source hospitals' summaries.

    Args:
        summaries: Source hospital -> summary; the held-out hospital is not among them.
        millimetres: Whether voxel sizes are real (`data.spacing_unit`).
        given: Settings of `PLANNED` that the user has set; they are kept and the others fit them.

    Raises:
        FedsgcgError: CFG-030 without a summary, CFG-031 for pictures and volumes, or volumes of
            different planes.
    """
    fixed = dict(given or {})
    if not summaries:
        raise fail(
            "CFG-030",
            where="data.plan",
            found="no source hospital whose images can be summarised",
            expected="one or more",
            action="see `fedsgcg data check`, or set data.plan=fixed",
        )
    kinds = {one.kind for one in summaries.values()}
    if len(kinds) > 1:
        raise fail(
            "CFG-031",
            where="data.plan",
            found=", ".join(f"{one.kind} at {site}" for site, one in sorted(summaries.items())),
            expected="one kind of image at all source hospitals",
            action="use hospitals of one kind (data.sites), or set data.plan=fixed",
        )
    found = [summaries[site] for site in sorted(summaries)]
    plan = {**_geometry(found, fixed, millimetres=millimetres), **_values(found)}
    return {name: fixed.get(name, plan[name]) for name in PLANNED}


def _geometry(
    found: Sequence[HospitalSummary], fixed: Mapping[str, Any], *, millimetres: bool
) -> dict[str, Any]:
    """Return side, spacing and aspect."""
    extents = [one.extent for one in found if one.extent is not None]
    sized = millimetres and len(extents) == len(found)
    if not sized or fixed.get("spacing") == 0:
        side = _side(weighted_median([(one.longest, one.patients) for one in found]))
        return {"image_size": fixed.get("image_size", side), "spacing": 0.0, "aspect": "pad"}
    sides = [
        (math.sqrt(one.spacing[1] * one.spacing[2]), one.patients) for one in found if one.spacing
    ]
    spacing = float(fixed.get("spacing", _digits(weighted_median(sides))))
    extent = max(extents)
    side = int(fixed.get("image_size", _side(extent / spacing)))
    if "spacing" not in fixed and side * spacing < extent * (1 - 1e-6):
        spacing = _digits_up(extent / side)
    return {"image_size": side, "spacing": spacing, "aspect": "pad"}


def _values(found: Sequence[HospitalSummary]) -> dict[str, Any]:
    """Return intensity rule and stack."""
    depth = weighted_median([(one.shape[0], one.patients) for one in found])
    pictures = found[0].kind == PICTURE
    return {
        "intensity": "fixed" if all(one.eight_bit for one in found) else "percentile",
        "stack": 3 if not pictures and depth >= FEWEST_NEIGHBOURS else 1,
    }


def weighted_median(pairs: Sequence[tuple[float, int]]) -> float:
    """Return the smallest value that at least half of the weight does not exceed.

    Args:
        pairs: (value, weight), one or more.
    """
    ordered = sorted(pairs)
    half, total = sum(weight for _, weight in ordered) / 2, 0
    for value, weight in ordered:
        total += weight
        if total >= half:
            return float(value)
    raise AssertionError("no weight")


def _numbers(stated: object, least: float, most: float) -> tuple[float, float, float] | None:
    """Return three numbers of a message, None for anything else or a number out of bounds."""
    if not isinstance(stated, list | tuple) or len(stated) != 3:
        return None
    plain = [float(one) for one in stated if type(one) in (int, float)]
    if len(plain) < 3 or not all(least <= one <= most for one in plain):
        return None
    return plain[0], plain[1], plain[2]


def _side(pixels: float) -> int:
    """Return the side of a training slice for so many pixels."""
    return min(MOST_SIDE, max(LEAST_SIDE, STEP * math.ceil(pixels / STEP - 1e-9)))


def _digits(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")


def _digits_up(value: float) -> float:
    """Round up to three significant digits."""
    rounded = _digits(value)
    return (
        rounded
        if rounded >= value
        else _digits(value + 0.5 * 10 ** (math.floor(math.log10(value)) - 2))
    )


def _quantile(values: Sequence[float]) -> float:
    return _digits(float(np.quantile(np.asarray(values, np.float64), UPPER)))


def _medians(rows: Sequence[Sequence[float]], kind: Any) -> Any:
    return tuple(kind(float(value)) for value in np.median(np.asarray(rows, np.float64), axis=0))
