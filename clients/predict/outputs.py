"""The formats of results, and writing a prediction in the geometry of its image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedsgcg.clients.predict.predictor import Prediction
from fedsgcg.common.errors import fail
from fedsgcg.common.images.dicom import Source
from fedsgcg.common.images.formats import DICOM, PICTURES, TIFF, format_of, suffix_of
from fedsgcg.common.images.read import slices_in
from fedsgcg.common.images.write import mask_bytes, picture_bytes, wide_bytes, write_like

OUT_FORMATS: Final = {
    "same": "",
    "nifti": ".nii.gz",
    "metaimage": ".mha",
    "nrrd": ".nrrd",
    "dicom-seg": ".dcm",
}
"""Value of `--out-format` -> suffix of the masks of volumes; `same` as the image."""

ONLY_MASKS: Final = (".dcm", ".hdr", ".tif")
"""Suffixes of masks whose maps of probability and confidence are written as NIfTI."""

Save = Callable[[Path, Callable[[Path], object]], None]


@cache
def mask_suffix(image: Path, out: str) -> str:
    """Return the suffix of an image's predicted mask; PNG for every picture."""
    form = format_of(image)
    if form in (None, PICTURES) or (form in (TIFF, DICOM) and _is_picture(image)):
        return ".png"
    if out != "same":
        return OUT_FORMATS[out]
    if form is DICOM:
        return ".dcm"
    if form is TIFF:
        return ".tif"
    suffix = suffix_of(image)
    return ".hdr" if suffix == ".img" else suffix


def result_suffix(image: Path, out: str, ending: str) -> str:
    """Return the suffix of one result; `ending` is `_mask`, `_probability` and so on."""
    if ending == "_overlay":
        return ".png"
    suffix = mask_suffix(image, out)
    return ".nii.gz" if ending != "_mask" and suffix in ONLY_MASKS else suffix


def check_format(image: Path, out: str) -> None:
    """Raise MOD-812 if a mask cannot be written in the requested format."""
    if mask_suffix(image, out) == ".dcm" and format_of(image) is not DICOM:
        raise fail(
            "MOD-812",
            where=str(image),
            found="an image that is not a DICOM series",
            expected="the DICOM series, which a DICOM segmentation refers to",
            action="Give the folder of the series, or another --out-format.",
        )


def write_maps(
    place: Callable[[str], Path],
    save: Save,
    prediction: Prediction,
    structures: Sequence[str],
    classes: Sequence[str],
    model: str,
) -> list[Path]:
    """Write the mask and the requested maps in the geometry of the image.

    Args:
        place: Returns the path of a result by its ending, e.g. `_mask`.
        save: Writes a file atomically.
        prediction: The prediction.
        structures: Names of the structures.
        classes: Names of all classes, background first.
        model: Name and digest of the model, for a DICOM segmentation.

    Returns:
        The paths written.
    """
    if prediction.volume.is_picture:
        return _write_pictures(place, save, prediction, structures)
    written = []
    for ending, array in (
        ("_mask", prediction.labels),
        ("_probability", _single(prediction.probability)),
        ("_confidence", prediction.confidence),
    ):
        if array is None:
            continue
        target = place(ending)
        if suffix_of(target) == ".dcm":
            save(target, _segmentation(prediction, classes, model))
        else:
            save(target, _volume(array, prediction))
        written.append(target)
    return written


def _segmentation(
    prediction: Prediction, classes: Sequence[str], model: str
) -> Callable[[Path], object]:
    from fedsgcg.common.images import segmentation

    if not isinstance(prediction.volume.source, Source):
        raise TypeError("a DICOM segmentation needs a DICOM series")
    return lambda path: segmentation.write(
        path, prediction.classes, classes, prediction.volume, model=model
    )


def _volume(array: Any, prediction: Prediction) -> Callable[[Path], object]:
    return lambda path: write_like(path, array, prediction.volume)


def _write_pictures(
    place: Callable[[str], Path], save: Save, prediction: Prediction, structures: Sequence[str]
) -> list[Path]:
    small = prediction.labels.dtype == np.uint8
    contents = {"_mask": (mask_bytes if small else wide_bytes)(prediction.labels[0])}
    if prediction.probability is not None:
        maps = zip(structures, prediction.probability, strict=True)
        contents |= {
            f"_probability_{name}": picture_bytes(_grey(layers[0])) for name, layers in maps
        }
    if prediction.confidence is not None:
        contents["_confidence"] = picture_bytes(_grey(prediction.confidence[0]))
    written = []
    for ending, content in contents.items():
        target = place(ending)
        save(target, _bytes(content))
        written.append(target)
    return written


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _single(maps: Any) -> Any:
    """Drop the axis of a single structure."""
    return maps[0] if maps is not None and len(maps) == 1 else maps


def _grey(values: Any) -> Any:
    return np.rint(values * 255).astype(np.uint8)


def _is_picture(image: Path) -> bool:
    """Whether a TIFF has one page, or a file of DICOM no position in the patient."""
    if format_of(image) is TIFF:
        return slices_in(image) <= 1
    from fedsgcg.common.images import dicom

    return dicom.is_picture(image)
