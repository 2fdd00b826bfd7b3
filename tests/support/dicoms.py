"""Small DICOM series as scanners write them: one file a slice, names without order."""

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def write_series(
    folder, native, affine, *, series=None, frame=None, study=None, number=1, patient="P1"
):
    """Write voxels (i, j, k) with a RAS affine as a series of MR images; return its UID.

    Args:
        folder: Where the files go.
        native: Whole numbers from 0 to 65535.
        affine: (4, 4), its axes at right angles.
        series: SeriesInstanceUID, a new one by default.
        frame: FrameOfReferenceUID.
        study: StudyInstanceUID.
        number: SeriesNumber.
        patient: PatientID.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, frame = series or generate_uid(), frame or generate_uid()
    study = study or generate_uid()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / sizes
    count = native.shape[2]
    for k in range(count):
        place = lps[:3, 3] + k * lps[:3, 2]
        header = slice_header(series, frame, study, number, k + 1)
        header.PatientID = patient
        header.ImagePositionPatient = [f"{value:.6f}"[:16] for value in place]
        header.ImageOrientationPatient = [
            f"{value:.8f}"[:16] for value in (*axes[:, 0], *axes[:, 1])
        ]
        header.PixelSpacing = [f"{sizes[1]:.6f}", f"{sizes[0]:.6f}"]
        header.SliceThickness = f"{sizes[2]:.6f}"
        put_pixels(header, native[:, :, k].T.astype(np.uint16))
        # Scanners' names say nothing about the order.
        header.save_as(folder / f"IM{(k * 7) % count:04d}_{k}.dcm", enforce_file_format=True)
    return series


def slice_header(series, frame, study, number, instance):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MR, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    header = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    header.SOPClassUID, header.SOPInstanceUID = MR, meta.MediaStorageSOPInstanceUID
    header.PatientName, header.PatientID, header.PatientSex = "Doe^Jane", "P1", "F"
    header.PatientBirthDate, header.StudyDate, header.StudyTime = "19500101", "20240101", "101010"
    header.AccessionNumber, header.StudyID, header.ReferringPhysicianName = "1", "1", ""
    header.StudyInstanceUID, header.SeriesInstanceUID = study, series
    header.FrameOfReferenceUID, header.PositionReferenceIndicator = frame, ""
    header.Modality, header.SeriesNumber, header.InstanceNumber = "MR", number, instance
    header.SeriesDescription, header.Manufacturer = f"T2 {number}", "scanner"
    return header


def put_pixels(header, pixels):
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 0
    header.PixelData = pixels.tobytes()


def change(path, **fields):
    """Rewrite a file with other fields; None removes one."""
    header = pydicom.dcmread(path)
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    header.save_as(path)


def write_enhanced(path, native, affine, *, order=None, stacks=1, slope=None):
    """Write voxels (i, j, k) with a RAS affine as one Enhanced MR file; return its data set.

    Args:
        path: The file.
        native: Whole numbers from 0 to 65535.
        affine: (4, 4), its axes at right angles.
        order: Slice k of each frame; by default from the last to the first.
        stacks: Times that each slice occurs, as echoes do.
        slope: Rescale slope of each frame, none by default.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / sizes
    order = list(order if order is not None else reversed(range(native.shape[2]))) * stacks
    header = slice_header(generate_uid(), generate_uid(), generate_uid(), 5, 1)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = ENHANCED_MR
    put_pixels(header, native[:, :, 0].T.astype(np.uint16))
    header.NumberOfFrames = len(order)
    header.PixelData = b"".join(native[:, :, k].T.astype(np.uint16).tobytes() for k in order)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [f"{sizes[1]:.6f}", f"{sizes[0]:.6f}"]
    measures.SliceThickness = measures.SpacingBetweenSlices = f"{sizes[2]:.6f}"
    orientation.ImageOrientationPatient = [
        f"{value:.8f}"[:16] for value in (*axes[:, 0], *axes[:, 1])
    ]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    header.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number, k in enumerate(order):
        frame, position, content = Dataset(), Dataset(), Dataset()
        place = lps[:3, 3] + k * lps[:3, 2]
        position.ImagePositionPatient = [f"{value:.6f}"[:16] for value in place]
        content.DimensionIndexValues, content.InStackPositionNumber = [k + 1], k + 1
        content.StackID = "1"
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        if slope is not None:
            rescaled = Dataset()
            rescaled.RescaleSlope, rescaled.RescaleIntercept = str(slope[number]), "0"
            rescaled.RescaleType = "US"
            frame.PixelValueTransformationSequence = [rescaled]
        frames.append(frame)
    header.PerFrameFunctionalGroupsSequence = frames
    organization, index = Dataset(), Dataset()
    organization.DimensionOrganizationUID = generate_uid()
    index.DimensionOrganizationUID = organization.DimensionOrganizationUID
    index.DimensionIndexPointer = Tag("InStackPositionNumber")
    index.FunctionalGroupPointer = Tag("FrameContentSequence")
    header.DimensionOrganizationSequence, header.DimensionIndexSequence = [organization], [index]
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return header
