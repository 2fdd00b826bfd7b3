"""DICOM as archives export it: several segmentations of a series, patients, faults of a series."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from fedsgcg.clients.data.case_files import open_site, splits
from fedsgcg.common.images import segmentation
from fedsgcg.common.images.read import read_volume
from fedsgcg.deploy.prepare.layouts import Line
from fedsgcg.deploy.prepare.patients import one_patient
from tests.support import walks
from tests.support.dicoms import change, write_series
from tests.support.prepared import manifest, prepare, report
from tests.unit.deploy.test_walks import checked, stores

CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATION = "IM0099.dcm"


@pytest.fixture
def export(tmp_path):
    """East, North and South with one patient each; the folders of the studies."""
    source = walks.dicom_export(tmp_path / "export", tmp_path / "scratch", cases=1)
    return source, sorted(source.glob("*/*/STUDY1"))


def series_in(study, scratch):
    """Return the T2 series of a study without its localizer."""
    scratch.mkdir()
    for path in study.glob("IM00*.dcm"):
        if path.name != SEGMENTATION:
            (scratch / path.name).write_bytes(path.read_bytes())
    return read_volume(scratch)


def test_one_segmentation_a_structure_is_prepared_checked_and_read(export, tmp_path, capsys):
    source, studies = export
    for number, study in enumerate(studies):
        image = series_in(study, tmp_path / f"series{number}")
        gland = segmentation.read_layers(study / SEGMENTATION, image).masks[0]
        core = gland & (np.arange(gland.shape[2]) < np.median(np.nonzero(gland)[2]))
        segmentation.write(
            study / "IM0100.dcm", core.astype(np.uint8), ["background", "Core"], image, model="m"
        )
    out = tmp_path / "out"
    assert prepare("manifest", source, "-o", out) == 0, capsys.readouterr()
    assert checked(out) == 0, capsys.readouterr()
    settings = yaml.safe_load((out / "data.yaml").read_text())
    assert settings["structures"] == {
        "Prostate_gland": ["Prostate_gland_only", "Core"],
        "Core": ["Core"],
    }
    assert {row["mask"] for row in manifest(out)} == {
        f"{row['image'].removesuffix('_image')}_mask" for row in manifest(out)
    }
    for store, _ in stores(out, tmp_path / "cache"):
        (case,) = store.cases
        assert set(np.unique(store.truth(case))) == {0, 1, 2}
    assert prepare("manifest", source, "-o", out) == 0
    assert "0 converted, 3 unchanged" in capsys.readouterr().out


def test_two_readers_are_refused_with_the_names_of_both_and_the_rest_is_used(
    export, tmp_path, capsys
):
    source, studies = export
    image = series_in(studies[0], tmp_path / "series")
    gland = segmentation.read_layers(studies[0] / SEGMENTATION, image).masks[0]
    other = np.roll(gland, 1, axis=2).astype(np.uint8)
    segmentation.write(
        studies[0] / "READER2.dcm", other, ["background", "Prostate 2"], image, model="m"
    )
    assert prepare("manifest", source, "-o", tmp_path / "out") == 3, capsys.readouterr()
    text = report(tmp_path / "out")
    assert "[DAT-198]" in text
    assert f"{SEGMENTATION} and READER2.dcm: Prostate gland and Prostate 2 have" in text
    assert {row["site"] for row in manifest(tmp_path / "out")} == {"North", "South"}


def test_studies_of_one_patient_are_in_one_split_and_the_identifier_is_written_nowhere(
    tmp_path, make_data, capsys
):
    source = walks.dicom_export(tmp_path / "export", tmp_path / "scratch", cases=4)
    east = sorted((source / "East").glob("PAT*"))
    for folder in (east[0], east[3]):
        for path in (folder / "STUDY1").iterdir():
            change(path, PatientID="SECRET-77")
    out = tmp_path / "out"
    assert prepare("manifest", source, "-o", out) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "note: East: 1 patient with images in several folders, by PatientID" in printed
    assert checked(out) == 0
    printed += "".join(capsys.readouterr())
    names = [row["patient_id"] for row in manifest(out) if row["site"] == "East"]
    assert names == ["East_PAT000", "East_PAT001", "East_PAT002", "East_PAT000"]
    written = [path.read_text() for path in out.iterdir() if path.is_file()]
    assert "SECRET" not in "".join([printed, *written])
    cases = open_site(out, "East", make_data()).cases
    parts = splits(cases, 0.5, heldout=False)
    assert parts[0] == parts[3]


def lines(*items):
    """Lines of (hospital, folder's patient, PatientID)."""
    return [
        Line(site, root / f"{number}.dcm", None, patient=patient, name=f"n{number}", person=person)
        for number, (site, patient, person) in enumerate(items)
        for root in [Path("/data") / site]
    ]


def patients_of(*items):
    found, notes = one_patient(lines(*items), Path("/data"))
    return [line.patient for line in found], notes


def test_a_folder_with_several_patients_is_no_patient():
    names, notes = patients_of(("A", "2023", "x"), ("A", "2023", "y"), ("A", "2023", "x"))
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("2023_") for name in names)
    assert not notes
    again, _ = patients_of(("A", "2023", "x"), ("A", "2023", "y"), ("A", "2023", "x"))
    assert again == names


