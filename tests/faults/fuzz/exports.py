"""Exports and layouts that are fuzzed: enhanced DICOM, segmentations, tables, dataset.json."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Final

import numpy as np

from fedsgcg.clients.data.manifest import read_columns
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images import segmentation
from fedsgcg.common.images.read import read_volume, segments_of
from fedsgcg.deploy.prepare import layouts, series
from fedsgcg.deploy.prepare.hospitals import TITLES
from tests.faults.fuzz import mutations
from tests.faults.fuzz.target import Target, file_target
from tests.support.dicoms import write_enhanced, write_series

AFFINE: Final = np.diag([-0.7, -0.8, 3.0, 1.0])
SLOW: Final = 8.0


def export_targets(folder: Path) -> list[Target]:
    """Return a target for each, with an image of 8 x 9 x 3 voxels."""
    native = np.random.default_rng(0).integers(0, 900, (8, 9, 3)).astype(np.uint16)
    folder.mkdir(parents=True)
    write_enhanced(folder / "honest-frames.dcm", native, AFFINE)
    write_series(folder / "series", native, AFFINE)
    image = read_volume(folder / "series")
    drawn = folder / "honest-seg.dcm"
    classes = (image.array > 400).astype(np.uint8)
    segmentation.write(drawn, classes, ["background", "gland"], image, model="hand")
    frames, segments = ((folder / f"honest-{name}.dcm").read_bytes() for name in ("frames", "seg"))
    dataset = {"labels": {"background": 0, "gland": 1, "whole": [1, 2]}, "numTraining": 1}
    table = "case,hospital,patient_id,split\np1,A,1,train\np2,B,,\n"

    def mask(path: Path) -> object:
        with contextlib.suppress(FedsgcgError):
            read_volume(path, mask=True)
        return segments_of(path, image)

    def export(path: Path) -> object:
        return series.recognise(folder, {folder: [path, *(folder / "series").iterdir()]})

    def nnunet(path: Path) -> object:
        root = folder / "nnunet"
        (root / "imagesTr").mkdir(parents=True, exist_ok=True)
        (root / "dataset.json").write_bytes(path.read_bytes())
        return layouts.recognise(root, [root / "imagesTr" / "p1_0000.nii.gz"])

    def hospitals(path: Path) -> object:
        return read_columns(path, TITLES, ("case", "site"))

    raw, as_json, as_csv = mutations.bytes_of, mutations.json_of, mutations.csv_of
    return [
        file_target(folder, "dicom-frames", ".dcm", (frames,), read_volume, raw, SLOW),
        file_target(folder, "dicom-seg", ".dcm", (segments,), mask, raw, 2 * SLOW),
        file_target(folder, "dicom-export", ".dcm", (segments,), export, raw, SLOW),
        file_target(
            folder, "dataset-json", ".json", (json.dumps(dataset).encode(),), nnunet, as_json
        ),
        file_target(folder, "hospitals", ".csv", (table.encode(),), hospitals, as_csv),
    ]
