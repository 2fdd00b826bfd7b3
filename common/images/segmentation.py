"""Reads and writes DICOM segmentations (DICOM-SEG) with highdicom.

Legend: S = segments; Z, Y, X = slices, rows, columns of the canonical image; i, j, k = axes of the
image's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.images.dicom import Source
from fedsgcg.common.images.dicom_file import opened
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.itk import LPS_TO_RAS
from fedsgcg.common.images.layers import OUTSIDE, Layers, plain
from fedsgcg.common.images.volume import (
    GEOMETRY_TOLERANCE,
    Volume,
    from_canonical,
    to_canonical_like,
    volume_of,
)

Array = NDArray[Any]

FORM: Final = "DICOM-SEG"
SCHEME: Final = "99FEDSGCG"
"""Private coding scheme of the classes' names: which code of SNOMED they have is not known here."""

SAME: Final = 0.9
"""Share of the larger segment from which on two that overlap are drawings of one structure."""

MAY_BE_EMPTY: Final = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
"""Attributes that a segmentation takes from its images and that may have no value (type 2)."""


def read_layers(path: Path, image: Volume) -> Layers:
    """Return the segments of a segmentation on the grid of its image.

    Frames that the file leaves out are empty.

    Args:
        path: The segmentation.
        image: The image; if it is a DICOM series, the segmentation must refer to it.

    Raises:
        FedsgcgError: DAT-103 for a damaged file, DAT-105 if the grids differ, DAT-160 without
            highdicom, DAT-164 if it refers to other images.
    """
    found = _open(path)
    if isinstance(image.source, Source):
        _check_references(found, image.source, path)
    numbers, names = _segments(found)
    layers, affine = _voxels(found)
    native = _on_grid(layers, affine, image, path)
    masks = np.stack([to_canonical_like(layer, image) for layer in native])
    return Layers(names, masks, numbers, absent_is_empty=True)


def read_together(paths: Sequence[Path], image: Volume) -> Layers:
    """Return the segments of one or several segmentations of an image, as `read_layers`.

    Several files have different structures, as one file a structure does. Two drawings of the same
    structure are refused, because which one is right cannot be seen.

    Raises:
        FedsgcgError: As `read_layers`; DAT-198 for two files with a segment of the same name, or
            with segments that are neither apart nor nested but mostly the same.
    """
    found = [read_layers(path, image) for path in paths]
    if len(found) == 1:
        return found[0]
    for first, second in combinations(range(len(found)), 2):
        if twice := drawn_twice(found[first], found[second]):
            raise several_drawings(paths[first], paths[second], twice)
    names = tuple(name for one in found for name in one.names)
    masks = np.concatenate([one.masks for one in found])
    # The numbers count the segments of each file, so that they are no label values of all.
    return Layers(names, masks, absent_is_empty=True)


def drawn_twice(first: Layers, second: Layers) -> str:
    """Return which segments of two files draw the same structure, "" if none do.

    They do if their names are the same, or their voxels (`SAME`), or if more than half of the
    smaller one is inside the other without being nested in it (`layers.OUTSIDE`).
    """
    known = {plain(name) for name in first.names}
    if same := [name for name in second.names if plain(name) in known]:
        return f"both have a segment {same[0]}"
    for one, inner in zip(first.names, first.masks, strict=True):
        for other, outer in zip(second.names, second.masks, strict=True):
            shared = int((inner & outer).sum())
            sizes = sorted((int(inner.sum()), int(outer.sum())))
            crossing = OUTSIDE * sizes[0] < sizes[0] - shared < sizes[0] / 2
            if shared and (crossing or shared >= SAME * sizes[1]):
                return f"{one} and {other} have {shared} of {sizes[0]} and {sizes[1]} voxels both"
    return ""


def several_drawings(first: Path, second: Path, found: str) -> FedsgcgError:
    """Return the error for two segmentations of the same structure."""
    return fail(
        "DAT-198",
        found=f"{first.name} and {second.name}: {found}",
        expected="different structures in several segmentations of one series",
        action="Keep the final drawing and move the other one away: which one is right cannot be "
        "seen from the files.",
        where=str(first),
    )


def segment_names(path: Path) -> tuple[str, ...]:
    """Return the labels of a segmentation's segments without reading its voxels."""
    header = _header(path)
    return tuple(str(one.get("SegmentLabel", "")) for one in header.get("SegmentSequence", []))


def read_labels(path: Path) -> Volume:
    """Return the numbers of the segments on the segmentation's own grid.

    Raises:
        FedsgcgError: DAT-166 for segments that overlap.
    """
    found = _open(path)
    numbers, names = _segments(found)
    layers, affine = _voxels(found)
    if (layers.sum(axis=-1) > 1).any():
        raise fail(
            "DAT-166",
            found=f"voxels in several of the segments {', '.join(names)}",
            expected="one label a voxel",
            action="Use it as the mask of its DICOM series, where nested structures are read.",
            where=str(path),
        )
    labels = (layers * np.asarray(numbers)).sum(axis=-1)
    return volume_of(labels, affine, form=FORM)


