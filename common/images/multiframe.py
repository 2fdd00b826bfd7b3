"""Reads enhanced DICOM (Enhanced MR, CT, PET and others): a file with all slices as its frames.

The position, orientation and voxel size of a frame are in functional groups, its own or those that
all frames share (DICOM PS3.3 C.7.6.16). The slices are then checked like those of a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.images.dicom_file import opened
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.formats import DICOM

GROUPS: Final = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
}
"""Functional group -> attributes that a file of a single slice has itself."""

SHARED: Final = "SharedFunctionalGroupsSequence"
EACH: Final = "PerFrameFunctionalGroupsSequence"
RESCALING: Final = "PixelValueTransformationSequence"


def frames_of(header: Any) -> list[Any]:
    """Return one header a frame, as a file of that frame alone would have; [] without groups.

    Args:
        header: A pydicom data set with the functional groups.
    """
    pydicom = library("pydicom", DICOM.name)
    each = header.get(EACH) or []
    if len(each) != int(header.get("NumberOfFrames") or 1):
        return []
    shared = (header.get(SHARED) or [pydicom.Dataset()])[0]
    found = []
    for own in each:
        frame = pydicom.Dataset()
        frame.update({item.tag: item for item in header if item.keyword not in (SHARED, EACH)})
        for group, names in GROUPS.items():
            item = (own.get(group) or shared.get(group) or [pydicom.Dataset()])[0]
            for name in names:
                if name in item:
                    frame[name] = item[name]
        found.append(frame)
    return found


def voxels_of(path: Path, frames: Sequence[int]) -> NDArray[np.float32]:
    """Return frames (frame, row, column) in the given order, with each frame's rescaling.

    Args:
        path: The file.
        frames: Numbers of the frames, from 1.
    """
    with opened(path) as file:
        header = library("pydicom", DICOM.name).dcmread(file)
    stored = header.pixel_array
    shared = (header.get(SHARED) or [{}])[0]
    found = np.empty((len(frames), *stored.shape[1:]), np.float32)
    for place, number in enumerate(frames):
        own = header.get(EACH)[number - 1]
        (rescaling,) = own.get(RESCALING) or shared.get(RESCALING) or [{}]
        slope = float(rescaling.get("RescaleSlope", 1))
        found[place] = stored[number - 1] * slope + float(rescaling.get("RescaleIntercept", 0))
    return found
