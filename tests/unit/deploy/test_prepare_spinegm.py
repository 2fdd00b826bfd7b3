"""The repository of the Grey Matter Challenge becomes the hospitals of `data=spinegm`."""

import nibabel as nib
import numpy as np

from fedsgcg.deploy.cli.coordinator import main
from tests.support import downloads
from tests.support.prepared import manifest, prepare, report


def test_the_repository_is_joined_and_cut_to_the_labelled_slices(tmp_path, capsys):
    made = downloads.gm_challenge(tmp_path / "repository")
    out = tmp_path / "out"
    assert prepare("spinegm", tmp_path / "repository", "-o", out) == 3  # five cases are missing
    rows = {row["image"]: row["patient_id"] for row in manifest(out)}
    assert rows == {
        "UCL/sub-9418_image.nii.gz": "sub-9418",
        "Milan/sub-9709Ses1_image.nii.gz": "sub-9709",
        "Milan/sub-9709Ses2_image.nii.gz": "sub-9709",
    }
    image = nib.load(out / "UCL/sub-9418_image.nii.gz")
    mask = nib.load(out / "UCL/sub-9418_mask.nii.gz")
    # By hand: slices 2 to 5 have both labels; rows 100-119 have their middle at 109, so the 128
    # voxels start at 22, the last possible place; columns 60-74 at 67, so at 3.
    wanted = made["sub-9418"][22:150, 3:131, 2:6]
    np.testing.assert_array_equal(np.asarray(mask.dataobj), wanted)
    np.testing.assert_allclose(image.affine[:3, 3], [11.0, 1.5, 6.0])
    np.testing.assert_allclose(mask.affine, image.affine)
    assert "second runs" in report(out)
    assert "DAT-123" not in report(out)
    capsys.readouterr()
    assert main(["data", "list", "spinegm", str(tmp_path / "repository")]) == 3
    assert "3 cases" in capsys.readouterr().out
