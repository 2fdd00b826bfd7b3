"""Reads one DICOM series with pydicom and SimpleITK: one file a slice, or all slices in one file.

The order, position and orientation of the slices come from the headers (DICOM PS3.3 C.7.6.2.1.1),
never from file names. A series whose slices do not form one regular grid is refused: filling a gap
or sorting several time points is a decision of the hospital. A file without a position in the
patient, e.g. a photograph of the retina, is a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.images import multiframe
from fedsgcg.common.images.dicom_file import opened
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.formats import DICOM, is_dicom
from fedsgcg.common.images.itk import LPS_TO_RAS, plain_reason
from fedsgcg.common.images.parts import inside
from fedsgcg.common.images.pixels import picture_of
from fedsgcg.common.images.volume import MAX_BYTES, Volume, volume_of
from fedsgcg.common.names import number_of

Array = NDArray[Any]

SEGMENTATIONS: Final = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""SOP classes of Segmentation and Label Map Segmentation Storage."""

TAGS: Final = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("SeriesDescription", "SeriesNumber", "InstanceNumber", "Modality", "NumberOfFrames"),
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"),
    *("SpacingBetweenSlices", "SliceThickness"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
"""Attributes that are read of every file; patients' names and dates are not."""

ANGLE: Final = 1e-3
"""Largest difference of direction cosines within a series: scanners write few digits."""

GAP: Final = 0.1
"""Largest difference of the distances between slices, as a share of the usual distance."""

COMPARED: Final = ("Rows", "Columns", "PixelSpacing")


@dataclass(frozen=True)
class Source:
    """The files of a series, for a segmentation that refers to them.

    Attributes:
        files: One file a slice, in the order of the third axis of the file's (i, j, k); a single
            file of frames.
        series: SeriesInstanceUID.
        frame: FrameOfReferenceUID, "" if the series has none.
        instances: SOPInstanceUID of each file.
        frames: Number of the frame of each slice, from 1; () for one file a slice.
    """

    files: tuple[Path, ...]
    series: str
    frame: str
    instances: tuple[str, ...]
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Slice:
    """The header of one file, or of one frame of a file."""

    path: Path
    header: Any
    number: int = 0

    @property
    def name(self) -> str:
        """Name of the file, and the number of the frame."""
        return f"frame {self.number} of {self.path.name}" if self.number else self.path.name

    @property
    def position(self) -> Array:
        """(3,) mm, to the left, back and head."""
        return np.asarray([float(part) for part in self.header.ImagePositionPatient])

    @property
    def axes(self) -> Array:
        """(2, 3) directions of the columns' index and of the rows' index."""
        values = [float(part) for part in self.header.ImageOrientationPatient]
        return np.asarray(values).reshape(2, 3)

    def get(self, name: str) -> Any:
        """Return an attribute, "" without it."""
        return self.header.get(name, "")


def read(path: Path, *, mask: bool = False, series: str = "") -> Volume:
    """Read a series, a picture or, with `mask`, a segmentation.

    Args:
        path: Folder with one series, or one file.
        mask: Whether labels are wanted.
        series: Number or description of the series in a folder with several; "" for the only one.

    Raises:
        FedsgcgError: DAT-103 without DICOM images, DAT-106 for several images at one position or
            frames without positions, DAT-160 without pydicom or SimpleITK, DAT-161 for a missing
            slice, DAT-162 for several series, DAT-163 for slices that are not parallel or differ
            in size, DAT-164 for a segmentation where an image is needed, DAT-166 for overlapping
            segments.
    """
    if mask and (segmentations := segmentations_in(path)):
        from fedsgcg.common.images import segmentation

        return segmentation.read_labels(_only(segmentations, path))
    slices = _one_series(path, series)
    first = slices[0]
    if not first.get("ImagePositionPatient"):
        return _picture(slices, path, mask)
    slices = _sorted(slices, path)
    affine = LPS_TO_RAS @ _affine(slices)
    if len(slices) * int(first.header.Rows) * int(first.header.Columns) * 4 > MAX_BYTES:
        raise ValueError(f"{len(slices)} slices of {first.header.Rows}x{first.header.Columns}")
    array = _voxels(slices)
    if array.ndim != 3:
        found = f"{first.get('SamplesPerPixel')} values per pixel"
        action = "Export the series in grey values."
        raise fail("DAT-106", found=found, expected="grey", action=action, where=str(path))
    source = Source(
        tuple(dict.fromkeys(one.path for one in slices)),
        str(first.get("SeriesInstanceUID")),
        str(first.get("FrameOfReferenceUID")),
        tuple(dict.fromkeys(str(one.get("SOPInstanceUID")) for one in slices)),
        tuple(one.number for one in slices if one.number),
    )
    stated = bool(first.get("PixelSpacing")) and (len(slices) > 1 or _thickness(first) > 0)
    native = array.transpose(2, 1, 0)
    return volume_of(native, affine, has_size=stated, form=DICOM.name, source=source)


def _voxels(slices: Sequence[_Slice]) -> Array:
    """Return the pixels (k, row, column) of sorted slices."""
    if slices[0].number:
        return multiframe.voxels_of(slices[0].path, [one.number for one in slices])
    sitk = library("SimpleITK", DICOM.name)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in slices])
    try:
        return np.asarray(sitk.GetArrayFromImage(reader.Execute()))
    except RuntimeError as error:
        raise ValueError(plain_reason(error)) from error


