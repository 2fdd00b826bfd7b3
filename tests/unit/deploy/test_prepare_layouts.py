"""Folders of nnU-Net, of the decathlon and BIDS become own data; contradictions are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedsgcg.deploy.cli.coordinator import main
from tests.support import downloads


def scan(path: Path, number: int, values=None) -> Path:
    """Write a small volume; with `values` a mask that has each value in a row of its own."""
    rng = np.random.default_rng(number)
    array = rng.integers(0, 200, (24, 24, 6)).astype(np.int16)
    if values is not None:
        array[:] = 0
        for row, value in enumerate(values):
            array[4 + row, 6:12, 2:4] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    return downloads.volume(path, array)


def nnunet(root: Path, values=(1, 2), labels=None, cases=2, **more) -> Path:
    for case in range(cases):
        seed = sum(root.name.encode()) + case
        scan(root / "imagesTr" / f"p{case}_0000.nii.gz", seed)
        scan(root / "labelsTr" / f"p{case}.nii.gz", seed, values)
    labels = labels or {"background": 0, "PZ": 1, "TZ": 2}
    content = {"channel_names": {"0": "T2"}, "labels": labels, "numTraining": cases, **more}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def decathlon(root: Path) -> Path:
    for case in range(2):
        scan(root / "imagesTr" / f"prostate_{case:02d}.nii.gz", case)
        scan(root / "labelsTr" / f"prostate_{case:02d}.nii.gz", case, (1, 2))
    training = [
        {
            "image": f"./imagesTr/prostate_{n:02d}.nii.gz",
            "label": f"./labelsTr/prostate_{n:02d}.nii.gz",
        }
        for n in range(2)
    ]
    labels = {"0": "background", "1": "PZ", "2": "TZ"}
    content = {"labels": labels, "numTraining": 2, "training": training}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def bids(root: Path, *, labels=True, table="index\tname\n1\tcord\n2\tgrey matter\n") -> Path:
    for number in range(1, 5):
        for kind in ("T1w", "T2w"):
            scan(root / f"sub-{number}/anat/sub-{number}_{kind}.nii.gz", 10 * number + len(kind))
        if labels:
            scan(
                root / f"derivatives/manual/sub-{number}/anat/sub-{number}_T2w_dseg.nii.gz",
                number,
                (1, 2),
            )
    if labels and table:
        (root / "derivatives/manual/dseg.tsv").write_text(table)
    rows = [f"sub-{number}\t{'Oslo' if number < 3 else 'Bergen'}" for number in range(1, 5)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tsite", *rows]))
    return root


def prepared(source: Path, out: Path, capsys) -> tuple[int, dict, str]:
    """Return the exit code, the written settings and everything printed."""
    capsys.readouterr()
    code = main(["data", "prepare", str(source), "-o", str(out)])
    printed = "".join(capsys.readouterr())
    file = out / "data.yaml"
    return code, yaml.safe_load(file.read_text()) if file.exists() else {}, printed


def sites(out: Path) -> dict[str, int]:
    return {path.name: len(list(path.glob("*_image*"))) for path in out.iterdir() if path.is_dir()}


def test_folders_of_nnunet_are_hospitals_with_the_names_of_their_labels(tmp_path, capsys):
    for name in ("North", "South"):
        nnunet(tmp_path / "raw" / name)
    out = tmp_path / "out"
    code, settings, printed = prepared(tmp_path / "raw", out, capsys)
    assert code == 0, printed
    assert sites(out) == {"North": 2, "South": 2}
    assert settings["classes"] == {"background": [0], "PZ": [1], "TZ": [2]}
    assert settings["structures"] == {"PZ": ["PZ"], "TZ": ["TZ"]}
    assert "0 in 4, 1 in 4, 2 in 4" in printed
    assert f"fedsgcg data check {out}" in printed


def test_regions_of_nnunet_are_structures_of_several_classes(tmp_path, capsys):
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    code, settings, _ = prepared(nnunet(tmp_path / "A", labels=labels), tmp_path / "out", capsys)
    assert code == 0
    assert settings["structures"] == {"whole": ["class_1", "class_2"], "core": ["class_2"]}


def test_the_label_ignore_is_no_class_and_its_cases_are_named(tmp_path, capsys):
    labels = {"background": 0, "PZ": 1, "TZ": 2, "ignore": 3}
    source = nnunet(tmp_path / "A", labels=labels)
    scan(source / "labelsTr" / "p1.nii.gz", 1, (1, 2, 3))
    code, settings, printed = prepared(source, tmp_path / "out", capsys)
    assert code == 3
    assert "values 3" in printed
    assert list(settings["classes"]) == ["background", "PZ", "TZ"]


def test_numbers_at_the_end_of_a_decathlons_names_are_no_channels(tmp_path, capsys):
    for case in ("liver_0001", "liver_0002"):
        scan(tmp_path / "A" / "imagesTr" / f"{case}.nii.gz", 1 + int(case[-1]))
        scan(tmp_path / "A" / "labelsTr" / f"{case}.nii.gz", 1, (1,))
    code, settings, printed = prepared(tmp_path / "A", tmp_path / "out", capsys)
    assert code == 0, printed
    assert sites(tmp_path / "out") == {"A": 2}
    assert list(settings["classes"]) == ["background", "class_1"]


def test_the_decathlons_labels_are_read_the_other_way_round(tmp_path, capsys):
    source = decathlon(tmp_path / "Task05_Prostate")
    code, settings, printed = prepared(source, tmp_path / "out", capsys)
    assert code == 0, printed
    assert settings["classes"] == {"background": [0], "PZ": [1], "TZ": [2]}
    assert sites(tmp_path / "out") == {"Task05_Prostate": 2}
    assert "a study needs two" in printed


def test_bids_takes_labels_hospitals_and_names_from_their_tables(tmp_path, capsys):
    code, settings, printed = prepared(bids(tmp_path / "raw"), tmp_path / "out", capsys)
    assert code == 0, printed
    assert sites(tmp_path / "out") == {"Oslo": 2, "Bergen": 2}
    assert settings["classes"] == {"background": [0], "cord": [1], "grey_matter": [2]}
    names = [path.name for path in (tmp_path / "out" / "Oslo").glob("*_image*")]
    assert all("T2w" in name for name in names)


def test_bids_without_labels_is_refused(tmp_path, capsys):
    code, _, printed = prepared(bids(tmp_path / "raw", labels=False), tmp_path / "out", capsys)
    assert code == 2
    assert "DAT-180" in printed
    assert "images of 4 subjects" in printed


@pytest.mark.parametrize(
    "table",
    ["index\tname\n1\tcord\n2\tcord\n", "index\tname\n1\tcord\n1\tgrey\n"],
    ids=["name twice", "value twice"],
)
def test_a_label_table_with_a_name_or_value_twice_is_refused(table, tmp_path, capsys):
    code, _, printed = prepared(bids(tmp_path / "raw", table=table), tmp_path / "out", capsys)
    assert code == 2
    assert "DAT-182" in printed


def test_one_value_with_two_names_at_two_hospitals_is_refused(tmp_path, capsys):
    nnunet(tmp_path / "raw" / "A")
    nnunet(tmp_path / "raw" / "B", labels={"background": 0, "PZ": 2, "TZ": 1})
    code, _, printed = prepared(tmp_path / "raw", tmp_path / "out", capsys)
    assert (code, "DAT-182" in printed) == (2, True)


def test_a_label_that_dataset_json_does_not_declare_is_named_and_the_rest_is_used(tmp_path, capsys):
    source = nnunet(tmp_path / "A")
    scan(source / "labelsTr" / "p1.nii.gz", 1, (1, 2, 7))
    code, _, printed = prepared(source, tmp_path / "out", capsys)
    assert code == 3
    assert "DAT-109" in printed
    assert "values 7" in printed
    assert sites(tmp_path / "out") == {"A": 1}


def test_a_declared_label_that_no_mask_has_is_named(tmp_path, capsys):
    labels = {"background": 0, "PZ": 1, "TZ": 2, "urethra": 3}
    code, _, printed = prepared(nnunet(tmp_path / "A", labels=labels), tmp_path / "out", capsys)
    assert code == 3
    assert "DAT-181" in printed
    assert "urethra (3) in no mask" in printed


def test_a_folder_that_is_half_unpacked_says_what_is_missing(tmp_path, capsys):
    source = nnunet(tmp_path / "A", cases=3)
    (source / "labelsTr" / "p0.nii.gz").unlink()
    (source / "imagesTr" / "p1_0000.nii.gz").unlink()
    code, _, printed = prepared(source, tmp_path / "out", capsys)
    assert code == 3
    assert printed.count("DAT-183") == 3
    assert "1 label without an image: p1" in printed
    assert "1 image without a label: p0" in printed
    assert "2 cases, dataset.json states 3" in printed
    only = tmp_path / "B"
    only.mkdir()
    (only / "dataset.json").write_text("{}")
    code, _, printed = prepared(only, tmp_path / "none", capsys)
    assert (code, "DAT-183" in printed) == (2, True)


@pytest.mark.parametrize(
    "text",
    ['{"labels": {"a": 1, "a": 2}}', '{"labels": {"a": 1.5}}', '{"labels": [1]}', "{"],
    ids=["name twice", "no whole number", "list", "cut"],
)
def test_a_dataset_json_that_cannot_be_used_is_refused(text, tmp_path, capsys):
    source = nnunet(tmp_path / "A")
    (source / "dataset.json").write_text(text)
    code, _, printed = prepared(source, tmp_path / "out", capsys)
    assert (code, "DAT-181" in printed) == (2, True)


def test_a_name_that_is_neither_data_set_nor_folder_lists_what_there_is(tmp_path, capsys):
    code, _, printed = prepared(Path("prostat"), tmp_path / "out", capsys)
    assert code == 2
    assert "promise12" in printed


def test_images_without_labels_and_further_channels_are_said_and_another_can_be_chosen(
    tmp_path, capsys
):
    source = nnunet(tmp_path / "A", channel_names={"0": "T2", "1": "ADC"})
    for case in range(2):
        scan(source / "imagesTr" / f"p{case}_0001.nii.gz", 50 + case)
    scan(source / "imagesTs" / "p9_0000.nii.gz", 9)
    code, settings, printed = prepared(source, tmp_path / "out", capsys)
    assert code == 0, printed
    assert "1 image in imagesTs without a label, left out: p9_0000" in printed
    assert "the channels 0000 T2, 0001 ADC; only 0000 T2 is used" in printed
    out = tmp_path / "adc"
    assert main(["data", "prepare", str(source), "-o", str(out), "--channel", "ADC"]) == 0
    assert sorted(path.name for path in (out / "A").glob("*_image*")) == [
        "p0_0001_image.nii.gz",
        "p1_0001_image.nii.gz",
    ]
    capsys.readouterr()
    assert main(["data", "prepare", str(source), "-o", str(out), "--channel", "DWI"]) == 2
    assert "0 (T2) | 1 (ADC)" in capsys.readouterr().err
    assert settings["stack"] == 3
    assert settings["largest_component"] is False
    assert settings["fill_holes"] is False
