"""Writes one case in every format, with the library of the format, not with fedsgcg."""

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import tifffile

from tests.support.dicoms import write_series


def write_itk(path, native, affine):
    image = sitk.GetImageFromArray(np.ascontiguousarray(native.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((lps[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path))


def write_nifti(path, native, affine):
    image = nib.Nifti1Image(native, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def write_pair(path, native, affine):
    nib.save(nib.Nifti1Pair(native, affine), path)


def write_analyze(path, native, affine):
    header = nib.AnalyzeHeader()
    voxels = native.astype(np.int16)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    nib.save(nib.AnalyzeImage(voxels, None, header), path)


def write_tiff(path, native, affine):
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    tifffile.imwrite(
        path,
        native.transpose(2, 1, 0),
        imagej=True,
        resolution=(1 / sizes[0], 1 / sizes[1]),
        metadata={"spacing": sizes[2], "unit": "mm", "axes": "ZYX"},
    )


def write_dicom(path, native, affine):
    write_series(path, native, affine)


WRITERS = {
    "a.nii.gz": write_nifti,
    "a.nii": write_nifti,
    "a.mha": write_itk,
    "a.mhd": write_itk,
    "a.nrrd": write_itk,
    "a.nhdr": write_itk,
    "pair.hdr": write_pair,
    "series": write_dicom,
}
"""Name of the image -> writer, for formats that state the orientation."""

WITHOUT_ORIENTATION = {"a.hdr": write_analyze, "a.tif": write_tiff}
