"""A patient's name in a hospital's files appears nowhere at the coordinator."""

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.support import small

NAME = "MUSTERMANN^ERIKA"
pytestmark = pytest.mark.slow


@pytest.fixture
def canary(hospitals: Path, tmp_path: Path) -> Path:
    """The hospitals, with the name in North's file names, patient ids and NIfTI headers.

    North also has one broken file.
    """
    root = tmp_path / "data"
    shutil.copytree(hospitals, root)
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        if row["site"] != "North":
            continue
        row["patient_id"] = f"{NAME}-{number}"
        for kind in ("image", "mask"):
            image = nib.load(root / row[kind])
            image.header["descrip"] = NAME.encode()
            renamed = f"North/{NAME}-{number}_{kind}.nii.gz"
            nib.save(image, root / renamed)
            (root / row[kind]).unlink()
            row[kind] = renamed
    broken = next(row for row in rows if row["site"] == "North")
    (root / broken["image"]).write_bytes(f"not an image of {NAME}".encode())
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.mark.parametrize("heldout", ["South", "North"])
@pytest.mark.row(27)
def test_a_patients_name_stays_at_the_hospital(canary: Path, tmp_path: Path, heldout: str) -> None:
    output = tmp_path / "run"
    done = small.run(
        "simulate", *small.overrides(canary, output, f"heldout={heldout}", "method=sgcg")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert NAME not in done.stdout + done.stderr
    assert "DAT-103" in done.stdout, "the user is not told that a case was left out"
    kept = [
        path
        for path in output.rglob("*")
        if path.is_file() and "sites" not in path.relative_to(output).parts
    ]
    assert len(kept) > 8
    for path in kept:
        assert NAME.encode() not in path.read_bytes(), path
    (home,) = output.glob("*/*/*/sites/North")
    assert NAME in (home / "problems.txt").read_text(), (
        "the hospital itself must be told which file it is"
    )


def test_a_site_that_fails_keeps_its_message_and_the_round_shows_the_code(
    canary: Path, tmp_path: Path
) -> None:
    for path in (canary / "North").glob("*_image.nii.gz"):
        path.write_bytes(NAME.encode())
    output = tmp_path / "run"
    arguments = small.overrides(canary, output, "heldout=South", "federation.join_deadline_s=3")
    done = small.run("simulate", *arguments)
    assert done.returncode == 3, (
        done.stdout + done.stderr
    )  # the others go on, and the run says that it is degraded
    assert "DAT-102" in done.stdout + done.stderr
    assert "North" in done.stdout + done.stderr
    assert NAME not in done.stdout + done.stderr
    for path in output.rglob("*"):
        if path.is_file() and "sites" not in path.relative_to(output).parts:
            assert NAME.encode() not in path.read_bytes(), path


@pytest.mark.row(61, 66)
def test_features_of_a_single_patient_are_withheld_by_the_floor(
    hospitals: Path, tmp_path: Path
) -> None:
    done = small.run(
        "simulate",
        *small.overrides(
            hospitals, tmp_path, "heldout=South", "method=sgcg", "privacy.min_patients=99"
        ),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "STA-203" in done.stdout, "the user is not told that the contrastive loss was off"
    import pyarrow.parquet as pq

    (path,) = tmp_path.glob("*/*/*/rounds.parquet")
    rows = pq.read_table(path).to_pylist()
    counts = [row["value"] for row in rows if row["metric"] == "prototype_count"]
    assert counts
    assert np.all(np.asarray(counts) == 0)


def test_a_real_deployment_keeps_names_at_the_hospital(canary: Path, tmp_path: Path) -> None:
    """Search the bytes of all the coordinator's files: database, logs, Flower's and run folders."""
    from tests.conftest import REPOSITORY
    from tests.support.loopback import loopback

    settings = [*small.SMALL, "heldout=North", "data.sites=[East,North]", "federation.rounds=1"]
    with loopback(tmp_path) as federation:
        for site in ("East", "North"):
            sharing = ["weights", "statistics", "heldout_cases"]
            kit = federation.kit(site, canary, sharing=sharing)
            federation.register(kit)
            federation.join(kit, PATIENT=NAME)
        for site in ("East", "North"):
            federation.await_line(site, "connected to")
        run = federation.submit(REPOSITORY, settings)
        assert federation.wait(run) == "finished:completed", federation.said("superlink")[-3000:]
        for path in (canary / "North").glob("*_image.nii.gz"):
            path.write_bytes(
                NAME.encode()
            )  # from now on every case raises an error that names the patient
        broken = federation.submit(REPOSITORY, [*settings, "federation.join_deadline_s=15"])
        assert federation.wait(broken) == "finished:failed"
        (told,) = (tmp_path / "coordinator/runs" / broken).rglob("outcome.json")
        assert "DAT-102" in told.read_text()
        home = kit / "home"
        assert NAME in (home / "problems.txt").read_text() + (home / "errors.log").read_text()
        aliases = (home / "aliases.csv").read_text()
        assert NAME in aliases
    kept = [*(tmp_path / "coordinator").rglob("*"), tmp_path / "superlink.log"]
    kept = [path for path in kept if path.is_file()]
    assert any(path.name == "state.db" for path in kept)
    (results,) = (tmp_path / "coordinator/runs" / run).rglob("results.parquet")
    import pyarrow.parquet as pq

    alias = {row["case"] for row in pq.read_table(results).to_pylist()}
    assert alias
    assert all(name in aliases for name in alias)
    for path in kept:
        assert NAME.encode() not in path.read_bytes(), path