def test_an_identifier_that_most_folders_have_is_none():
    names, notes = patients_of(*(("A", f"p{n}", "ANONYMOUS") for n in range(3)), ("A", "q", "z"))
    assert names == ["p0", "p1", "p2", "q"]
    assert notes == [
        "A: most folders have the same PatientID, as after de-identification, so each folder "
        "counts as a patient"
    ]


def test_patients_are_joined_within_a_hospital_only_and_cases_without_one_stay():
    names, _ = patients_of(("A", "p", "1"), ("B", "q", "1"), ("A", "r", ""), ("A", "", "2"))
    assert names[:3] == ["p", "q", "r"]
    assert names[3].startswith("n3_")


def test_each_fault_of_a_series_or_its_segmentation_is_named_and_the_rest_is_used(tmp_path, capsys):
    source = walks.dicom_export(tmp_path / "export", tmp_path / "scratch", cases=2)
    gap, turned, strange, alone, contoured, _ = sorted(source.glob("*/*/STUDY1"))
    (gap / "IM0003.dcm").unlink()
    change(turned / "IM0002.dcm", ImageOrientationPatient=["0", "1", "0", "0", "0", "1"])
    stored = pydicom.dcmread(strange / SEGMENTATION)
    instances = stored.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    instances[0].ReferencedSOPInstanceUID = generate_uid()
    stored.save_as(strange / SEGMENTATION)
    stored = pydicom.dcmread(alone / SEGMENTATION)
    uid = stored.ReferencedSeriesSequence[0].SeriesInstanceUID = generate_uid()
    stored.save_as(alone / SEGMENTATION)
    contours(contoured)
    assert prepare("manifest", source, "-o", tmp_path / "out") == 3, capsys.readouterr()
    text = report(tmp_path / "out")
    for found in (
        *("[DAT-161]", "1 of 6 slices missing there", "compare the number of files"),
        *("[DAT-163]", "two orientations: 5 slices like", "Remove what is not part of the stack"),
        *("[DAT-164]", "images that are not here", "series that it was drawn on"),
        f"it refers to series {uid}, which is not here",
    ):
        assert found in text, found
    assert len(manifest(tmp_path / "out")) == 1


def contours(study):
    """Replace the segmentation of a study by an RT structure set of its T2 series."""
    header = pydicom.dcmread(study / "IM0000.dcm")
    series, inner, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = header.SeriesInstanceUID
    inner.RTReferencedSeriesSequence = [series]
    frame.RTReferencedStudySequence = [inner]
    header.ReferencedFrameOfReferenceSequence = [frame]
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CONTOURS
    header.save_as(study / "RS 1.dcm")
    (study / SEGMENTATION).unlink()


def test_contours_alone_are_refused_with_the_command_that_converts_them(tmp_path, capsys):
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    folder = tmp_path / "raw" / "A" / "p1"
    write_series(folder, np.ones((8, 8, 4), np.uint16), affine)
    (folder / "IM0000_0.dcm").rename(folder / "IM0000.dcm")
    (folder / SEGMENTATION).touch()
    contours(folder)
    assert prepare("manifest", tmp_path / "raw", "-o", tmp_path / "out") == 2
    printed = "".join(capsys.readouterr())
    assert "[DAT-128]" in printed
    assert "1 RT structure set: RS 1.dcm" in printed
    assert (
        f"plastimatch convert --input '{folder}/RS 1.dcm' --referenced-ct {folder} "
        f"--output-prefix '{folder}/RS 1' --prefix-format nrrd"
    ) in " ".join(printed.split())
