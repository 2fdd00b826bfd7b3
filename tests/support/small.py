"""Settings of a federation small enough for a test, and helpers to run it."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fedsgcg.clients.data.case_files import validation_patients
from fedsgcg.common.settings.data import DataSettings
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.study import Study

SMALL = (
    "network.base_width=4",
    "data.image_size=32",
    "federation.rounds=3",
    "method.steps_per_round=2",
    "privacy.min_patients=1",
    "privacy.min_pixels=1",
)


def overrides(hospitals: Path, output: Path, *more: str) -> list[str]:
    """Return the command line of a small study on a folder's hospitals; the last value counts."""
    texts = (f"data.root={hospitals}", f"output={output}", *SMALL, *more)
    return list({text.partition("=")[0]: text for text in texts}.values())


def stated_splits(hospitals: Path, folder: Path, heldout: str = "") -> Path:
    """Copy a data folder, with the splits of a simulation stated in its manifest.

    A real hospital's splits depend on its secret; stated ones are the same in both. The held-out
    hospital states none, since all its cases are test cases.
    """
    shutil.copytree(hospitals, folder)
    fraction = DataSettings.validation_fraction
    head, *rows = csv.reader((hospitals / "manifest.csv").read_text().splitlines())
    place = head.index("patient_id")
    chosen = {
        site: validation_patients({row[place] for row in rows if row[0] == site}, fraction)
        for site in {row[0] for row in rows}
    }
    stated = [[*row, _stated(row[0] == heldout, row[place] in chosen[row[0]])] for row in rows]
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*head, "split"], *stated])
    return folder


def _stated(heldout: bool, validates: bool) -> str:
    if heldout:
        return ""
    return "validation" if validates else "train"


def plan(hospitals: Path, output: Path, *more: str) -> Study:
    """The small study, planned in this process."""
    return plan_study(overrides(hospitals, output, *more))


def command(*arguments: str) -> list[str]:
    """Command line of the installed `fedsgcg`."""
    return [str(Path(sys.executable).parent / "fedsgcg"), *arguments]


def run(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed `fedsgcg` to its end."""
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment,
        timeout=560,
        **keywords,
    )


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of a result table in an order of their own, NaN made comparable."""
    rows = [
        {name: None if value != value else value for name, value in row.items()}
        for row in pq.read_table(path).to_pylist()
    ]
    return sorted(
        rows,
        key=lambda row: str(
            [row[name] for name in ("method", "heldout", "seed", "site", "case", "structure")]
        ),
    )


def rounds(path: Path) -> list[dict[str, Any]]:
    """Rows of a `rounds.parquet` in their order."""
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def digest(folder: Path) -> str:
    """Model hash of the one cell below a study's folder."""
    import json

    (path,) = folder.glob("*/*/*/outcome.json")
    return str(json.loads(path.read_text())["digest"])
