"""The command line of `fedsgcg-site predict`; torch is imported only when it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.console import Screen
from fedsgcg.common.exit_codes import exit_codes
from fedsgcg.common.settings.adaptation import WAYS, AdaptSettings
from fedsgcg.common.settings.data import SPLITS

PREDICT: Final = """\
Predict masks with a trained model. MODEL is the folder that contains model.json (or a file
in it); IMAGE is a volume, a picture, the folder of a DICOM series, or a folder of any of
them, whose subfolders are mirrored in DIR. Masks are written with the geometry of their
image and the label values of the training masks. With --data the cases of a prepared
folder are predicted and scored. Files that cannot be used are skipped and listed at the
end. DIR/predictions.jsonl lists what was predicted; --resume skips images whose results
are complete and unchanged.
"""
EXITS: Final = exit_codes(
    failure="nothing could be predicted",
    invalid="bad model or settings",
    partial="some files failed",
)


def add_predict_parser(commands: Any) -> None:
    """Add `predict` to the subparsers of `fedsgcg-site`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "predict",
        help="use a model on images of this hospital",
        description=PREDICT,
        epilog=EXITS,
        formatter_class=raw,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help="folder of the model, or model.json / .safetensors",
    )
    parser.add_argument(
        "images", metavar="IMAGE", type=Path, nargs="*", help="images, or folders of images"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="folder for the results"
    )
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path, help="prepared folder: predict and score its cases"
    )
    parser.add_argument("--site", metavar="NAME", help="with --data: this hospital only")
    parser.add_argument(
        "--split", choices=SPLITS, help="with --data: only cases of this split in the manifest"
    )
    parser.add_argument(
        "--probability", action="store_true", help="also write each structure's probability"
    )
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="write the closeness to the prototypes as a map in [0, 1]",
    )
    parser.add_argument(
        "--adapt",
        metavar="WAY",
        choices=WAYS,  # amplitude is refused with the reason
        default="",
        help="batchnorm or prototypes: first adapt the model to all these images, without masks "
        "(transductive)",
    )
    parser.add_argument(
        "--adapt-share",
        metavar="SHARE",
        type=float,
        default=AdaptSettings.share,
        help="with --adapt: weight of these images, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--overlay", action="store_true", help="write a PNG with outlines of one slice per case"
    )
    parser.add_argument(
        "--out-format",
        choices=("same", "nifti", "metaimage", "nrrd", "dicom-seg"),
        default="same",
        help="format of the masks of volumes (default: same as the image; DICOM-SEG for DICOM)",
    )
    parser.add_argument(
        "--series",
        metavar="TEXT",
        default="",
        help="number or description of the DICOM series to use in folders with several",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run: predict what is not complete",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--batch", metavar="N", type=int, help="slices per batch (default: as in evaluation)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, default=os.cpu_count() or 1, help="CPU threads"
    )
    parser.add_argument(
        "--code",
        metavar="PATH",
        action="append",
        default=[],
        help="package.module:Class of a user-defined network that the model may use",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.clients.predict.run import run_predict

    return run_predict(options, console)