def write(
    path: Path,
    classes: NDArray[np.uint8],
    names: Sequence[str],
    image: Volume,
    *,
    model: str,
) -> None:
    """Write class indices as a segmentation that refers to the series of its image.

    The segment number of a class is its index, its label the class's name; the background has no
    segment. Patient, study, frame of reference and the image of each frame are those of the series.

    Args:
        path: `.dcm`.
        classes: (Z, Y, X) class indices in canonical orientation.
        names: All classes, background first.
        image: A DICOM series.
        model: What made it: name and digest of the model.

    Raises:
        FedsgcgError: DAT-160 without highdicom, MOD-812 for a series without a frame of reference.
    """
    if not image.source.frame:
        raise fail(
            "MOD-812",
            found="a series without FrameOfReferenceUID",
            expected="a series whose place a segmentation can refer to",
            action="Choose --out-format nifti, or restore the identifier of the series.",
            where=str(image.source.files[0].parent),
        )
    hd = library("highdicom", FORM)
    series = [_header(path) for path in image.source.files]
    for header in series:
        for name in MAY_BE_EMPTY:
            if name not in header:  # removed when the data were de-identified
                setattr(header, name, "")
    frames = from_canonical(classes, image.affine, image.plane).transpose(2, 1, 0)
    if image.source.frames:  # in the order of the file
        frames = frames[np.argsort(image.source.frames)]
    code = hd.sr.CodedConcept
    program = hd.AlgorithmIdentificationSequence(
        name="fedsgcg",
        family=code("123109", "DCM", "Artificial Intelligence"),
        version=model[:64],
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=code("123037004", "SCT", "Anatomical Structure"),
            segmented_property_type=code(f"class_{number}", SCHEME, name[:64]),
            algorithm_type="AUTOMATIC",
            algorithm_identification=program,
        )
        for number, name in enumerate(names[1:], 1)
    ]
    layers = np.stack([frames == number for number in range(1, len(names))], axis=-1)
    written = hd.seg.Segmentation(
        source_images=series,
        pixel_array=layers.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=hd.UID(),
        series_number=_series_number(series[0]),
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="fedsgcg",
        manufacturer_model_name="fedsgcg",
        software_versions=_version(),
        device_serial_number=model[:64],
        content_label="SEGMENTATION",
        series_description="Segmentation by fedsgcg (research use)",
        omit_empty_frames=bool(layers.any()),
    )
    written.save_as(path)


def _series_number(header: Any) -> int:
    return min(int(header.get("SeriesNumber") or 0) + 9000, 2**31 - 1)


def _version() -> str:
    try:
        return version("fedsgcg")
    except PackageNotFoundError:
        return "unknown"


def _open(path: Path) -> Any:
    with opened(path) as file:
        return library("highdicom", FORM).seg.segread(file)


def _header(path: Path) -> Any:
    with opened(path) as file:
        return library("pydicom", FORM).dcmread(file, stop_before_pixels=True)


def _segments(found: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the numbers and labels of all segments; the background of a label map has none."""
    numbers = tuple(int(one) for one in found.segment_numbers if int(one) > 0)
    labels = (str(found.get_segment_description(one).segment_label) for one in numbers)
    return numbers, tuple(labels)


def _voxels(found: Any) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the segments (i, j, k, S) of the part that the file covers, and its affine."""
    numbers, _ = _segments(found)
    volume = found.get_volume(segment_numbers=list(numbers), allow_missing_positions=True)
    # highdicom's axes are slices, rows, columns; its affine leads to mm left, back and head.
    swap = np.eye(4)[[2, 1, 0, 3]]
    affine = LPS_TO_RAS @ np.asarray(volume.affine, np.float64) @ swap
    return np.asarray(volume.array).transpose(2, 1, 0, 3) > 0.5, affine


def _on_grid(
    layers: NDArray[np.bool_], affine: NDArray[np.float64], image: Volume, path: Path
) -> NDArray[np.bool_]:
    """Return segments (S, i, j, k) on the grid of the image's file."""
    size = from_canonical(image.array, image.affine, image.plane).shape
    step = np.linalg.inv(image.affine) @ affine
    turn = np.rint(step[:3, :3])
    whole = np.abs(step[:3, :3] - turn).max() * max(size) <= GEOMETRY_TOLERANCE * 2
    grid = np.zeros((layers.shape[-1], *size), np.bool_)
    voxels = np.argwhere(layers)
    places = voxels[:, :3] @ step[:3, :3].T + step[:3, 3]
    near = np.rint(places).astype(np.int64)
    away = float(np.abs(places - near).max(initial=0))
    inside = bool(((near >= 0) & (near < size)).all())
    if not whole or abs(np.linalg.det(turn)) != 1 or away > GEOMETRY_TOLERANCE or not inside:
        found = "voxels outside the image" if whole and not inside else "another grid"
        action = "Export the segmentation for this series, on the grid of its images."
        expected = "voxels of the image"
        raise fail("DAT-105", found=found, expected=expected, action=action, where=str(path))
    grid[(voxels[:, 3], *near.T)] = True
    return grid


def _check_references(found: Any, source: Source, path: Path) -> None:
    """Check that a segmentation was drawn on a series; raises DAT-164 otherwise."""
    named = [str(one.SeriesInstanceUID) for one in found.get("ReferencedSeriesSequence", [])]
    frame = str(found.get("FrameOfReferenceUID", ""))
    instances = {
        str(one.ReferencedSOPInstanceUID)
        for series in found.get("ReferencedSeriesSequence", [])
        for one in series.get("ReferencedInstanceSequence", [])
    }
    others = instances - set(source.instances)
    wrong = ""
    if named and source.series not in named:
        wrong = f"series {named[0]}"
    elif frame and source.frame and frame != source.frame:
        wrong = f"frame of reference {frame}"
    elif others:
        wrong = f"{len(others)} of {len(instances)} images that are not here"
    if wrong:
        raise fail(
            "DAT-164",
            found=f"refers to {wrong}",
            expected=f"series {source.series}",
            action="Pair each segmentation with the series that it was drawn on; export both "
            "again if their identifiers were replaced separately.",
            where=str(path),
        )
