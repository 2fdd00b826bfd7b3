"""Image formats that are not supported, and how to convert them."""

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
_ARCHIVE: Final = "Unpack it; only gzip (.nii.gz) is read without unpacking."
_ARRAY: Final = (
    "Write it as NIfTI with its voxel size: "
    "nibabel.save(nibabel.Nifti1Image(array, affine), 'OUT.nii.gz')."
)

_SUFFIXES: Final = {
    _DICOM: ".dcm .dicom .ima",
    _ITK: ".mha .mhd .nrrd .nhdr .hdr .img .img.gz .gipl .gipl.gz .vtk .nia",
    _FREESURFER: ".mgz .mgh",
    _MINC: ".mnc",
    _PHILIPS: ".par .rec",
    _PICTURE: ".gif .webp .heic .jp2 .ppm .pgm",
    _ARCHIVE: ".nii.bz2 .nii.xz .nii.zst .nii.zip .zip",
    _ARRAY: ".npy .npz .mat .h5 .hdf5",
}

FOREIGN: Final = {
    suffix: advice for advice, suffixes in _SUFFIXES.items() for suffix in suffixes.split()
}
"""Suffix -> how to convert such a file. `.raw` and `.zraw` only exist as parts of a MetaImage."""

_DICOM_MARK: Final = b"DICM"
_DICOM_PREAMBLE: Final = 128  # bytes before the mark


def foreign_suffix(path: Path) -> str:
    """Return the suffix of an unsupported image format, "" for any other file.

    DICOM files often have no suffix, or a part of their UID in its place; they are recognised by
    their content.
    """
    name = path.name.lower()
    known = max((suffix for suffix in FOREIGN if name.endswith(suffix)), key=len, default="")
    if known or (path.suffix and not path.suffix[1:].isdigit()):
        return known
    return ".dcm" if _is_dicom(path) else ""


def conversion_advice(path: Path) -> str:
    """Return how to convert a file, or which formats are supported."""
    return FOREIGN.get(foreign_suffix(path), "Save it as NIfTI (.nii.gz), or a picture as PNG.")


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_PREAMBLE + len(_DICOM_MARK))[_DICOM_PREAMBLE:] == _DICOM_MARK
    except OSError:
        return False
