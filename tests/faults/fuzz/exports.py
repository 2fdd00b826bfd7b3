"""DICOM beyond a plain series, and the files that `data prepare` reads."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

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

AFFINE = np.diag([-0.7, -0.8, 3.0, 1.0])


def export_targets(folder: Path) -> list[Target]:
    """Return a target for each, with a small image of 8 x 9 x 3 voxels."""
    native = np.random.default_rng(0).integers(0, 900, (8, 9, 3)).astype(np.uint16)
    made = folder / "exports"
    made.mkdir(parents=True)
    write_enhanced(made / "enhanced.dcm", native, AFFINE)
    write_series(made / "series", native, AFFINE)
    image = read_volume(made / "series")
    classes = (image.array > 400).astype(np.uint8)
    drawn = made / "drawn.dcm"
    segmentation.write(drawn, classes, ["background", "gland"], image, model="hand")
    dataset = {"labels": {"background": 0, "gland": 1, "whole": [1, 2]}, "numTraining": 1}
    table = "case,hospital,patient_id,split\np1,A,1,train\np2,B,,\n"

    def seed(name: str) -> tuple[bytes, ...]:
        return ((made / name).read_bytes(),)

    def segments(path: Path) -> object:
        with contextlib.suppress(FedsgcgError):
            read_volume(path, mask=True)
        return segments_of(path, image)

    def export(path: Path) -> object:
        return series.recognise(path.parent, {path.parent: [path, *(made / "series").iterdir()]})

    def nnunet(path: Path) -> object:
        folder = path.parent / "nnunet"
        (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_bytes(path.read_bytes())
        return layouts.recognise(folder, [folder / "imagesTr" / "p1_0000.nii.gz"])

    slow = 8.0
    raw = mutations.bytes_of
    return [
        file_target(made, "dicom-frames", ".dcm", seed("enhanced.dcm"), read_volume, raw, slow),
        file_target(made, "dicom-seg", ".dcm", seed("drawn.dcm"), segments, raw, 4 * slow),
        file_target(made, "dicom-export", ".dcm", seed("drawn.dcm"), export, raw, slow),
        file_target(
            made,
            "dataset-json",
            ".json",
            (json.dumps(dataset).encode(),),
            nnunet,
            mutations.json_of,
        ),
        file_target(
            made,
            "hospitals",
            ".csv",
            (table.encode(),),
            lambda path: read_columns(path, TITLES, ("case", "site")),
            mutations.csv_of,
        ),
    ]
