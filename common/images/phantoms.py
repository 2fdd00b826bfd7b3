"""Synthetic hospitals: pelvis-like MRI with a gland to segment, each with its own scanner.

The anatomy (fat, muscles, bones, bladder, rectum, a gland with two zones) varies between patients
in the same way everywhere. Hospitals differ in the scanner: tissue contrast, bias field, sharpness,
noise, coil hot spot, field of view, voxel size and orientation of the file. So a model trained on
three of them meets a domain shift at the fourth.

Legend: Z, Y, X = slices (inferior to superior), rows (anterior to posterior), columns (right to
left); lengths in mm.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedsgcg.common.images.read import affine_as, write_volume
from fedsgcg.common.seeding import stream

Image = NDArray[np.float32]
Point = tuple[float, float, float]

SITES = ("East", "North", "South", "West")
# Part of the name of their folder; to be raised when the images change, so that old ones are not
# used.
VERSION = 2
SOFT_EDGE_MM = 1.0

# Brightness of tissue on a T2-weighted image, bladder = 1.
T2: Mapping[str, float] = {
    "fat": 0.80,
    "muscle": 0.20,
    "marrow": 0.55,
    "cortex": 0.05,
    "fluid": 1.00,
    "wall": 0.33,
    "gas": 0.03,
    "fascia": 0.52,
    "capsule": 0.16,
    "peripheral": 0.80,
    "central": 0.42,
    "nodule": 0.60,
    "vessel": 0.95,
}


@dataclass(frozen=True)
class Scanner:
    """How one hospital's scanner shows the same anatomy.

    Attributes:
        orientation: nibabel axis codes of its files.
        field_of_view: Side of the square image in mm.
        matrix: Pixels per side, relative to the requested shape.
        thickness: Slice thickness in mm.
        contrast: Tissues whose brightness differs from `T2`.
        gamma: Exponent on the tissue contrast.
        blur: Standard deviation of the point spread in mm.
        noise: Standard deviation of the receiver noise, bladder = 1 (Rician, as in magnitude
            images).
        bias: Strength of the smooth multiplicative field (standard deviation of its logarithm).
        coil: Relative brightness added at a coil in the rectum, and its 1 / e range in mm.
        gain: Stored value of the bladder.
    """

    orientation: tuple[str, str, str]
    field_of_view: float
    matrix: float
    thickness: float
    contrast: Mapping[str, float] = field(default_factory=dict)
    gamma: float = 1.0
    blur: float = 0.7
    noise: float = 0.03
    bias: float = 0.12
    coil: tuple[float, float] = (0.0, 30.0)
    gain: float = 1000.0


SCANNERS = (
    # A reference scanner with little noise.
    Scanner(("L", "P", "S"), 130.0, 1.0, 4.0),
    # Fat suppression, steep contrast, noise; files in the orientation of most research tools.
    Scanner(
        ("R", "A", "S"),
        field_of_view=140.0,
        matrix=1.1,
        thickness=3.6,
        contrast={"fat": 0.34, "marrow": 0.30, "fascia": 0.36},
        gamma=1.25,
        blur=1.0,
        noise=0.055,
        bias=0.2,
        gain=350.0,
    ),
    # An old scanner with a coil in the rectum: blurred, low contrast; permuted axes in the file.
    Scanner(
        ("P", "S", "L"),
        field_of_view=122.0,
        matrix=0.9,
        thickness=4.4,
        contrast={"muscle": 0.30, "fascia": 0.50, "central": 0.42, "fluid": 0.85},
        gamma=0.9,
        blur=1.1,
        noise=0.04,
        bias=0.2,
        coil=(0.8, 28.0),
        gain=4200.0,
    ),
    # Closer to T1 weighting: fluid is dark, fat bright, and the gland's zones differ less.
    Scanner(
        ("L", "A", "S"),
        field_of_view=134.0,
        matrix=1.2,
        thickness=4.0,
        contrast={
            "muscle": 0.28,
            "fascia": 0.44,
            "fluid": 0.55,
            "peripheral": 0.76,
            "central": 0.50,
            "nodule": 0.56,
            "wall": 0.36,
            "vessel": 0.60,
            "fat": 0.92,
        },
        blur=0.8,
        noise=0.04,
        bias=0.2,
        coil=(0.2, 45.0),
        gain=800.0,
    ),
)


def write_hospitals(
    root: Path,
    *,
    sites: Sequence[str] = SITES,
    cases_per_site: int = 8,
    shape: tuple[int, int, int] = (12, 80, 80),
    seed: int = 0,
) -> Path:
    """Write synthetic hospitals as NIfTI with a `manifest.csv`.

    Args:
        root: Folder to write to; created if missing.
        sites: Names of the hospitals; the k-th gets the k-th scanner (they repeat after four).
        cases_per_site: Patients per hospital.
        shape: (Z, Y, X) of an image, before the scanner's own matrix size.
        seed: Seed; a patient depends on the seed, the site's name and scanner, and its number.

    Returns:
        `root`.
    """
    rows = [["site", "image", "mask", "patient_id"]]
    for position, site in enumerate(sites):
        (root / site).mkdir(parents=True, exist_ok=True)
        scanner = SCANNERS[position % len(SCANNERS)]
        for number in range(1, cases_per_site + 1):
            patient = f"{site}-{number:03d}"
            names = [f"{site}/{patient}_{kind}.nii.gz" for kind in ("image", "mask")]
            image, mask, affine = make_patient(
                scanner, shape, stream(seed, "phantom", site, number)
            )
            write_volume(root / names[0], image, affine)
            write_volume(root / names[1], mask, affine)
            rows.append([site, *names, patient])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return root


def make_patient(
    scanner: Scanner, shape: tuple[int, int, int], rng: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """Draw one patient as one scanner sees it.

    Args:
        scanner: The scanner.
        shape: (Z, Y, X) before the scanner's own matrix size.
        rng: Source of the patient's anatomy and of the noise.

    Returns:
        Image and mask (Z, Y, X) in canonical orientation, the mask 1 in the gland, and the (4, 4)
        affine of the file.
    """
    rows, columns = (max(16, round(size * scanner.matrix)) for size in shape[1:])
    spacing = (scanner.thickness, scanner.field_of_view / rows, scanner.field_of_view / columns)
    patient = Patient((shape[0], rows, columns), spacing, {**T2, **scanner.contrast}, rng)
    patient.draw_pelvis()
    rectum = patient.draw_rectum()
    patient.draw_bladder()
    gland = patient.draw_gland()
    image = _scan(patient, scanner, rectum)
    mask = np.asarray(gland > 0, dtype=np.uint8)
    return image, mask, _affine(scanner.orientation, image.shape, spacing, rng)


class Patient:
    """One patient's tissue on the grid of one scan; later tissue covers earlier tissue.

    Attributes:
        value: (Z, Y, X) brightness of the tissue.
        body: (Z, Y, X) whether a voxel is inside the body.
        rng: The patient's random generator.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: Point,
        tissue: Mapping[str, float],
        rng: np.random.Generator,
    ) -> None:
        axes = [
            (np.arange(size) - (size - 1) / 2) * step
            for size, step in zip(shape, spacing, strict=True)
        ]
        self.z, self.y, self.x = (axis.astype(np.float32) for axis in np.ix_(*axes))
        self.value: Image = np.zeros(shape, np.float32)
        self.body: NDArray[np.bool_] = np.zeros(shape, np.bool_)
        self.spacing = spacing
        self.tissue = tissue
        self.rng = rng
        self.size = rng.uniform(0.94, 1.08)
        growth = rng.uniform(0.8, 1.3)
        reach = float(abs(axes[0]).max())
        self.radii: Point = (
            reach * rng.uniform(0.55, 0.72),
            13.0 * growth * rng.uniform(0.92, 1.1),
            19.5 * growth ** (2 / 3) * rng.uniform(0.92, 1.1),
        )
        self.centre: Point = (
            rng.normal(-0.1, 0.05) * reach,
            rng.normal(-3.0, 2.0),
            rng.normal(0.0, 2.0),
        )

    def ellipsoid(
        self, centre: Sequence[float], radii: Sequence[float], tilt: float = 0.0
    ) -> Image:
        """Return the approximate signed distance (Z, Y, X) in mm to an ellipsoid, positive inside.

        The tilt is in radians.
        """
        y, x = self.y - np.float32(centre[1]), self.x - np.float32(centre[2])
        cosine, sine = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
        squares = ((y * cosine - x * sine) / radii[1]) ** 2 + (
            (y * sine + x * cosine) / radii[2]
        ) ** 2
        radius = np.sqrt(squares + ((self.z - np.float32(centre[0])) / radii[0]) ** 2)
        return np.asarray((1.0 - radius) * min(radii[1], radii[2]), dtype=np.float32)

    def paint(self, inside: Image, value: float | Image) -> None:
        """Draw tissue where `inside` > 0, with a soft edge."""
        weight = np.clip(inside / SOFT_EDGE_MM + 0.5, 0, 1)
        self.value += weight * (value - self.value)

    def bumps(self, strength: float, width: float) -> Image:
        """Return smooth (Z, Y, X) noise of standard deviation `strength`, bumps `width` mm wide."""
        sigmas = [width / step for step in self.spacing]
        rough = self.rng.standard_normal(self.value.shape, dtype=np.float32)
        smooth = ndimage.gaussian_filter(rough, sigmas, truncate=2.0)
        return np.asarray(smooth * (strength / max(float(smooth.std()), 1e-9)), dtype=np.float32)

    def draw_pelvis(self) -> None:
        """Draw fat, muscles, hip and pubic bones, and the loose tissue around the gland."""
        tissue = self.tissue
        size = self.size
        jitter = self.rng.normal(0, 1.5, 6)
        outline = self.ellipsoid((0, 4, 0), (900, 60 * size, 84 * size))
        self.body = np.asarray(outline > 0)
        self.paint(outline, tissue["fat"] * self.rng.uniform(0.92, 1.05))
        self.paint(self.ellipsoid((0, 6, 0), (400, 49 * size, 72 * size)), tissue["muscle"] * 1.15)
        self.paint(
            self.ellipsoid((0, 4, 0), (120, 37 * size, 29 * size)),
            tissue["fascia"] + self.bumps(0.07, 2.5),
        )
        for sign in (-1, 1):
            self._bone((0, 2 + jitter[0], sign * 61 * size), (70, 21, 18), 0.0)
            self._bone((-16, -36 * size + jitter[1], sign * 14), (34, 9, 13), sign * 0.5)
            self.paint(
                self.ellipsoid((0, 3 + jitter[2], sign * 38 * size), (90, 27, 8), sign * 0.12),
                tissue["muscle"],
            )
            self.paint(
                self.ellipsoid((0, 8, sign * 26 * size), (60, 22, 3.6), -sign * 0.16),
                tissue["muscle"] * 0.9,
            )
            self.paint(
                self.ellipsoid((0, 44 * size, sign * 28), (80, 13, 22), sign * 0.5),
                tissue["muscle"] * 1.3,
            )
        for _ in range(8):
            at = (
                self.rng.uniform(-22, 22),
                self.rng.uniform(-20, 12),
                self.rng.choice((-1, 1)) * self.rng.uniform(21, 25),
            )
            self.paint(self.ellipsoid(at, (9, 1.9, 1.5)), tissue["vessel"])

    def _bone(self, centre: Sequence[float], radii: Point, tilt: float) -> None:
        """Draw marrow inside a dark cortex two millimetres thick."""
        distance = self.ellipsoid(centre, radii, tilt)
        self.paint(distance, self.tissue["cortex"])
        self.paint(distance - 2.0, self.tissue["marrow"])

    def draw_rectum(self) -> Point:
        """Draw the rectum, in some patients filled with gas; return its centre."""
        wide = self.rng.uniform(9, 13)
        depth = self.centre[1] + self.radii[1] + wide * 0.8 + self.rng.uniform(0.5, 2.5)
        centre = (0.0, depth, self.centre[2] + self.rng.normal(0, 2))
        distance = self.ellipsoid(centre, (150, wide * 0.85, wide))
        self.paint(distance, self.tissue["wall"])
        content = self.tissue["gas"] if self.rng.random() < 0.5 else self.tissue["wall"] * 1.5
        self.paint(distance - 2.5, content + self.bumps(0.03, 2.0))
        return centre

    def draw_bladder(self) -> None:
        """Draw the bladder above the gland, with its wall."""
        height = 18.0 * self.rng.uniform(0.8, 1.1)
        centre = (self.centre[0] + self.radii[0] * 0.9 + height, self.centre[1] - 8, self.centre[2])
        distance = self.ellipsoid(centre, (height, 21, 27))
        self.paint(distance, self.tissue["wall"])
        self.paint(distance - 2.5, self.tissue["fluid"])

    def draw_gland(self) -> Image:
        """Draw the gland with capsule, zones and nodules; return the distance inside it in mm."""
        tissue = self.tissue
        centre = self.centre
        radii = self.radii
        tilt = self.rng.normal(0, 0.1)
        whole = self.ellipsoid(centre, radii, tilt) + self.bumps(0.8, 7.0)
        self.paint(whole + 1.5, tissue["capsule"])
        self.paint(whole, tissue["peripheral"] + self.bumps(0.06, 2.0))
        inner = (radii[0] * 0.95, radii[1] * 0.70, radii[2] * 0.76)
        central = self.ellipsoid((centre[0], centre[1] - radii[1] * 0.24, centre[2]), inner, tilt)
        self.paint(np.minimum(central, whole), tissue["central"] + self.bumps(0.07, 2.2))
        for _ in range(int(self.rng.integers(3, 7))):
            at = [centre[axis] + self.rng.uniform(-0.5, 0.3) * radii[axis] for axis in range(3)]
            nodule = self.ellipsoid(at, (6.0, *self.rng.uniform(2.0, 5.0, 2)))
            self.paint(
                np.minimum(nodule, whole),
                tissue["nodule"] * self.rng.uniform(0.6, 1.3) + self.bumps(0.04, 1.5),
            )
        return whole


