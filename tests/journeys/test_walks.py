"""A DICOM export, as an archive writes it, to a report and to DICOM segmentations in place."""

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from fedsgcg.common.images.read import read_volume, segments_of
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.cli.site import main as site_main
from tests.support import walks

pytestmark = pytest.mark.slow

QUICK = (
    *("method=source", "heldout=North", "federation.rounds=2", "method.steps_per_round=3"),
    *("data.image_size=32", "network.base_width=4", "device=cpu", "runtime=inprocess"),
)


def test_an_export_of_three_hospitals_to_a_report_and_segmentations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = walks.dicom_export(tmp_path / "export", tmp_path / "scratch"), tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert main(["data", "prepare", str(source), "-o", "out"]) == 0
    assert main(["data", "check", "out", *QUICK[4:7]]) == 0
    assert main(["study", "data=out/data.yaml", "output=run", *QUICK]) == 0
    assert (work / "run" / "report.html").is_file()
    call = ["predict", "run/source/North/0", "out/North", "-o", "masks", "--device", "cpu"]
    assert site_main(call) == 0
    found = sorted(Path("masks").rglob("*.dcm"))
    assert len(found) == 3
    for path in found:
        folder = Path("out/North") / path.name.replace("_mask.dcm", "_image")
        files = [pydicom.dcmread(file) for file in folder.iterdir()]
        stored = hd.seg.segread(path)
        (series,) = stored.ReferencedSeriesSequence
        assert {series.SeriesInstanceUID} == {file.SeriesInstanceUID for file in files}
        assert stored.FrameOfReferenceUID == files[0].FrameOfReferenceUID
        assert stored.get_segment_description(1).segment_label == "Prostate_gland"
        places = {
            file.SOPInstanceUID: [float(x) for x in file.ImagePositionPatient] for file in files
        }
        for frame in stored.PerFrameFunctionalGroupsSequence:
            (image,) = frame.DerivationImageSequence[0].SourceImageSequence
            own = [float(x) for x in frame.PlanePositionSequence[0].ImagePositionPatient]
            np.testing.assert_allclose(own, places[image.ReferencedSOPInstanceUID], atol=1e-4)
        # Read as a mask of the series it is accepted: the same grid, the same images.
        assert segments_of(path, read_volume(folder)) is not None
    # A new patient's export, as it comes: the series is named.
    (patient,) = (source / "North").glob("PAT003")
    call[2] = str(patient)
    assert site_main([*call, "--overwrite"]) == 1  # a localizer is in the folder
    assert site_main([*call, "--overwrite", "--series", "3"]) == 0
    (made,) = Path("masks").rglob("STUDY1_mask.dcm")
    t2 = read_volume(patient / "STUDY1", series="t2 3")
    assert segments_of(made, t2).masks.shape[1:] == t2.array.shape