def shape(path: Path) -> tuple[int, ...]:
    """Return (columns, rows, slices) from the headers; two numbers for a picture."""
    slices = _one_series(path)
    header = slices[0].header
    size = (int(header.Columns), int(header.Rows))
    return (*size, len(slices)) if slices[0].get("ImagePositionPatient") else size


def is_picture(path: Path) -> bool:
    """Whether a path is one DICOM file without a position in the patient."""
    if path.is_dir():
        return False
    try:
        header = _header(path)
    except FedsgcgError:  # reported with its code when the file is read
        return False
    frames = header is not None and multiframe.EACH in header
    return header is not None and not frames and not header.get("ImagePositionPatient")


def segmentations_in(path: Path) -> list[Path]:
    """Return the segmentation that a path is, or all of a folder, sorted."""
    return [
        file
        for file in (inside(path) if path.is_dir() else [path])
        if is_dicom(file) and (one := _header(file)) and one.get("SOPClassUID") in SEGMENTATIONS
    ]


def _only(segmentations: Sequence[Path], path: Path) -> Path:
    """Return the only segmentation; raises DAT-162 for several, whose grids may differ."""
    if len(segmentations) > 1:
        names = ", ".join(one.name for one in segmentations[:4])
        raise fail(
            "DAT-162",
            found=f"{len(segmentations)} segmentations: {names}",
            expected="one segmentation",
            action="Use them as the mask of their DICOM series, where several are read.",
            where=str(path),
        )
    return segmentations[0]


def _header(path: Path) -> Any:
    """Return the wanted attributes of a file, None if it is not DICOM."""
    pydicom = library("pydicom", DICOM.name)
    try:
        with opened(path) as file:
            return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
    except pydicom.errors.InvalidDicomError:
        return None


def _one_series(path: Path, wanted: str = "") -> list[_Slice]:
    """Return the images of the only series of a folder or file, or of the one that is wanted."""
    files = [file for file in inside(path) if is_dicom(file)] if path.is_dir() else [path]
    headers = [_Slice(file, header) for file in files if (header := _header(file)) is not None]
    segments = [one for one in headers if one.get("SOPClassUID") in SEGMENTATIONS]
    images = [one for one in headers if one.get("Rows") and one not in segments]
    if segments and not images:
        raise fail(
            "DAT-164",
            found="a segmentation",
            expected="the series of images that it was drawn on",
            action="Name the folder of the images; the segmentation is their mask.",
            where=str(path),
        )
    if not images:
        raise ValueError("no DICOM image" if path.is_dir() else "not a DICOM image")
    chosen = [one for one in images if not wanted or _is_called(one, wanted)]
    if len({str(one.get("SeriesInstanceUID")) for one in chosen}) != 1:
        raise _several_series(images, path, wanted)
    images = chosen
    several = [one for one in images if int(one.get("NumberOfFrames") or 1) > 1]
    return _frames(several[0], len(images), path) if several else images


def _frames(one: _Slice, files: int, path: Path) -> list[_Slice]:
    """Return the frames of the only file of a series as slices."""
    frames = multiframe.frames_of(one.header)
    slices = [_Slice(one.path, frame, number) for number, frame in enumerate(frames, 1)]
    if files == 1 and slices and all(frame.get("ImagePositionPatient") for frame in slices):
        return slices
    found = f"{one.path.name} has {number_of(int(one.get('NumberOfFrames')), 'frame')}"
    found += f" and the series {files} files" if files > 1 else " without positions in the patient"
    raise fail(
        "DAT-106",
        found=found,
        expected="one file a slice, or one file with the position of every frame",
        action="Convert it with dcm2niix: dcm2niix -z y -o OUT FOLDER.",
        where=str(path),
    )


def _is_called(one: _Slice, wanted: str) -> bool:
    """Whether a file belongs to the series of a number or description."""
    names = (str(one.get("SeriesNumber")), str(one.get("SeriesDescription")))
    return wanted.strip().casefold() in {name.strip().casefold() for name in names}