def _scan(patient: Patient, scanner: Scanner, coil_at: Point) -> NDArray[np.int16]:
    """Return the stored image: contrast, point spread, coil, bias field, Rician noise, rounding."""
    rng, spacing = patient.rng, patient.spacing
    texture = patient.bumps(0.03, 1.5) * patient.body
    image = np.clip(patient.value + texture, 0, None) ** np.float32(scanner.gamma)
    image = ndimage.gaussian_filter(
        image, [0.2, scanner.blur / spacing[1], scanner.blur / spacing[2]]
    )
    strength, reach = scanner.coil
    distance = np.hypot(patient.y - coil_at[1], patient.x - coil_at[2])
    image = (
        image
        * (1.0 + strength * np.exp(-distance / reach))
        * np.exp(scanner.bias * _smooth_field(patient))
    )
    noise = rng.normal(0, scanner.noise, (2, *image.shape))
    magnitude = np.hypot(image + noise[0], noise[1]) * scanner.gain * rng.uniform(0.8, 1.25)
    return np.asarray(np.clip(magnitude, 0, 32767).round(), dtype=np.int16)


def _smooth_field(patient: Patient) -> Image:
    """Return a smooth (Z, Y, X) field with mean zero and standard deviation one."""
    total = np.zeros(patient.value.shape, np.float32)
    for _ in range(4):
        wave = patient.rng.normal(0, 1, 3) * (0.01, 0.022, 0.022)
        phase = patient.rng.uniform(0, 2 * np.pi)
        total += np.cos(
            patient.z * wave[0] + patient.y * wave[1] + patient.x * wave[2] + phase
        ).astype(np.float32)
    return np.asarray((total - total.mean()) / max(float(total.std()), 1e-6), dtype=np.float32)


def _affine(
    codes: tuple[str, str, str], shape: tuple[int, ...], spacing: Point, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the affine of a slightly oblique file with axes `codes`, for a (Z, Y, X) grid."""
    tilt = rng.uniform(-0.06, 0.06)
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    canonical = np.eye(4)
    canonical[:3, :3] = turn @ np.diag([-spacing[2], -spacing[1], spacing[0]])
    canonical[:3, 3] = rng.uniform(-20, 20, 3) - canonical[:3, :3] @ (
        (np.array(shape[::-1]) - 1) / 2
    )
    return affine_as(codes, canonical, shape)
