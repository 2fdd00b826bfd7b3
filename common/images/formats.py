"""Image formats that are not read, and the tool that converts each of them to one that is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_DICOM: Final = "Convert the series with dcm2niix: dcm2niix -z y -o OUT FOLDER."
_ITK: Final = (
    "Convert it with SimpleITK (pip install SimpleITK): "
    "python -c \"import SimpleITK as s; s.WriteImage(s.ReadImage('IN'), 'OUT.nii.gz')\"."
)
_FREESURFER: Final = "Convert it with FreeSurfer: mri_convert IN OUT.nii.gz."
_MINC: Final = "Convert it with the MINC tools: mnc2nii IN OUT.nii."
_PHILIPS: Final = "Convert it with dcm2niix: dcm2niix -z y -o OUT FOLDER."
_PICTURE: Final = "Save it as PNG."
_ARCHIVE: Final = "Unpack it; a NIfTI may stay packed with gzip alone (.nii.gz)."
_ARRAY: Final = "Write it as NIfTI with its voxel size: nibabel.save(nibabel.Nifti1Image(array, affine), 'OUT.nii.gz')."

FOREIGN: Final = {
    ".dcm": _DICOM, ".dicom": _DICOM, ".ima": _DICOM,
    ".mha": _ITK, ".mhd": _ITK, ".nrrd": _ITK, ".nhdr": _ITK, ".hdr": _ITK, ".img": _ITK, ".img.gz": _ITK,
    ".gipl": _ITK, ".gipl.gz": _ITK, ".vtk": _ITK, ".nia": _ITK,
    ".mgz": _FREESURFER, ".mgh": _FREESURFER, ".mnc": _MINC, ".par": _PHILIPS, ".rec": _PHILIPS,
    ".gif": _PICTURE, ".webp": _PICTURE, ".heic": _PICTURE, ".jp2": _PICTURE, ".ppm": _PICTURE, ".pgm": _PICTURE,
    ".nii.bz2": _ARCHIVE, ".nii.xz": _ARCHIVE, ".nii.zst": _ARCHIVE, ".nii.zip": _ARCHIVE, ".zip": _ARCHIVE,
    ".npy": _ARRAY, ".npz": _ARRAY, ".mat": _ARRAY, ".h5": _ARRAY, ".hdf5": _ARRAY,
}  # fmt: skip
"""Suffix -> how to convert such a file. `.raw` and `.zraw` are parts of a MetaImage, not counted alone."""

_DICOM_MARK: Final = b"DICM"
_DICOM_PREAMBLE: Final = 128  # bytes before the mark


def foreign_suffix(path: Path) -> str:
    """Return the suffix of an image format that is not read, "" for any other file.

    DICOM files often have no suffix, or a number of their UID in its place; their content says what they are.
    """
    name = path.name.lower()
    known = max((suffix for suffix in FOREIGN if name.endswith(suffix)), key=len, default="")
    if known or (path.suffix and not path.suffix[1:].isdigit()):
        return known
    return ".dcm" if _is_dicom(path) else ""


def conversion_advice(path: Path) -> str:
    """Return how to convert a file of another format, or which formats are read."""
    return FOREIGN.get(foreign_suffix(path), "Save it as NIfTI (.nii.gz), or a picture as PNG.")


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_PREAMBLE + len(_DICOM_MARK))[_DICOM_PREAMBLE:] == _DICOM_MARK
    except OSError:
        return False
