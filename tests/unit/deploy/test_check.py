"""`fedsgcg-site check` reports every planted fault with its fix, and nothing that is valid."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedsgcg.clients.guard.approval import Bundle, approve
from fedsgcg.clients.guard.site_file import write_site_file
from fedsgcg.common.console import Screen, run_command
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.certificates import certificate_fingerprint, make_authority, write_authority
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.site.check import (
    examine_device,
    examine_disk,
    examine_folders,
    exit_code,
    payload_bytes,
    show,
)
from fedsgcg.deploy.site.check_files import examine_files, plain_id
from fedsgcg.deploy.site.check_link import examine_link
from fedsgcg.deploy.site.findings import Finding
from tests.support import sites
from tests.unit.clients.test_policy import policy_for


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return sites.hospitals(tmp_path / "data", cases=6)


def rewrite(root: Path, case: int, kind: str, change) -> None:
    path = root / f"North/North-00{case}_{kind}.nii.gz"
    image = nib.load(path)
    nib.save(change(np.asarray(image.dataobj), image.affine.copy()), path)


def manifest(root: Path, change) -> None:
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = [change(dict(row, split="")) for row in rows]
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def plan(root: Path, folder: Path) -> Plan:
    return sites.plan_of(root, folder)


def findings(root: Path, folder: Path, *, heldout: bool = False) -> dict[str, Finding]:
    """Return the findings for North by case; of two findings the worse one."""
    found, _ = examine_files(
        policy_for(root, folder),
        plan(root, folder).data,
        heldout=heldout,
        progress=lambda done, total: None,
    )
    order = {"ok": 0, "note": 1, "warn": 2, "fail": 3}
    return {
        finding.name: finding
        for finding in sorted(found, key=lambda finding: order[finding.verdict])
    }


def test_healthy_files_are_healthy(root, tmp_path):
    found = findings(root, tmp_path)
    assert {finding.verdict for finding in found.values()} == {"ok"}
    assert len(found) == 7
    assert found["cases"].found.startswith("6 of 6 usable; patients: ")


def test_every_planted_fault_is_named_with_its_repair(root, tmp_path):
    def nan(array, affine):
        array = array.astype(np.float32)
        array[0, 0, 0] = np.nan
        return nib.Nifti1Image(array, affine)

    def moved(array, affine):
        affine[:3, 3] += 30
        return nib.Nifti1Image(array, affine)

    rewrite(root, 1, "image", nan)
    rewrite(
        root, 2, "mask", lambda array, affine: nib.Nifti1Image((array * 7).astype(np.uint8), affine)
    )
    rewrite(root, 3, "mask", lambda array, affine: nib.Nifti1Image(np.zeros_like(array), affine))
    rewrite(root, 4, "mask", moved)
    (root / "North/North-005_image.nii.gz").write_bytes(b"")
    found = findings(root, tmp_path)
    # The split is drawn with the site's secret: it may also leave few slices for training.
    assert {
        name: (finding.code, finding.verdict)
        for name, finding in found.items()
        if finding.code and name != "slices"
    } == {
        "North-001": ("DAT-107", "fail"),
        "North-002": ("DAT-109", "fail"),
        "North-003": ("DAT-110", "warn"),
        "North-004": ("DAT-105", "fail"),
        "North-005": ("DAT-103", "fail"),
    }
    assert all(finding.action for finding in found.values() if finding.code)
    assert found["North-006"].verdict == "ok"


@pytest.mark.parametrize(("factor", "side"), [(1e-3, "0.001"), (1000, "1e+03")])
def test_a_voxel_of_the_wrong_unit_is_named(root, tmp_path, factor, side):
    def scaled(array, affine):
        affine[:3, :3] *= factor / abs(affine[0, 0])
        affine[:3, 3] = 0
        return nib.Nifti1Image(array, affine)

    rewrite(root, 2, "image", scaled)
    rewrite(root, 2, "mask", scaled)
    finding = findings(root, tmp_path)["North-002"]
    assert (finding.code, finding.verdict) == ("SITE-510", "warn")
    assert side in finding.found
    assert "xyzt_units" in finding.action


def test_an_unusual_spacing_is_reported(root, tmp_path):
    def larger(array, affine):
        affine[:3, :3] *= 3
        return nib.Nifti1Image(array, affine)

    rewrite(root, 2, "image", larger)
    rewrite(root, 2, "mask", larger)
    found = findings(root, tmp_path)
    assert found["North-002"].code == "SITE-510"
    assert [name for name, finding in found.items() if finding.code] == ["North-002"]


def test_the_same_pixels_under_two_patients_are_a_leak_and_under_one_a_warning(root, tmp_path):
    for kind in ("image", "mask"):
        shutil.copy(
            root / f"North/North-001_{kind}.nii.gz", root / f"North/North-002_{kind}.nii.gz"
        )
    found = findings(root, tmp_path)["North-002"]
    assert (found.code, found.verdict) == ("SITE-511", "fail")
    assert "North-001" in found.found
    manifest(
        root,
        lambda row: (
            row | ({"patient_id": "one"} if row["image"].startswith("North/North-00") else {})
        ),
    )
    assert findings(root, tmp_path)["North-002"].verdict == "warn"


def test_the_same_pixels_in_another_orientation_are_found(root, tmp_path):
    first = nib.load(root / "North/North-001_image.nii.gz")
    mask = nib.load(root / "North/North-001_mask.nii.gz")
    turn = nib.orientations.axcodes2ornt(("R", "A", "S"))
    for image, kind in ((first, "image"), (mask, "mask")):
        change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), turn)
        nib.save(image.as_reoriented(change), root / f"North/North-002_{kind}.nii.gz")
    assert findings(root, tmp_path)["North-002"].code == "SITE-511"


@pytest.mark.row(46)
def test_one_person_under_two_spellings_in_two_splits(root, tmp_path):
    names = {
        "North/North-001_image.nii.gz": ("P-01", "train"),
        "North/North-002_image.nii.gz": ("p1", "validation"),
    }

    def named(row):
        patient, split = names.get(row["image"], (row["patient_id"], "train"))
        return row | {"patient_id": patient, "split": split}

    manifest(root, named)
    found = findings(root, tmp_path)["North-002"]
    assert (found.code, found.verdict) == ("SITE-512", "warn")
    assert "in another split" in found.found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("P-01", "p1", True),
        ("Anna 7", "ANNA_007", True),
        ("P10", "P1", False),
        ("1a", "a1", False),
        ("x-0", "x0", True),
    ],
)
def test_ids_are_compared_without_their_spelling(one, other, same):
    assert (plain_id(one) == plain_id(other)) is same


@pytest.mark.parametrize("heldout", [True, False])
def test_an_empty_mask_is_a_true_negative(root, tmp_path, heldout):
    rewrite(root, 3, "mask", lambda array, affine: nib.Nifti1Image(np.zeros_like(array), affine))
    found = findings(root, tmp_path, heldout=heldout)["North-003"]
    assert (found.verdict, found.code) == ("warn", "DAT-110")
    assert "true negative" in found.action


@pytest.mark.row(48)
def test_a_site_below_its_own_floor_is_warned(root, tmp_path):
    found, _ = examine_files(
        policy_for(root, tmp_path, patient_floor=7),
        plan(root, tmp_path).data,
        heldout=False,
        progress=lambda d, t: None,
    )
    assert [finding.code for finding in found if finding.verdict == "warn"] == ["SITE-513"]


def test_key_and_folders(root, tmp_path):
    policy = policy_for(root, tmp_path)
    key = Path(policy.key)
    key.rename(tmp_path / "elsewhere")
    assert [finding.code for finding in examine_folders(policy) if finding.code] == [
        "SITE-518",
        "DEP-603",
    ]
    write_authority(Path(policy.ca).parent, make_authority("demo"))
    key.write_text("secret")
    key.chmod(0o644)
    approve(Bundle({"a.py": b""}), Path(policy.approved), "test")
    (finding,) = [finding for finding in examine_folders(policy) if finding.code]
    assert finding.action == f"chmod 600 {key}"
    key.chmod(0o600)
    (finding,) = [finding for finding in examine_folders(policy) if finding.code]
    assert finding.code == "DEP-603"
    (tmp_path / "elsewhere").replace(key)
    assert not [finding for finding in examine_folders(policy) if finding.code]


def test_before_the_approval_the_check_has_a_note_and_no_problem(root, tmp_path):
    found = examine_folders(policy_for(root, tmp_path))
    (note,) = [finding for finding in found if finding.name == "approved code"]
    assert note.verdict == "note"
    assert "fedsgcg-site approve" in note.action
    assert exit_code([note]) == 0


def test_a_step_is_measured_and_a_missing_device_said(root, tmp_path):
    found = examine_device("cpu", 1, plan(root, tmp_path))
    assert [finding.verdict for finding in found] == ["ok", "ok"]
    assert "for 4 slices of 32 pixels" in found[1].found
    if os.environ.get("CUDA_VISIBLE_DEVICES", "") == "" and not shutil.which("nvidia-smi"):
        (missing,) = examine_device("cuda", 1, plan(root, tmp_path))
        assert (missing.code, missing.verdict) == ("CFG-004", "fail")


def test_the_disk_is_compared_with_what_is_needed(root, tmp_path):
    _, seen = examine_files(
        policy_for(root, tmp_path),
        plan(root, tmp_path).data,
        heldout=False,
        progress=lambda d, t: None,
    )
    policy = policy_for(root, tmp_path)
    found = examine_disk((policy.cache, policy.home), seen)
    assert len(found) == 2
    assert all("GB needed" in finding.found for finding in found)


def test_the_payload_is_counted_as_it_travels(root, tmp_path):
    made = plan(root, tmp_path)
    weights = sites.weights(made)
    classes, features = 2, made.network.num_features
    assert payload_bytes(made) == 4 * weights.values.size + classes * 8 * (
        1 + features + features * (features + 1) // 2
    )


def test_a_link_without_a_server_stops_at_the_port(root, tmp_path):
    found = examine_link(policy_for(root, tmp_path), 10)
    assert [(finding.name, finding.verdict) for finding in found] == [
        ("name", "ok"),
        ("port", "fail"),
    ]
    nowhere = examine_link(policy_for(root, tmp_path, server="no-such-host.invalid:1"), 10)
    assert [(finding.name, finding.code) for finding in nowhere] == [("name", "SITE-506")]


def test_exit_codes_and_the_table(root, tmp_path):
    ok, note, warn, bad = (
        Finding("files", f"case-{v}", v, "x [y]", "do [z]") for v in ("ok", "note", "warn", "fail")
    )
    some = ([ok], [ok, note], [ok, note, warn], [ok, warn, bad])
    assert [exit_code(findings) for findings in some] == [0, 0, 3, 1]
    text = io.StringIO()
    show([ok, warn, bad], Screen(text, 110), everything=False)
    assert "case-ok" not in text.getvalue()
    assert "1 file without a problem" in text.getvalue()
    assert "do [z]" in text.getvalue()


@pytest.mark.parametrize("columns", ["40", "110"])
def test_the_fingerprint_to_compare_is_shown_to_the_letter(
    root, tmp_path, columns, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", columns)
    policy = policy_for(root, tmp_path)
    authority = make_authority("demo")
    write_authority(Path(policy.ca).parent, authority)
    fingerprint = certificate_fingerprint(authority.certificate)
    found = [finding for finding in examine_folders(policy) if finding.name == "authority"]
    assert [finding.found for finding in found] == [fingerprint]
    run_command(lambda console: show(found, console, everything=True) or 0)
    cells = [
        line.split("│")[4].strip() for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert "".join(cells) == fingerprint


def test_check_prints_json_and_its_exit_code(root, tmp_path, capsys):
    kit = tmp_path / "kit"
    kit.mkdir()
    write_site_file(kit / "site.yaml", policy_for(root, tmp_path))
    (kit / "settings.txt").write_text(
        "# the federation\nnetwork.base_width=4\ndata.image_size=32\n"
    )
    code = site_cli.main(
        ["check", str(kit), "--json", "--no-link", "--settings", "method.batch_size=2"]
    )
    told = json.loads(capsys.readouterr().out)
    assert code == 1  # the key is missing
    assert {entry["area"] for entry in told} == {"files", "site", "device", "disk"}
    assert any("for 2 slices of 32 pixels" in entry["found"] for entry in told)


def test_files_that_are_not_used_are_a_warning(root, tmp_path):
    (root / "manifest.csv").unlink()
    for name in ("x_image.mgz", "y_mask.nii.gz"):
        (root / "North" / name).write_bytes(b"")
    found = findings(root, tmp_path)[str(root / "North")]
    assert (found.verdict, found.code) == ("warn", "DAT-119")
    assert "(.mgz 1): x_image.mgz; 1 mask without an image: y_mask.nii.gz" in found.found
    assert "FreeSurfer" in found.action
