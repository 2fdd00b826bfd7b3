"""The table of image formats: suffixes, library, reader; and how to convert what is not read.

A reader is a module of this package with `read(path, mask=...) -> Volume`, and `shape(path)`, which
reads the header only. It is imported when a file of its format is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: Its usual name.
        suffixes: Suffixes of its files in lower case; the first one is used for results.
        module: Module of this package that reads it.
        library: Library that reads it; `formats` in `pip install "fedsgcg[formats]"` brings it
            unless it is a dependency of fedsgcg.
        keeps: What of the geometry the format has, for the documentation.
        result: What a predicted mask is stored as, for the documentation.
    """

    name: str
    suffixes: tuple[str, ...]
    module: str
    library: str
    keeps: str
    result: str

    @property
    def reader(self) -> Any:
        """Module with `read` and `shape`."""
        return import_module(f"fedsgcg.common.images.{self.module}")


NIFTI: Final = Format(
    "NIfTI",
    (".nii.gz", ".nii"),
    "nifti",
    "nibabel",
    "voxel size, position and orientation (sform, else qform); header fields",
    "the same, with the header of the image",
)
METAIMAGE: Final = Format(
    "MetaImage",
    (".mha", ".mhd"),
    "itk",
    "SimpleITK (extra `formats`)",
    "voxel size, position and orientation",
    "the same; `.mhd` with a `.raw` or `.zraw`",
)
NRRD: Final = Format(
    "NRRD",
    (".nrrd", ".nhdr"),
    "itk",
    "SimpleITK (extra `formats`)",
    "voxel size, position and orientation",
    "the same; `.nhdr` with a `.raw` or `.raw.gz`",
)
ANALYZE: Final = Format(
    "ANALYZE 7.5 or NIfTI pair",
    (".hdr", ".img"),
    "analyze",
    "nibabel",
    "voxel size; ANALYZE has no orientation and is read as SPM does: x to the left, y to the front",
    "the same pair, with the header of the image",
)
DICOM: Final = Format(
    "DICOM",
    (".dcm", ".dicom", ".ima"),
    "dicom",
    "pydicom, SimpleITK (extra `formats`)",
    "voxel size, position and orientation; series and frame of reference",
    "DICOM-SEG with a segment for each class; maps as NIfTI",
)
PICTURES: Final = Format(
    "PNG, JPEG, BMP",
    (".png", ".jpg", ".jpeg", ".bmp"),
    "pixels",
    "Pillow",
    "pixels as a viewer shows them; a picture has no voxel size",
    "PNG",
)
TIFF: Final = Format(
    "TIFF of 8 or 16 bits, one or several pages",
    (".tif", ".tiff"),
    "pixels",
    "tifffile, Pillow",
    "one page is a picture; several are the axial slices of a volume, "
    "with the voxel size of ImageJ or OME",
    "PNG for one page, TIFF for several; maps of those as NIfTI",
)

FORMATS: Final = (NIFTI, METAIMAGE, NRRD, ANALYZE, DICOM, PICTURES, TIFF)
_BY_SUFFIX: Final = {suffix: one for one in FORMATS for suffix in one.suffixes}

VOLUME_SUFFIXES: Final = tuple(
    suffix for one in (NIFTI, METAIMAGE, NRRD, ANALYZE, DICOM) for suffix in one.suffixes
)
PICTURE_SUFFIXES: Final = (*PICTURES.suffixes, *TIFF.suffixes)

_GIPL: Final = (
    "Convert it with SimpleITK (pip install SimpleITK): "
    "python -c \"import SimpleITK as s; s.WriteImage(s.ReadImage('IN'), 'OUT.nii.gz')\"."
)
_FREESURFER: Final = "Convert it with FreeSurfer: mri_convert IN OUT.nii.gz."
_MINC: Final = "Convert it with the MINC tools: mnc2nii IN OUT.nii."
_PHILIPS: Final = "Convert it with dcm2niix: dcm2niix -z y -o OUT FOLDER."
_PICTURE: Final = "Save it as PNG."
_ARCHIVE: Final = "Unpack it; only gzip (.nii.gz) is read without unpacking."
_PARTIAL: Final = "Finish the download: the file is only a part."
_ARRAY: Final = (
    "Write it as NIfTI with its voxel size: "
    "nibabel.save(nibabel.Nifti1Image(array, affine), 'OUT.nii.gz')."
)
_SLIDE: Final = "Export the region as TIFF with QuPath or bfconvert (Bio-Formats)."

_SUFFIXES: Final = {
    _GIPL: ".img.gz .hdr.gz .gipl .gipl.gz .vtk .nia",
    _FREESURFER: ".mgz .mgh",
    _MINC: ".mnc",
    _PHILIPS: ".par .rec",
    _PICTURE: ".gif .webp .heic .jp2 .ppm .pgm",
    _ARCHIVE: ".nii.bz2 .nii.xz .nii.zst .nii.zip .zip .tar .tar.gz .tgz .7z",
    _PARTIAL: ".part .crdownload",
    _ARRAY: ".npy .npz .mat .h5 .hdf5",
    _SLIDE: ".svs .ndpi .czi .lif",
}

FOREIGN: Final = {
    suffix: advice for advice, suffixes in _SUFFIXES.items() for suffix in suffixes.split()
}
"""Suffix -> how to convert such a file. `.raw` and `.zraw` only exist as parts of an image."""

_DICOM_MARK: Final = b"DICM"
_DICOM_PREAMBLE: Final = 128  # bytes before the mark


def suffix_of(path: Path) -> str:
    """Return the supported image suffix of a path in lower case, e.g. `.nii.gz`, or ""."""
    name = path.name.lower()
    return next((suffix for suffix in _BY_SUFFIX if name.endswith(suffix)), "")


def format_of(path: Path) -> Format | None:
    """Return the format of a file by its suffix, and DICOM for a folder or a file of DICOM.

    DICOM files often have no suffix, or a part of their UID in its place; they are recognised by
    their content.
    """
    if suffix := suffix_of(path):
        return _BY_SUFFIX[suffix]
    if foreign_suffix(path):
        return None
    return DICOM if path.is_dir() or is_dicom(path) else None


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file: by its suffix, or by its content if it has none."""
    if suffix_of(path) in DICOM.suffixes:
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_PREAMBLE + len(_DICOM_MARK))[_DICOM_PREAMBLE:] == _DICOM_MARK
    except OSError:
        return False


def foreign_suffix(path: Path) -> str:
    """Return the suffix of an image format that is not supported, "" for any other file."""
    name = path.name.lower()
    return max((suffix for suffix in FOREIGN if name.endswith(suffix)), key=len, default="")


def conversion_advice(path: Path) -> str:
    """Return how to convert a file, or which formats are supported."""
    return FOREIGN.get(foreign_suffix(path), "Save it as NIfTI (.nii.gz), or a picture as PNG.")