def _several_series(images: Sequence[_Slice], path: Path, wanted: str) -> FedsgcgError:
    counts = Counter(
        (str(one.get("SeriesInstanceUID")), str(one.get("SeriesNumber"))) for one in images
    )
    names = {str(one.get("SeriesInstanceUID")): one.get("SeriesDescription") for one in images}
    texts = [
        f"number {number or '?'} {names[uid]!s} ({number_of(count, 'file')})"
        for (uid, number), count in sorted(counts.items())
    ]
    return fail(
        "DAT-162",
        found=f"{len(counts)} series: {', '.join(texts[:6])}",
        expected=f"one series called {wanted!r}" if wanted else "one series a folder",
        action="Move each series into a folder of its own, or convert them with dcm2niix, which "
        "writes one file a series: dcm2niix -z y -o OUT FOLDER. `predict` chooses one by its "
        "number or description: --series.",
        where=str(path),
    )


def _sorted(slices: Sequence[_Slice], path: Path) -> list[_Slice]:
    """Return the slices along their normal, after checking that they are one regular grid."""
    missing = [
        one
        for one in slices
        if len(one.get("ImagePositionPatient") or ()) != 3
        or len(one.get("ImageOrientationPatient") or ()) != 6
    ]
    if missing:
        raise _irregular(f"{missing[0].name} has no position", "a position in each", path)
    axes = slices[0].axes
    turned = [one for one in slices if np.abs(one.axes - axes).max() > ANGLE]
    if turned:
        usual = number_of(len(slices) - len(turned), "slice")
        found = f"two orientations: {usual} like {slices[0].name}, "
        found += f"{len(turned)} like {turned[0].name}"
        raise _irregular(found, "parallel slices", path)
    for name in COMPARED:
        if len(values := Counter(str(one.get(name)) for one in slices)) > 1:
            found = f"{name} " + " and ".join(sorted(values)[:3])
            raise _irregular(found, "slices of one size", path)
    normal = np.cross(*axes)
    ordered = sorted(slices, key=lambda one: float(one.position @ normal))
    _check_gaps(ordered, normal, path)
    return ordered


def _check_gaps(slices: Sequence[_Slice], normal: Array, path: Path) -> None:
    """Check that the slices are at equal distances along their normal."""
    if len(slices) < 2:
        return
    gaps = np.diff([float(one.position @ normal) for one in slices])
    usual = float(np.median(gaps))
    if (repeated := np.flatnonzero(gaps < max(1e-3, GAP * usual))).size:
        first, second = slices[repeated[0]].name, slices[repeated[0] + 1].name
        raise fail(
            "DAT-106",
            found=f"{repeated.size + 1} or more images at one position ({first}, {second})",
            expected="one image at each position",
            action="Keep one time point, echo or copy: dcm2niix writes one file for each.",
            where=str(path),
        )
    wide = np.flatnonzero(np.abs(gaps - usual) > GAP * usual)
    if wide.size:
        where, gap = int(wide[0]), float(gaps[wide[0]])
        absent = round(gap / usual) - 1
        found = f"{gap:.4g} mm after {slices[where].name}, {usual:.4g} mm elsewhere"
        if absent > 0:
            found += f": {absent} of {len(slices) + absent} slices missing there"
        raise fail(
            "DAT-161",
            found=found,
            expected="slices at equal distances",
            action="Export the series again and compare the number of files with the archive; "
            "resample a series that was acquired with varying distances.",
            where=str(path),
        )
    steps = np.diff([one.position for one in slices], axis=0)
    aside = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max()
    if aside > GAP * usual:
        found = f"slices shifted by {aside:.3g} mm against each other (tilted gantry)"
        raise _irregular(found, "slices above each other", path)


def _irregular(found: str, expected: str, path: Path) -> FedsgcgError:
    action = (
        "Remove what is not part of the stack (localizers, other planes), or convert the series "
        "with dcm2niix: dcm2niix -z y -o OUT FOLDER."
    )
    return fail("DAT-163", found=found, expected=expected, action=action, where=str(path))


def _affine(slices: Sequence[_Slice]) -> NDArray[np.float64]:
    """Return the affine (column, row, slice) -> mm to the left, back and head."""
    first, last = slices[0], slices[-1]
    rows, columns = ([float(part) for part in first.get("PixelSpacing")] or [1.0, 1.0])[:2]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.axes[0] * columns, first.axes[1] * rows
    if len(slices) > 1:
        affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    else:
        affine[:3, 2] = np.cross(*first.axes) * (_thickness(first) or 1.0)
    affine[:3, 3] = first.position
    return affine


def _thickness(one: _Slice) -> float:
    """Return the distance of slices that a header states in mm, 0 without one."""
    return float(one.get("SpacingBetweenSlices") or one.get("SliceThickness") or 0)


def _picture(slices: Sequence[_Slice], path: Path, mask: bool) -> Volume:
    """Return the picture of a file without a position."""
    if len(slices) > 1:
        found = f"{len(slices)} images without a position in the patient"
        action = "They are pictures: give each its own file, not their folder."
        raise fail("DAT-106", found=found, expected="one picture", action=action, where=str(path))
    (one,) = slices
    sitk = library("SimpleITK", DICOM.name)
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(one.path)))[0]
    if one.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = pixels.max() - pixels
    return picture_of(pixels, path, mask=mask, form=DICOM.name)
